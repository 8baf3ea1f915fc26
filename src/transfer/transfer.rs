//! A transfer in flight, and the ways to wait for it.

use std::fmt;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll};
use std::time::Duration;

use super::error::{Error, Result};
use super::job::JobId;
use super::pair::Pair;
use crate::verbs::Opcode;

/// The result of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transferred {
    /// Length of the transfer in bytes.
    pub bytes: u64,
    /// Immediate data of the last message received; `None` for other operations than receives.
    pub imm: Option<u32>,
}

/// A transfer in flight. [`wait`](Self::wait) for it, `await` it, or [`try_wait`](Self::try_wait) from an event loop.
///
/// Any number may be in flight on a connection. They are posted and complete in the order in which they were started,
/// and can be waited for in any order, from any thread. A transfer holds handles of its memory and of its connection,
/// so it can be stored, moved to another thread, or spawned as a task.
///
/// **Dropping a transfer detaches it**: it goes on, and its memory stays until the device is done. To end it,
/// [`cancel`](Self::cancel) it. A receive that is dropped before its first message stays posted for the next receive
/// into the same memory; see [`Receiver::recv`](super::Receiver::recv).
///
/// With the feature `tokio`, an awaited transfer makes progress by itself in a tokio runtime with I/O driver and timer
/// (`enable_all`). Elsewhere a `Future` makes no progress by itself. A task calls
/// [`Connection::process_events`](super::Connection::process_events) when the connection's descriptor is readable, and
/// when the next timeout expires; or a thread waits for a transfer of the same connection.
#[must_use = "a transfer that is dropped goes on, and its errors are lost: wait for it"]
pub struct Transfer {
    pair: Arc<Pair>,
    /// The connection's other queue pair, which lives as long.
    _twin: Option<Arc<Pair>>,
    id: JobId,
    opcode: Opcode,
    /// Length in bytes.
    length: u64,
    /// How it ended; a later call returns the same. Locked by the thread that waits.
    end: Mutex<Option<End>>,
}

#[derive(Clone, Copy)]
enum End {
    Complete(Transferred),
    Cancelled { done: u64, usable: bool },
    TimedOut { done: u64, timeout: Duration, usable: bool },
    Failed { done: u64 },
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { opcode, length, .. } = self;
        f.debug_struct("Transfer").field("opcode", opcode).field("length", length).finish_non_exhaustive()
    }
}

impl Transfer {
    pub(super) fn new(
        pair: Arc<Pair>,
        twin: Option<Arc<Pair>>,
        id: JobId,
        opcode: Opcode,
        length: u64,
    ) -> Self {
        Self { pair, _twin: twin, id, opcode, length, end: Mutex::new(None) }
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // a notification alone has 0 bytes
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Limits the time for the whole transfer, from now. Without it only
    /// [`ConnectionOptions::stall_timeout`](super::ConnectionOptions::stall_timeout) limits it, and nothing limits the
    /// wait for the first message of a receive.
    ///
    /// A transfer that times out before any of it is posted leaves the connection usable, and so does a receive
    /// before its first message: that one stays posted and can be waited for again. Otherwise the rest is flushed,
    /// and the connection is unusable.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.pair.set_timeout(self.id, timeout);
        self
    }

    /// Waits until the transfer completes. It sleeps, unless
    /// [`ConnectionOptions::busy_poll`](super::ConnectionOptions::busy_poll) is set. A transfer succeeds
    /// once all its messages have completed. A later timeout, cancel or disconnect does not change that.
    ///
    /// # Errors
    /// - [`Error::Failed`]: a message completed with an error.
    /// - [`Error::Timeout`]: the timeout or the stall timeout expired.
    /// - [`Error::PeerDisconnected`]: the peer disconnected; only on a connection by IP address.
    /// - [`Error::UnexpectedMessage`]: the peer sent a message of another length.
    /// - [`Error::Cancelled`]: the transfer was cancelled.
    /// - [`Error::Unusable`]: the connection failed, in another transfer or before.
    /// - [`Error::Verbs`]: the device failed, or the provider refused a work request.
    ///
    /// The connection is unusable afterwards, except after [`Error::Cancelled`] and [`Error::Timeout`] with `usable`.
    pub fn wait(&self) -> Result<Transferred> {
        self.wait_with_progress(|_| ())
    }

    /// Like [`wait`](Self::wait), and calls `report` with the number of bytes transferred so far, after each change.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_with_progress(&self, report: impl FnMut(u64)) -> Result<Transferred> {
        let mut end = self.end();
        match *end {
            Some(end) => self.again(end),
            None => self.ended(&mut end, self.pair.wait(self.id, report)),
        }
    }

    /// Like [`wait`](Self::wait), for at most `limit`; `None` if the transfer is in flight then, and goes on. It also
    /// returns `None` when the thread was woken without an end, such as by a signal handler: call it again.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_for(&self, limit: Duration) -> Result<Option<Transferred>> {
        let Some(mut end) = self.try_end() else {
            // Another thread waits for the same transfer, and may do so without a limit.
            std::thread::sleep(limit.min(Duration::from_millis(10)));
            return Ok(None);
        };
        if let Some(end) = *end {
            return self.again(end).map(Some);
        }
        let result = self.pair.wait_for(self.id, limit).transpose();
        result.map(|result| self.ended(&mut end, result)).transpose()
    }

    /// The result if the transfer has ended; `None` while it is in flight. The connection's descriptor becomes
    /// readable as soon as more progress is possible: call `try_wait` again then, and from time to time for the
    /// timeouts.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn try_wait(&self) -> Result<Option<Transferred>> {
        let Some(mut end) = self.try_end() else { return Ok(None) };
        if let Some(end) = *end {
            return self.again(end).map(Some);
        }
        let result = self.pair.try_wait(self.id).transpose();
        result.map(|result| self.ended(&mut end, result)).transpose()
    }

    /// Number of bytes in messages that have completed. It grows by work request chains, of which only the last message
    /// is signaled.
    pub fn progress(&self) -> u64 {
        if let Some(done) = self.pair.done(self.id) {
            return done;
        }
        match *self.end() {
            None => 0,
            Some(End::Complete(Transferred { bytes, .. })) => bytes,
            Some(End::Cancelled { done, .. } | End::TimedOut { done, .. } | End::Failed { done }) => done,
        }
    }

    /// Cancels the transfer. No further message is posted, and those in flight complete. If these are all of them,
    /// the transfer succeeds; else it ends with [`Error::Cancelled`], which says how much was transferred, and the
    /// connection stays usable.
    ///
    /// A receive cannot complete without its peer. Before its first message it stays posted, and the connection
    /// usable. Later it is flushed, and the connection is unusable.
    pub fn cancel(&self) {
        self.pair.cancel(self.id);
    }

    /// A function that [cancels](Self::cancel) the transfer from elsewhere, for a transfer that is awaited. After the
    /// transfer has ended it does nothing.
    pub fn canceller(&self) -> impl Fn() + Clone + Send + Sync + use<> {
        let (pair, id) = (Arc::downgrade(&self.pair), self.id);
        move || {
            if let Some(pair) = pair.upgrade() {
                pair.cancel(id);
            }
        }
    }

    fn end(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while another thread waits for the transfer.
    fn try_end(&self) -> Option<MutexGuard<'_, Option<End>>> {
        match self.end.try_lock() {
            Ok(end) => Some(end),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Keeps how the transfer ended. A receive that stays posted has not, nor one whose wait failed.
    fn ended(&self, end: &mut Option<End>, result: Result<Transferred>) -> Result<Transferred> {
        *end = match &result {
            Ok(transferred) => Some(End::Complete(*transferred)),
            Err(_) if self.pair.is_held(self.id) => None,
            Err(Error::Cancelled { done, usable, .. }) => {
                Some(End::Cancelled { done: *done, usable: *usable })
            }
            Err(Error::Timeout { done, timeout, usable, .. }) => {
                Some(End::TimedOut { done: *done, timeout: *timeout, usable: *usable })
            }
            Err(
                Error::Failed { done, .. }
                | Error::Unusable { done, .. }
                | Error::PeerDisconnected { done, .. },
            ) => Some(End::Failed { done: *done }),
            Err(Error::UnexpectedMessage { offset, .. }) => Some(End::Failed { done: *offset }),
            Err(_) => Some(End::Failed { done: 0 }),
        };
        result
    }

    fn again(&self, end: End) -> Result<Transferred> {
        let (opcode, length) = (self.opcode, self.length);
        match end {
            End::Complete(transferred) => Ok(transferred),
            End::Cancelled { done, usable } => Err(Error::Cancelled { opcode, done, length, usable }),
            End::TimedOut { done, timeout, usable } => {
                Err(Error::Timeout { opcode, done, length, timeout, hint: String::new(), usable })
            }
            End::Failed { done } => {
                let reason = self.pair.failure().unwrap_or("the transfer has failed").to_owned();
                Err(Error::Unusable { reason, done })
            }
        }
    }
}

impl Future for Transfer {
    type Output = Result<Transferred>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut &*self).poll(context)
    }
}

/// As a transfer, which others hold too. The last task that polls it is woken.
impl Future for &Transfer {
    type Output = Result<Transferred>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(mut end) = self.try_end() else {
            // Another thread waits for it.
            self.pair.set_waker(self.id, context);
            return Poll::Pending;
        };
        if let Some(end) = *end {
            return Poll::Ready(self.again(end));
        }
        self.pair.poll(self.id, context).map(|result| self.ended(&mut end, result))
    }
}

impl AsFd for Transfer {
    /// The connection's descriptor: readable when [`try_wait`](Self::try_wait) can make progress.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pair.engine().events.as_fd()
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        // Without the lock, which a thread may have held at a `fork`.
        if self.end.get_mut().unwrap_or_else(PoisonError::into_inner).is_none() {
            self.pair.detach(self.id);
        }
    }
}
