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
    all: Mutex<Vec<(Id, Arc<Notify>)>>,
    count: AtomicUsize,
}

impl Drivers {
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    /// Has each task look for the next timeout, or that the engine is gone.
    pub(super) fn wake(&self) {
        if !self.is_empty() {
            self.lock().iter().for_each(|(_, notify)| notify.notify_one());
        }
    }

    /// Adds one for a runtime, unless it has one.
    fn add(&self, runtime: Id) -> Option<Arc<Notify>> {
        let mut all = self.lock();
        if all.iter().any(|(id, _)| *id == runtime) {
            return None;
        }
        let notify = Arc::<Notify>::default();
        all.push((runtime, notify.clone()));
        self.count.store(all.len(), Ordering::Relaxed);
        Some(notify)
    }

    fn remove(&self, runtime: Id) {
        let mut all = self.lock();
        all.retain(|(id, _)| *id != runtime);
        self.count.store(all.len(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Id, Arc<Notify>)>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the task of the caller's runtime if it has none.
pub(super) fn ensure(engine: &Arc<Engine>) {
    // A child of `fork` must not touch its parent's queues.
    if let Ok(handle) = Handle::try_current()
        && engine.check_own().is_ok()
        && let Some(told) = engine.drivers.add(handle.id())
    {
        let driven = Driven { engine: Arc::downgrade(engine), runtime: handle.id(), told, starts: true };
        handle.spawn(drive(driven));
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
    /// Whether the runtime may turn out to lack a driver.
    starts: bool,
}

impl Drop for Driven {
    /// The runtime has shut down, perhaps because another task has panicked; or tokio has.
    fn drop(&mut self) {
        let Some(engine) = self.engine.upgrade() else { return };
        engine.drivers.remove(self.runtime);
        if self.starts && std::thread::panicking() {
            engine.fail(NO_DRIVER);
        }
        // A task that another runtime polls needs one there.
        engine.wake_all();
    }
}

async fn drive(mut driven: Driven) {
    let Some(engine) = driven.engine.upgrade() else { return };
    let descriptor = match watch(engine.events.as_fd()) {
        Ok(descriptor) => descriptor,
        Err(error) => return engine.fail(&format!("cannot watch the descriptor of a worker: {error}")),
    };
    drop(engine);
    let mut timer = pin!(sleep_until(Instant::now()));
    // Without a timer it panics here.
    poll_fn(|context| Poll::Ready(timer.as_mut().poll(context).is_ready())).await;
    driven.starts = false;
    loop {
        let next = match driven.engine.upgrade() {
            // An error fails the connections, whose tasks hear of it.
            Some(engine) => engine.process_events().unwrap_or(None),
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
