//! Seconds of Python, and waits that signal handlers can end.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::error::{Failed, Result};

/// After this time a wait lets Python run its signal handlers. The thread that sleeps on the device's events is woken by
/// the signal itself; one that waits for that thread is not.
const SLICE: Duration = Duration::from_millis(250);

/// Seconds, as a `float`.
pub fn duration(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| Failed::misuse(format!("{seconds} s is not a time: it must be finite and not negative")))
}

/// When a wait ends. `None` stands for no limit, also for a time that the clock cannot count to.
pub fn end_of(timeout: Option<f64>) -> Result<Option<Instant>> {
    let limit = timeout.map(duration).transpose()?;
    Ok(limit.and_then(|limit| Instant::now().checked_add(limit)))
}

/// Calls `step` without the GIL, for a limited time each, until it has a result. Returns `None` when the time is up.
/// Python's signal handlers run in between, and may end it with an exception.
pub fn until<T: Send>(
    py: Python<'_>,
    end: Option<Instant>,
    mut step: impl FnMut(Duration) -> Result<Option<T>> + Send,
) -> Result<Option<T>> {
    loop {
        let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
        if let Some(value) = py.detach(|| step(left.min(SLICE)))? {
            return Ok(Some(value));
        }
        py.check_signals()?;
        if left.is_zero() {
            return Ok(None);
        }
    }
}

/// Calls a function that blocks for a while, on a thread of its own: an exception of a signal handler ends the wait for
/// it, and the function then ends by its own timeout.
pub fn interruptible<T: Send + 'static>(
    py: Python<'_>,
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("dmabuf_rdma connects".into())
        // The receiver may be gone.
        .spawn(move || drop(sender.send(call())))
        .map_err(|error| Failed::Python(error.into()))?;
    let receiver = std::sync::Mutex::new(receiver);
    loop {
        let answer = py.detach(|| {
            receiver.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv_timeout(SLICE)
        });
        match answer {
            Ok(result) => return result,
            Err(mpsc::RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Failed::misuse("the thread that connects has panicked"));
            }
        }
    }
}
