//! The task that makes progress for the futures of an engine in a tokio runtime.
//!
//! It sleeps until the engine's descriptor is readable or the next timeout expires, and ends with the engine.
//!
//! `unsafe` is here to register a descriptor with tokio.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::Poll;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};

use super::engine::Engine;

const NO_DRIVER: &str = "the tokio runtime has no I/O driver or no timer: build it with enable_all";

/// Starts the task if there is none, and the caller is in a runtime.
pub(super) fn ensure(engine: &Arc<Engine>) {
    // A child of `fork` must not touch its parent's queues.
    if engine.driven.load(Ordering::Relaxed) || engine.check_own().is_err() {
        return;
    }
    if let Ok(runtime) = Handle::try_current()
        && !engine.driven.swap(true, Ordering::Relaxed)
    {
        runtime.spawn(drive(Driven { engine: Arc::downgrade(engine), starts: true }));
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
    /// Whether the runtime may turn out to lack a driver.
    starts: bool,
}

impl Drop for Driven {
    /// The runtime has shut down, perhaps because another task has panicked; or tokio has.
    fn drop(&mut self) {
        let Some(engine) = self.engine.upgrade() else { return };
        engine.driven.store(false, Ordering::Relaxed);
        if self.starts && std::thread::panicking() {
            engine.fail(NO_DRIVER);
        }
        // Tasks of another runtime start it again.
        engine.wake_all();
    }
}

async fn drive(mut driven: Driven) {
    let Some(engine) = driven.engine.upgrade() else { return };
    let gone = engine.gone.clone();
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
            () = gone.notified() => return,
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
