//! A transfer in flight, and the ways to wait for it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::ConnectionOptions;
use super::error::{Error, Result};
use super::work_queue::WorkQueue;
use crate::verbs::Opcode;

/// Time without a completion after which the transfer asks the connection manager whether the peer disconnected.
const QUIET: Duration = Duration::from_millis(40);

/// The result of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transferred {
    /// Length of the transfer in bytes.
    pub bytes: u64,
    /// Immediate data of the last message received; `None` for other operations than receives.
    pub imm: Option<u32>,
}

/// A transfer in flight. [`wait`](Self::wait) for it, or [`poll`](Self::poll) it from an event loop.
///
/// Dropping a transfer with messages in flight flushes them, and the connection is unusable afterwards. The
/// device does not access the memory once drop returns. Only a receive that ended with
/// [`Error::Timeout`] or [`Error::Cancelled`] with `usable` stays posted.
#[must_use = "a transfer does nothing unless it is waited for or polled"]
pub struct Transfer<'t> {
    queue: &'t mut WorkQueue,
    opcode: Opcode,
    /// Length of the request in bytes.
    length: u64,
    busy_poll: bool,
    stall_timeout: Duration,
    /// The timeout, and when it expires.
    timeout: Option<(Duration, Instant)>,
    cancel: Option<&'t AtomicBool>,
    cancelled: bool,
    progress: Option<&'t mut (dyn FnMut(u64) + Send)>,
    /// How the transfer ended; a later call returns the same.
    end: Option<End>,
    /// Bytes that were transferred at the last check, and since when.
    last_progress: Option<(u64, Instant)>,
}

#[derive(Clone, Copy)]
enum End {
    Complete,
    Cancelled { usable: bool },
    TimedOut { timeout: Duration, usable: bool },
    Failed,
}

impl std::fmt::Debug for Transfer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (done, length) = (self.queue.done, self.length);
        f.debug_struct("Transfer").field("done", &done).field("length", &length).finish_non_exhaustive()
    }
}

impl<'t> Transfer<'t> {
    /// The transfer that the queue admitted last.
    pub(super) fn new(queue: &'t mut WorkQueue, options: &ConnectionOptions) -> Self {
        let length = queue.job.as_ref().map_or(0, |job| job.length);
        Self {
            opcode: queue.opcode(),
            queue,
            length,
            busy_poll: options.busy_poll,
            stall_timeout: options.stall_timeout,
            timeout: None,
            cancel: None,
            cancelled: false,
            progress: None,
            end: None,
            last_progress: None,
        }
    }

    /// Limits the time for the whole transfer, from now. Without it only
    /// [`ConnectionOptions::stall_timeout`](super::ConnectionOptions::stall_timeout) limits it, and nothing limits the
    /// wait for the first message of a receive.
    ///
    /// A receive that times out before its first message stays posted, and the connection usable; see
    /// [`Receiver::start`](super::Receiver::start).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Instant::now().checked_add(timeout).map(|end| (timeout, end));
        self
    }

    /// Cancels the transfer once `token` is true. No further message is posted, and those in flight complete. If these
    /// are all of them, the transfer succeeds.
    ///
    /// A receive cannot complete without its peer. Before its first message it stays posted, and the connection
    /// usable; see [`Receiver::start`](super::Receiver::start). Later it is flushed, and the connection is unusable.
    ///
    /// [`wait`](Self::wait) reads the token at least every 50 ms, [`poll`](Self::poll) at each call.
    pub fn cancel(mut self, token: &'t AtomicBool) -> Self {
        self.cancel = Some(token);
        self
    }

    /// Calls `report` with the number of bytes transferred so far, after each change.
    pub fn progress(mut self, report: &'t mut (dyn FnMut(u64) + Send)) -> Self {
        self.progress = Some(report);
        self
    }

    /// Waits until the transfer completes. It sleeps, unless
    /// [`ConnectionOptions::busy_poll`](super::ConnectionOptions::busy_poll) is set. A transfer whose messages have all
    /// completed succeeds, whatever timeout has expired, token was set or peer has disconnected since.
    ///
    /// # Errors
    /// - [`Error::Failed`]: a message completed with an error.
    /// - [`Error::Timeout`]: the timeout or the stall timeout expired.
    /// - [`Error::PeerDisconnected`]: the peer disconnected; only on a connection by IP address.
    /// - [`Error::UnexpectedMessage`]: the peer sent a message of another length.
    /// - [`Error::Cancelled`]: the token was set.
    /// - [`Error::Unusable`]: the connection failed earlier, or in its other direction.
    /// - [`Error::Verbs`]: the device failed, or the provider refused a work request.
    ///
    /// The connection is unusable afterwards, except after [`Error::Cancelled`] and [`Error::Timeout`] with `usable`.
    pub fn wait(mut self) -> Result<Transferred> {
        let mut spins = 0_u32;
        loop {
            if self.step()? {
                return Ok(self.finish());
            }
            if self.busy_poll {
                spins = spins.wrapping_add(1);
                if spins.is_multiple_of(256) && self.check_time()?.is_none() {
                    return Ok(self.finish());
                }
                continue;
            }
            self.queue.completions.arm()?;
            if self.step()? {
                return Ok(self.finish());
            }
            let Some(left) = self.check_time()? else { return Ok(self.finish()) };
            self.queue.completions.sleep_armed(left)?;
        }
    }

    /// Makes progress without waiting. When it returns `Pending`, the transfer's descriptor ([`AsFd`]) becomes
    /// readable as soon as more progress is possible: call `poll` again then. Also call it from time to time for the
    /// timeouts and the cancel token.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn poll(&mut self) -> Result<Poll<Transferred>> {
        if self.step()? {
            return Ok(Poll::Ready(self.finish()));
        }
        // Consume the event that may have caused this call, then arm the queue for the next one.
        self.queue.completions.sleep_armed(Duration::ZERO)?;
        self.queue.completions.arm()?;
        if self.step()? {
            return Ok(Poll::Ready(self.finish()));
        }
        match self.check_time()? {
            Some(_) => Ok(Poll::Pending),
            None => Ok(Poll::Ready(self.finish())),
        }
    }

    /// Posts and polls until neither makes progress. Returns whether the transfer is complete.
    fn step(&mut self) -> Result<bool> {
        match self.end {
            None => {}
            Some(End::Complete) => return Ok(true),
            Some(End::Cancelled { usable }) => return Err(self.cancelled_error(usable)),
            Some(End::TimedOut { timeout, usable }) => return Err(self.timeout_error(timeout, usable)),
            Some(End::Failed) => return self.queue.shared.check_usable(self.queue.done).map(|()| true),
        }
        loop {
            // Read before the completions, so that those of before the failure count.
            let failed = self.queue.shared.is_failed();
            self.post()?;
            match self.queue.poll() {
                // Of the other direction, which no completion here need tell of.
                Ok(0) if failed => return self.fail_as_the_connection(),
                Ok(0) => return Ok(false),
                Ok(_) => {
                    if let Some(report) = &mut self.progress {
                        report(self.queue.done);
                    }
                    if self.queue.is_complete() {
                        return Ok(true);
                    }
                    if self.cancelled && self.queue.is_idle() {
                        return Err(self.cancelled_error(true));
                    }
                    // While completions keep coming, nothing else reads the token.
                    if self.check_token()? {
                        return Ok(true);
                    }
                }
                Err(error) => return self.fail(error),
            }
        }
    }

    /// Posts as many messages as the window permits.
    pub(super) fn post(&mut self) -> Result<()> {
        if self.queue.shared.is_failed() {
            return Ok(());
        }
        self.queue.post().or_else(|error| self.fail(error).map(drop))
    }

    /// Cancels the transfer if the token is set. Returns whether it is complete nevertheless.
    fn check_token(&mut self) -> Result<bool> {
        if self.cancelled || !self.cancel.is_some_and(|token| token.load(Ordering::Relaxed)) {
            return Ok(false);
        }
        self.cancelled = true;
        if self.opcode == Opcode::Recv && !self.queue.is_idle() {
            if self.queue.is_untouched() {
                self.queue.parked = true;
                return Err(self.cancelled_error(true));
            }
            // Only the error state flushes a posted receive.
            if self.flush(|| "a receive was cancelled".into()) {
                return Ok(true);
            }
            return Err(self.cancelled_error(false));
        }
        if let Some(job) = &mut self.queue.job {
            job.stop();
        }
        if self.queue.is_idle() { Err(self.cancelled_error(true)) } else { Ok(false) }
    }

    /// Checks the token and the timeouts. Returns the time until the next check is due; `None` if the transfer is
    /// complete.
    fn check_time(&mut self) -> Result<Option<Duration>> {
        if self.check_token()? {
            return Ok(None);
        }
        let (now, done) = (Instant::now(), self.queue.done);
        let since = match self.last_progress {
            Some((before, since)) if before == done => since,
            _ => {
                self.last_progress = Some((done, now));
                now
            }
        };
        let (opcode, length) = (self.opcode, self.length);
        if now.duration_since(since) >= QUIET && self.queue.shared.peer_disconnected() {
            // The last message may have come just before.
            if self.flush(|| "the peer disconnected".into()) {
                return Ok(None);
            }
            self.end(End::Failed);
            return Err(Error::PeerDisconnected { opcode, done: self.queue.done, length });
        }
        // Nothing is overdue while the peer has not begun to send.
        let waiting = opcode == Opcode::Recv && self.queue.is_untouched();
        let stalled = since.checked_add(self.stall_timeout).filter(|_| !waiting);
        let stalled = stalled.map(|end| (self.stall_timeout, end));
        let mut left = Duration::MAX;
        for (timeout, end) in [stalled, self.timeout].into_iter().flatten() {
            match end.checked_duration_since(now).filter(|rest| !rest.is_zero()) {
                Some(rest) => left = left.min(rest),
                None => return self.time_out(timeout).map(|()| None),
            }
        }
        Ok(Some(left))
    }

    /// Ends the transfer because a timeout expired. Returns if it is complete nevertheless.
    fn time_out(&mut self, timeout: Duration) -> Result<()> {
        // What completed meanwhile counts.
        if self.step()? {
            return Ok(());
        }
        let opcode = self.opcode;
        let usable = opcode == Opcode::Recv && self.queue.is_untouched();
        self.queue.parked = usable;
        if !usable && self.flush(|| format!("{opcode:?} timed out after {timeout:?}")) {
            return Ok(());
        }
        match self.cancelled {
            true => Err(self.cancelled_error(usable)),
            false => Err(self.timeout_error(timeout, usable)),
        }
    }

    fn cancelled_error(&mut self, usable: bool) -> Error {
        self.end(End::Cancelled { usable });
        Error::Cancelled { opcode: self.opcode, done: self.queue.done, length: self.length, usable }
    }

    fn timeout_error(&mut self, timeout: Duration, usable: bool) -> Error {
        self.end(End::TimedOut { timeout, usable });
        let hint = self.queue.shared.hint(None);
        Error::Timeout {
            opcode: self.opcode,
            done: self.queue.done,
            length: self.length,
            timeout,
            hint,
            usable,
        }
    }

    /// Ends the connection because of this transfer's error.
    fn fail(&mut self, error: Error) -> Result<bool> {
        if self.flush(|| error.to_string()) {
            return Ok(true);
        }
        self.end(End::Failed);
        Err(error)
    }

    /// Ends the transfer because the connection has failed.
    fn fail_as_the_connection(&mut self) -> Result<bool> {
        if self.flush(String::new) {
            return Ok(true);
        }
        self.end(End::Failed);
        self.queue.shared.check_usable(self.queue.done).map(|()| true)
    }

    /// Ends the connection, and waits for what is in flight. Returns whether the transfer is complete nevertheless.
    fn flush(&mut self, reason: impl FnOnce() -> String) -> bool {
        self.queue.abandon(reason);
        self.queue.is_complete()
    }

    fn finish(&mut self) -> Transferred {
        self.end(End::Complete);
        Transferred { bytes: self.length, imm: self.queue.imm }
    }

    /// Releases the memory's handles unless a receive stays posted: nothing is in flight.
    fn end(&mut self, end: End) {
        self.end = Some(end);
        if !self.queue.parked {
            self.queue.job = None;
        }
    }
}

impl AsFd for Transfer<'_> {
    /// The completion channel: readable when [`poll`](Self::poll) can make progress.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.completions.channel().expect("a connection creates its completion queues")
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        if self.queue.parked {
            return;
        }
        if !self.queue.is_idle() {
            self.queue.abandon(|| "a transfer in flight was dropped".into());
        }
        self.queue.job = None;
    }
}
