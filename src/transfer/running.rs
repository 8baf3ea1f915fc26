//! A request under way, and the ways to wait for it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::lane::Lane;
use super::request::Job;
use super::{ConnectionOptions, Request, Wait};
use crate::Result;
use crate::error::TransferError;

/// Without a byte for so long, somebody asks whether the peer is still there.
const QUIET: Duration = Duration::from_millis(40);

/// What a transfer moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Moved {
    /// Bytes, all that were asked for.
    pub bytes: u64,
    /// The number that came with the last message received.
    pub imm: Option<u32>,
}

/// A request under way. [`wait`](Self::wait) for it, or [`advance`](Self::advance) it from an event loop.
///
/// Dropping one that has not ended stops its connection, which is unusable then: nothing reaches the
/// memory afterwards.
#[must_use = "a transfer does nothing unless it is waited for or advanced"]
pub struct Transfer<'t> {
    lane: &'t mut Lane,
    request: Request<'t>,
    job: Job,
    /// Bytes that were asked for; the job has fewer once it is cancelled.
    length: u64,
    wait: Wait,
    stall: Duration,
    limit: Option<(Duration, Instant)>,
    cancel: Option<&'t AtomicBool>,
    cancelled: bool,
    progress: Option<&'t mut (dyn FnMut(u64) + Send)>,
    ended: bool,
    /// When bytes moved last; not looked at before something has to be waited for.
    moved: Option<(u64, Instant)>,
}

impl std::fmt::Debug for Transfer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (done, length) = (self.lane.done, self.length);
        f.debug_struct("Transfer").field("done", &done).field("length", &length).finish_non_exhaustive()
    }
}

impl<'t> Transfer<'t> {
    /// Of a request that [`Lane::admit`] permits, and what of it is posted.
    #[inline(always)]
    pub(super) fn new(
        lane: &'t mut Lane,
        request: Request<'t>,
        job: Job,
        options: &ConnectionOptions,
    ) -> Self {
        let length = job.length;
        Self {
            lane,
            request,
            job,
            length,
            wait: options.wait,
            stall: options.stall,
            limit: None,
            cancel: None,
            cancelled: false,
            progress: None,
            ended: false,
            moved: None,
        }
    }

    /// Longest time for all of it, from now on. Without one, only a transfer that stands still ends
    /// ([`ConnectionOptions::stall`](super::ConnectionOptions::stall)).
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Instant::now().checked_add(limit).map(|end| (limit, end));
        self
    }

    /// Looks at this now and then, and posts nothing more once it is set.
    pub fn cancel(mut self, token: &'t AtomicBool) -> Self {
        self.cancel = Some(token);
        self
    }

    /// Is told the bytes that are known to have moved, whenever there are more.
    pub fn progress(mut self, report: &'t mut (dyn FnMut(u64) + Send)) -> Self {
        self.progress = Some(report);
        self
    }

    /// Waits for its end, in the way that the connection's options say.
    ///
    /// # Errors
    /// - [`TransferError::Failed`]: a message did; the connection is unusable.
    /// - [`TransferError::TimeLimit`]: the limit is over, or nothing moved for longer than the options
    ///   allow; the connection is unusable.
    /// - [`TransferError::Cancelled`].
    /// - [`TransferError::UnexpectedMessage`]: the peer sends other lengths; the connection is unusable.
    pub fn wait(mut self) -> Result<Moved> {
        self.run()
    }

    /// As [`wait`](Self::wait), of one that stays where it was made.
    pub(super) fn run(&mut self) -> Result<Moved> {
        let mut spins = 0_u32;
        loop {
            if self.step()? {
                return Ok(self.finish());
            }
            match self.wait {
                Wait::Busy => {
                    spins = spins.wrapping_add(1);
                    if spins.is_multiple_of(256) {
                        self.check_time()?;
                    }
                }
                Wait::Sleep => {
                    self.lane.queue.arm()?;
                    if self.step()? {
                        return Ok(self.finish());
                    }
                    let left = self.check_time()?;
                    self.lane.queue.sleep_armed(left)?;
                }
            }
        }
    }

    /// Does what can be done without waiting. When it is pending, the descriptor becomes readable as
    /// soon as there is more to do; call it then, and now and then for the time limit and the token.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn advance(&mut self) -> Result<Poll<Moved>> {
        if self.step()? {
            return Ok(Poll::Ready(self.finish()));
        }
        // Takes the event that it may have been woken by, then asks for the next.
        self.lane.queue.sleep_armed(Duration::ZERO)?;
        self.lane.queue.arm()?;
        if self.step()? {
            return Ok(Poll::Ready(self.finish()));
        }
        self.check_time()?;
        Ok(Poll::Pending)
    }

    /// Posts and reaps until neither does anything; whether all has ended.
    #[inline]
    fn step(&mut self) -> Result<bool> {
        if self.ended {
            // Asked again: what was said before still holds.
            return match self.cancelled {
                true => Err(self.was_cancelled(self.lane.shared.failed.get().is_none())),
                false => self.lane.shared.check_usable().map(|()| true),
            };
        }
        loop {
            self.post()?;
            match self.lane.reap(&self.request) {
                Ok(0) => return Ok(false),
                Ok(_) => {
                    if let Some(report) = &mut self.progress {
                        report(self.lane.done);
                    }
                    if self.job.is_posted() && self.lane.is_idle() {
                        return if self.cancelled { Err(self.was_cancelled(true)) } else { Ok(true) };
                    }
                    // With completions coming without end, nobody would look at the token.
                    self.check_token()?;
                }
                Err(error) => return Err(self.abandon(error)),
            }
        }
    }

    /// Posts what there is room for.
    pub(super) fn post(&mut self) -> Result<()> {
        self.lane.post(&self.request, &mut self.job).map_err(|error| self.abandon(error))
    }

    fn check_token(&mut self) -> Result<()> {
        if self.cancelled || !self.cancel.is_some_and(|token| token.load(Ordering::Relaxed)) {
            return Ok(());
        }
        self.cancelled = true;
        if self.request.opcode() == crate::verbs::Opcode::Recv && !self.lane.is_idle() {
            // A receive cannot be taken back but by stopping the queue pair.
            self.lane.abandon(&|| "a receive was cancelled".into());
            return Err(self.was_cancelled(false));
        }
        self.job.cut_short();
        if self.lane.is_idle() { Err(self.was_cancelled(true)) } else { Ok(()) }
    }

    /// Whether there is time left; how much until somebody has to look again.
    fn check_time(&mut self) -> Result<Duration> {
        self.check_token()?;
        let (now, done) = (Instant::now(), self.lane.done);
        let since = match self.moved {
            Some((before, since)) if before == done => since,
            _ => {
                self.moved = Some((done, now));
                now
            }
        };
        if now.duration_since(since) >= QUIET && self.lane.shared.peer_left() {
            let opcode = self.request.opcode();
            self.lane.abandon(&|| "the peer disconnected".into());
            self.ended = true;
            let (done, length) = (self.lane.done, self.length);
            return Err(TransferError::PeerLeft { opcode, done, length }.into());
        }
        let stalled = since.checked_add(self.stall).map(|end| (self.stall, end));
        let mut left = Duration::MAX;
        for (limit, end) in [stalled, self.limit].into_iter().flatten() {
            match end.checked_duration_since(now).filter(|rest| !rest.is_zero()) {
                Some(rest) => left = left.min(rest),
                None => {
                    let opcode = self.request.opcode();
                    self.lane.abandon(&|| format!("{opcode:?} did not end within {limit:?}"));
                    self.ended = true;
                    if self.cancelled {
                        return Err(self.was_cancelled(false));
                    }
                    let (done, length) = (self.lane.done, self.length);
                    return Err(TransferError::TimeLimit { opcode, done, length, limit }.into());
                }
            }
        }
        Ok(left)
    }

    fn was_cancelled(&mut self, usable: bool) -> crate::Error {
        self.ended = true;
        let (opcode, done, length) = (self.request.opcode(), self.lane.done, self.length);
        TransferError::Cancelled { opcode, done, length, usable }.into()
    }

    #[cold]
    pub(super) fn abandon(&mut self, error: crate::Error) -> crate::Error {
        self.ended = true;
        let done = self.lane.done;
        self.lane.abandon(&|| error.to_string());
        // What the flush reports as ended well came after the failure was noticed; the error keeps what
        // was known.
        self.lane.done = done;
        error
    }

    fn finish(&mut self) -> Moved {
        self.ended = true;
        Moved { bytes: self.length, imm: self.lane.imm }
    }
}

impl AsFd for Transfer<'_> {
    /// The completion channel: readable when there is something to [`advance`](Self::advance).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lane.queue.channel().expect("a connection's queues are its own")
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        if !self.lane.is_idle() {
            self.lane.abandon(&|| "a transfer was dropped while it was under way".into());
        }
    }
}
