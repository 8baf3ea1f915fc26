//! A queue pair of an engine, and the jobs that its connection starts.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::engine::{Engine, MAX_BATCHES};
use super::error::{Error, Result};
use super::events::Source;
use super::job::{Ending, Job, JobId, Owner};
use super::queues::Queues;
use super::request::Request;
use super::shared::{Link, NOT_CONNECTED, Shared};
use super::state::{Locked, State};
use super::work_queue::Side;
use super::{ConnectionOptions, Transferred};
use crate::verbs::Opcode;

/// Time without a completion after which whoever polls in a loop looks at the device and the connection manager.
pub(super) const QUIET: Duration = Duration::from_millis(40);

/// Removes its queue pair from the engine when the connection and all of its transfers are dropped.
pub(super) struct Pair {
    engine: Arc<Engine>,
    /// `None` while it is dropped.
    shared: Option<Arc<Shared>>,
    key: usize,
    busy_poll: bool,
    stall_timeout: Duration,
}

/// How long a job may still wait.
enum Due {
    In(Duration),
    /// Something has changed: look again.
    Now,
    /// It ends for its owner, and stays posted.
    Parked(Error),
}

impl Pair {
    /// Adds a queue pair to an engine, in whose completion queue it takes `room`.
    pub(super) fn new(
        engine: Arc<Engine>,
        shared: Shared,
        options: &ConnectionOptions,
        room: u32,
    ) -> Result<Self> {
        let shared = Arc::new(shared);
        let key = engine.add(Queues::new(shared.clone(), options, room))?;
        let ConnectionOptions { busy_poll, stall_timeout, .. } = *options;
        Ok(Self { engine, shared: Some(shared), key, busy_poll, stall_timeout })
    }

    pub(super) fn key(&self) -> usize {
        self.key
    }

    pub(super) fn busy_poll(&self) -> bool {
        self.busy_poll
    }

    /// Makes this and another queue pair fail together.
    pub(super) fn join(&self, other: &Self) {
        let mut state = self.engine.lock();
        state.pair(self.key).twin = Some(other.key);
        state.pair(other.key).twin = Some(self.key);
    }

    pub(super) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    pub(super) fn shared(&self) -> &Shared {
        self.shared.as_ref().expect("taken only while the pair is dropped")
    }

    /// Holds the connection manager's side of the connection.
    pub(super) fn set_link(&self, link: Box<dyn Link>) {
        // Never set twice: the queue pair refuses to connect a second time.
        let link = self.shared().link.get_or_init(|| link);
        let engine = &self.engine;
        if let Err(error) = engine.events.watch(link.fd(), Source::Link(self.key)) {
            // Transfers notice a disconnect later then, by their requests that fail.
            tracing::warn!(%error, "cannot watch the connection manager's events");
        }
        // An event may have come before.
        engine.check_link(&mut engine.lock(), self.key);
    }

    fn drive(&self, state: &mut State) -> bool {
        state.touch(self.key);
        self.engine.drive(state)
    }

    fn drain(&self, state: &mut State) {
        state.touch(self.key);
        self.engine.drain(state);
    }

    /// Checks a request, adds it to its queue, and posts as much as the window permits.
    pub(super) fn start(&self, request: Request, message_size: u64) -> Result<JobId> {
        self.engine.check_own()?;
        #[cfg(feature = "tokio")]
        if !self.engine.is_driven() {
            super::driver::ensure(&self.engine);
        }
        let shared = self.shared();
        let message_size = message_size.clamp(1, shared.max_message_size);
        let side = if request.operation.is_some() { Side::Send } else { Side::Recv };
        let mut state = self.engine.lock();
        if side == Side::Recv {
            match state.pair(self.key).queue(side).adopt(&request, message_size) {
                Ok(None) => {}
                // Even if the connection has failed since: the message may have come before.
                Ok(Some((key, number))) => return Ok(JobId { pair: self.key, side, key, number }),
                Err(length) => {
                    shared.check_usable(Opcode::Recv, request.len())?;
                    return Err(Error::ReceivePosted { length });
                }
            }
        }
        shared.check_usable(request.opcode(), request.len())?;
        shared.pair.check_depth(request.opcode())?;
        request.check(&shared.domain, message_size, shared.options.max_sge)?;
        if side == Side::Send && !shared.is_ready() {
            if let Some(reason) = self.why_unusable(&mut state) {
                shared.check_usable(request.opcode(), request.len())?;
                return Err(Error::Unusable { reason: reason.into(), done: 0 });
            }
            shared.check_port()?;
        }
        let (key, number) = state.pair(self.key).queue(side).push(request, message_size);
        let id = JobId { pair: self.key, side, key, number };
        if let Err(error) = state.pair(self.key).queue(side).post(shared) {
            shared.fail(|| error.to_string());
            drop(state.abandon(id));
            self.drain(&mut state);
            return Err(error);
        }
        if self.engine.is_driven() {
            self.engine.schedule(&mut state, Instant::now().checked_add(self.stall_timeout));
        }
        Ok(id)
    }

    /// Waits for a job. Calls `report` with the bytes transferred, after each change.
    pub(super) fn wait(&self, id: JobId, report: impl FnMut(u64)) -> Result<Transferred> {
        let ended = self.wait_until(id, None, report)?;
        Ok(ended.expect("without a limit it waits for the end"))
    }

    /// Waits for a job at most so long; `None` also if the thread was woken for another reason, such as a signal.
    pub(super) fn wait_for(&self, id: JobId, limit: Duration) -> Result<Option<Transferred>> {
        // Without an end if the clock cannot count so far; then only another reason ends the wait early.
        self.wait_until(id, Some(Instant::now().checked_add(limit)), |_| ())
    }

    /// Waits for a job: with a limit until that time, or until the thread is woken in vain.
    fn wait_until(
        &self,
        id: JobId,
        limit: Option<Option<Instant>>,
        mut report: impl FnMut(u64),
    ) -> Result<Option<Transferred>> {
        self.engine.check_own()?;
        let (mut reported, mut spins, mut batches, mut slept) = (0, 0_u32, 0_usize, false);
        let mut state = self.engine.lock();
        loop {
            let progress = self.drive(&mut state);
            let Job { done, over, deadline, ending, .. } = *state.job(id);
            if done != reported {
                reported = done;
                if self.engine.is_watched(&state) {
                    // Event loops and tasks must not miss what completes during the report.
                    self.engine.leave(&mut state, self.busy_poll)?;
                }
                drop(state);
                report(done);
                state = self.engine.lock();
                if !over {
                    // Another thread may have ended it meanwhile.
                    continue;
                }
            }
            if over {
                return self.take(state, id).map(Some);
            }
            if state.has_released() {
                drop(state);
                state = self.engine.lock();
                continue;
            }
            if progress && deadline.is_none() && ending.is_none() {
                batches = batches.wrapping_add(1);
                if !batches.is_multiple_of(MAX_BATCHES) {
                    continue;
                }
                // The progress of other connections hides neither a stall nor a disconnect of this one.
                self.engine.check_link(&mut state, self.key);
            }
            if self.busy_poll {
                spins = spins.wrapping_add(1);
                if !spins.is_multiple_of(256) {
                    drop(state);
                    std::hint::spin_loop();
                    state = self.engine.lock();
                    continue;
                }
            }
            let mut left = match self.due(&mut state, id) {
                Due::In(left) => left,
                Due::Now => continue,
                Due::Parked(error) => {
                    self.engine.leave(&mut state, self.busy_poll)?;
                    return Err(error);
                }
            };
            if let Some(limit) = limit {
                let rest = limit.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
                if rest.is_zero() || (slept && !progress) {
                    self.engine.leave(&mut state, self.busy_poll)?;
                    return Ok(None);
                }
                left = left.min(rest);
            }
            if !self.busy_poll && !progress {
                state = self.engine.sleep(state, left)?;
                slept = true;
            }
        }
    }

    /// Takes the outcome of a job that has ended.
    fn take(&self, mut state: Locked<'_>, id: JobId) -> Result<Transferred> {
        let outcome = state.job(id).outcome.take();
        let job = state.abandon(id);
        // An error fails the connection, and the outcome says more.
        let _ = self.engine.leave(&mut state, self.busy_poll);
        drop(state);
        // Unlocked, since it may deregister memory.
        drop(job);
        match outcome {
            Some(outcome) => outcome.map_err(|error| *error),
            None => Err(Error::Unusable { reason: "the transfer has ended".into(), done: 0 }),
        }
    }

    /// The outcome of a job if it has ended. If not, the descriptor becomes readable when it may have.
    pub(super) fn try_wait(&self, id: JobId) -> Result<Option<Transferred>> {
        self.engine.check_own()?;
        let mut state = self.engine.lock();
        self.engine.look(&mut state)?;
        self.ended(state, id, |_| ())
    }

    /// The outcome of a job, or calls `pending` before it unlocks if the job has not ended.
    fn ended(
        &self,
        mut state: Locked<'_>,
        id: JobId,
        pending: impl FnOnce(&mut State),
    ) -> Result<Option<Transferred>> {
        loop {
            if state.job(id).over {
                return self.take(state, id).map(Some);
            }
            match self.due(&mut state, id) {
                Due::In(_) => {
                    pending(&mut state);
                    return Ok(None);
                }
                Due::Now => self.drain(&mut state),
                Due::Parked(error) => return Err(error),
            }
        }
    }

    /// Like `try_wait`, for a future.
    pub(super) fn poll(&self, id: JobId, context: &mut Context<'_>) -> Poll<Result<Transferred>> {
        #[cfg(feature = "tokio")]
        super::driver::ensure(&self.engine);
        self.engine.check_own()?;
        let mut state = self.engine.lock();
        if self.engine.is_driven() && state.armed {
            // The task of the runtime looks.
            self.drive(&mut state);
        } else {
            self.engine.look_for_future(&mut state)?;
        }
        // At once, so that no timeout expires between the look and the wait.
        let ended = self.ended(state, id, |state| state.set_waker(id, Some(context.waker().clone())));
        ended.transpose().map_or(Poll::Pending, Poll::Ready)
    }

    /// Wakes the task when the job has ended, which another thread waits for.
    pub(super) fn set_waker(&self, id: JobId, context: &mut Context<'_>) {
        if self.engine.check_own().is_err() {
            return;
        }
        let mut state = self.engine.lock();
        let changed = |job: &Job| job.over || job.ending == Some(Ending::Cancelled);
        if state.find(id).is_none_or(|job| changed(job)) {
            drop(state);
            context.waker().wake_by_ref();
        } else {
            state.set_waker(id, Some(context.waker().clone()));
        }
    }

    /// How long a job may still wait, after its timeouts and the link were looked at.
    fn due(&self, state: &mut State, id: JobId) -> Due {
        let (shared, now) = (self.shared(), Instant::now());
        let usable = !shared.is_failed();
        let waits = state.queue(id).is_untouched(id);
        if usable && id.side == Side::Recv && state.job(id).ending == Some(Ending::Cancelled) {
            if waits {
                return self.park(state, id, Duration::ZERO);
            }
            // Its first message came after the call. Only the error state flushes a posted receive.
            shared.fail(|| "a receive was cancelled".into());
            return Due::Now;
        }
        let stalled = state.queue(id).stalled_since(now);
        let quiet = stalled.is_none_or(|since| now.duration_since(since) >= QUIET);
        if self.busy_poll && quiet && usable {
            self.engine.check_device(state);
            self.engine.check_link(state, self.key);
            if shared.is_failed() || state.job(id).over {
                return Due::Now;
            }
        }
        let stalled = stalled.and_then(|since| since.checked_add(self.stall_timeout));
        let stalled = stalled.map(|end| (self.stall_timeout, end)).filter(|_| usable);
        let deadline = state.job(id).deadline.filter(|_| usable);
        let mut left = Duration::MAX;
        for (stalls, end) in [(true, stalled), (false, deadline)] {
            let Some((timeout, end)) = end else { continue };
            match end.checked_duration_since(now).filter(|rest| !rest.is_zero()) {
                Some(rest) => left = left.min(rest),
                None => return self.time_out(state, id, timeout, stalls),
            }
        }
        let flush = state.pair(self.key).flush_until.map(|end| end.saturating_duration_since(now));
        Due::In(flush.map_or(left, |rest| left.min(rest.max(Duration::from_millis(1)))))
    }

    /// Ends a job because its deadline has passed, or the connection because its queue stalls.
    fn time_out(&self, state: &mut State, id: JobId, timeout: Duration, stalls: bool) -> Due {
        // What completed meanwhile counts.
        self.drain(state);
        let now = Instant::now();
        let since = state.queue(id).stalled_since(now);
        let moves = since.is_none_or(|since| now.duration_since(since) < self.stall_timeout);
        if state.job(id).over || (stalls && moves) {
            return Due::Now;
        }
        let untouched = state.queue(id).is_untouched(id);
        let job = state.job(id);
        (job.deadline, job.ending) = (None, Some(job.ending.unwrap_or(Ending::TimedOut(timeout))));
        let (opcode, begun) = (job.opcode, job.is_begun());
        if opcode == Opcode::Recv && untouched && !stalls {
            return self.park(state, id, timeout);
        }
        if begun || stalls {
            self.shared().fail(|| format!("{opcode:?} timed out after {timeout:?}"));
        } else {
            state.withdraw(id);
        }
        Due::Now
    }

    /// Tells the owner of a receive that its time is up. It stays posted, and can be waited for again.
    fn park(&self, state: &mut State, id: JobId, timeout: Duration) -> Due {
        let job = state.job(id);
        let cancelled = job.ending.take() == Some(Ending::Cancelled);
        let Job { opcode, length, .. } = *job;
        Due::Parked(match cancelled {
            true => Error::Cancelled { opcode, done: 0, length, usable: true },
            false => {
                let hint = self.shared().hint(None);
                Error::Timeout { opcode, done: 0, length, timeout, hint, usable: true }
            }
        })
    }

    /// Whether the outcome of a job is still to be taken.
    pub(super) fn is_held(&self, id: JobId) -> bool {
        self.engine.check_own().is_ok()
            && self.engine.lock().find(id).is_some_and(|job| job.owner == Owner::Transfer)
    }

    /// Limits the time for a job, from now.
    pub(super) fn set_timeout(&self, id: JobId, timeout: Duration) {
        let end = Instant::now().checked_add(timeout).filter(|_| self.engine.check_own().is_ok());
        let Some(end) = end else { return };
        let mut state = self.engine.lock();
        state.queue(id).set_deadline(id, (timeout, end));
        self.engine.schedule(&mut state, Some(end));
    }

    /// Bytes of a job that are transferred for certain; `None` if its outcome was taken.
    pub(super) fn done(&self, id: JobId) -> Option<u64> {
        self.engine.check_own().ok()?;
        let mut state = self.engine.lock();
        self.drain(&mut state);
        state.find(id).filter(|job| job.owner == Owner::Transfer).map(|job| job.done)
    }

    /// Cancels a job, which may have ended and gone: no further message is posted.
    pub(super) fn cancel(&self, id: JobId) {
        if self.engine.check_own().is_err() {
            return;
        }
        let mut state = self.engine.lock();
        self.drive(&mut state);
        let untouched = state.queue(id).is_untouched(id);
        let Some(job) = state.find(id).filter(|job| !job.over && job.owner == Owner::Transfer) else {
            return;
        };
        job.ending = Some(Ending::Cancelled);
        match (id.side, job.is_begun()) {
            // Its owner learns of it.
            (Side::Recv, _) if untouched => {}
            // Only the error state flushes a posted receive.
            (Side::Recv, _) => self.shared().fail(|| "a receive was cancelled".into()),
            (Side::Send, true) => job.stop(),
            (Side::Send, false) => state.withdraw(id),
        }
        self.drain(&mut state);
        state.wake(id);
        self.engine.tell(state);
    }

    /// Lets go of a job. If it is in flight, its memory stays until the device is done; a receive without a message
    /// stays posted for the next one into the same memory.
    pub(super) fn detach(&self, id: JobId) {
        if !self.shared().pair.is_own() {
            // A child of `fork`: the jobs are its parent's, and another thread may have held the lock.
            return;
        }
        let mut state = self.engine.lock();
        state.set_waker(id, None);
        if id.side == Side::Recv && state.queue(id).is_untouched(id) {
            state.queue(id).park(id);
            return;
        }
        let job = state.abandon(id);
        drop(state);
        drop(job);
    }

    /// Why the connection is unusable, as far as it is known or the device says.
    pub(super) fn failure(&self) -> Option<&str> {
        if !self.shared().pair.is_own() {
            return self.shared().reason();
        }
        self.why_unusable(&mut self.engine.lock())
    }

    fn why_unusable(&self, state: &mut State) -> Option<&str> {
        self.engine.check_device(state);
        self.engine.check_link(state, self.key);
        if !self.shared().is_failed() {
            match self.shared().is_connected() {
                Ok(true) => return None,
                Ok(false) => return Some(NOT_CONNECTED),
                Err(reason) => {
                    // A completion may say it better.
                    self.drain(state);
                    self.shared().fail(|| reason);
                    self.drain(state);
                }
            }
        }
        self.shared().reason()
    }

    /// Ends the connection.
    pub(super) fn disconnect(&self) {
        self.fail("it was disconnected");
        if let Some(link) = self.shared().link.get() {
            link.disconnect();
        }
    }

    /// Ends everything, for this reason if there was none before.
    pub(super) fn fail(&self, reason: &str) {
        self.shared().fail(|| reason.into());
        if self.shared().pair.is_own() {
            self.drain(&mut self.engine.lock());
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else { return };
        if !shared.pair.is_own() {
            // A child of `fork`: another thread may have held the lock, and the epoll instance is its parent's too.
            return;
        }
        if let Some(link) = shared.link.get() {
            self.engine.events.unwatch(link.fd());
        }
        if shared.pair.shares_receives()
            && let Err(error) = shared.pair.stop()
        {
            // No more receives of the pool are taken now, whose completions the device might discard.
            tracing::debug!(%error, "cannot stop a queue pair");
        }
        let queues = self.engine.remove(self.key);
        let room = queues.room;
        let memory = queues.into_memory();
        // Destroys the queue pair; only then is the device done with the memory.
        drop(shared);
        drop(memory);
        self.engine.removed(room);
    }
}
