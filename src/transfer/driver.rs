//! The tasks that make progress for the futures of an engine: one in each tokio runtime that uses it, so that none
//! depends on the threads of another.
//!
//! A task sleeps until the engine's descriptor is readable or the next timeout expires, and ends with the engine.
//!
//! `unsafe` is here to register a descriptor with tokio.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, Id};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::engine::Engine;

const NO_DRIVER: &str = "the tokio runtime has no I/O driver or no timer: build it with enable_all";

/// The tasks of an engine.
#[derive(Default)]
pub(super) struct Drivers {
    /// Each runtime with what its task is told by; `None` for a runtime that cannot have one.
    all: Mutex<Vec<(Id, Option<Arc<Notify>>)>>,
    /// Number of tasks.
    count: AtomicUsize,
}

impl Drivers {
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    /// Has each task look for the next timeout, or that the engine is gone.
    pub(super) fn wake(&self) {
        if !self.is_empty() {
            self.lock().iter().filter_map(|(_, told)| told.as_ref()).for_each(|told| told.notify_one());
        }
    }

    /// Adds one for a runtime, unless it has one or cannot have one.
    fn add(&self, runtime: Id) -> Option<Arc<Notify>> {
        let mut all = self.lock();
        if all.iter().any(|(id, _)| *id == runtime) {
            return None;
        }
        let told = Arc::<Notify>::default();
        all.push((runtime, Some(told.clone())));
        self.counted(&all);
        Some(told)
    }

    /// Forgets a runtime, or keeps that it cannot have a task.
    fn remove(&self, runtime: Id, unable: bool) {
        let mut all = self.lock();
        all.retain(|(id, _)| *id != runtime);
        if unable {
            all.push((runtime, None));
        }
        self.counted(&all);
    }

    fn counted(&self, all: &[(Id, Option<Arc<Notify>>)]) {
        self.count.store(all.iter().filter(|(_, told)| told.is_some()).count(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Id, Option<Arc<Notify>>)>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the task of the caller's runtime if it has none. Where it cannot have one, those of other runtimes do, or the
/// engine fails.
pub(super) fn ensure(engine: &Arc<Engine>) {
    // A child of `fork` must not touch its parent's queues.
    let Some(handle) = Handle::try_current().ok().filter(|_| engine.check_own().is_ok()) else { return };
    match engine.drivers.add(handle.id()) {
        Some(told) => {
            let (engine, runtime) = (Arc::downgrade(engine), handle.id());
            handle.spawn(drive(Driven { engine, runtime, told, problem: None }));
        }
        None if engine.drivers.is_empty() => engine.fail(NO_DRIVER),
        None => {}
    }
}

/// Registers a descriptor with the runtime, under a number of its own, since it may be registered already.
pub(crate) fn watch(fd: BorrowedFd<'_>) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = fd.try_clone_to_owned()?;
    // SAFETY: the descriptor is owned, so it stays open and the same.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}

/// Held by the task.
struct Driven {
    engine: Weak<Engine>,
    runtime: Id,
    /// Tells of an earlier timeout, or that the engine is gone.
    told: Arc<Notify>,
    /// Why the runtime cannot have a task.
    problem: Option<String>,
}

impl Drop for Driven {
    /// The runtime has shut down, or it lacks a driver.
    fn drop(&mut self) {
        let own = |engine: &Arc<Engine>| engine.check_own().is_ok();
        let Some(engine) = self.engine.upgrade().filter(own) else { return };
        engine.drivers.remove(self.runtime, self.problem.is_some());
        if let Some(problem) = self.problem.take().filter(|_| engine.drivers.is_empty()) {
            engine.fail(&problem);
        }
        // A task that another runtime polls needs one there.
        engine.wake_all();
    }
}

async fn drive(mut driven: Driven) {
    let Some(engine) = driven.engine.upgrade() else { return };
    // Without an I/O driver it panics here.
    driven.problem = Some(NO_DRIVER.into());
    let descriptor = match watch(engine.events.as_fd()) {
        Ok(descriptor) => descriptor,
        Err(error) => {
            driven.problem = Some(format!("cannot watch the descriptor of a worker: {error}"));
            return;
        }
    };
    drop(engine);
    let mut timer = pin!(sleep_until(Instant::now()));
    // Without a timer it panics here.
    poll_fn(|context| Poll::Ready(timer.as_mut().poll(context).is_ready())).await;
    driven.problem = None;
    loop {
        let next = match driven.engine.upgrade() {
            // An error fails the connections, whose tasks hear of it.
            Some(engine) => engine.process_events_for_tasks().unwrap_or(None),
            None => return,
        };
        if let Some(next) = next {
            timer.as_mut().reset(next.into());
        }
        tokio::select! {
            () = driven.told.notified() => {}
            () = timer.as_mut(), if next.is_some() => {}
            // What comes after this is cleared is not missed, since the events are processed later.
            ready = descriptor.readable() => match ready {
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => {
                    tracing::warn!(%error, "the tokio runtime does not watch the descriptor of a worker any more");
                    return;
                }
            }
        }
    }
}
