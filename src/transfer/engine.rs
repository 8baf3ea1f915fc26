//! What moves the transfers of a connection: it posts, takes completions, and lets threads and tasks wait.
//!
//! One lock guards both directions. Any number of threads may wait: one of them sleeps on the descriptors, and the
//! others on a condition variable. Whoever takes completions gives each job its outcome and tells those who wait: the
//! thread that sleeps, its followers, the tasks, and the event loops.

use std::io;
use std::sync::{Condvar, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::error::{Error, Result};
use super::events::Events;
use super::job::{Ending, Job, Owner};
use super::request::Request;
use super::shared::{NOT_CONNECTED, Shared};
use super::state::{Locked, State};
use super::work_queue::Side;
use super::{ConnectionOptions, Transferred};
use crate::verbs::{self, CompletionQueue, Opcode};

/// Time without a completion after which a busy-polling transfer looks at the connection manager.
const QUIET: Duration = Duration::from_millis(40);

/// Batches of completions that are taken in a row, so that a stream of them holds nobody up.
const MAX_BATCHES: usize = 64;

pub(super) struct Engine {
    // First, so that the queue pair is destroyed before the jobs release their memory.
    pub shared: Shared,
    state: Mutex<State>,
    /// Notified when something has changed, and when nobody sleeps on the descriptors any more.
    changed: Condvar,
    pub events: Events,
    completions: CompletionQueue,
    busy_poll: bool,
    stall_timeout: Duration,
}

/// A job of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct JobId {
    pub side: Side,
    pub key: usize,
    /// Tells it from other jobs with the same key.
    pub number: u64,
}

/// How long a job may still wait.
enum Due {
    In(Duration),
    /// Something has changed: look again.
    Now,
    /// It ends for its owner, and stays posted.
    Parked(Error),
}

impl Engine {
    pub(super) fn new(
        shared: Shared,
        completions: CompletionQueue,
        events: Events,
        options: &ConnectionOptions,
    ) -> Self {
        Self {
            shared,
            state: Mutex::new(State::new(options)),
            changed: Condvar::new(),
            events,
            completions,
            busy_poll: options.busy_poll,
            stall_timeout: options.stall_timeout,
        }
    }

    #[cfg(test)]
    pub(super) fn completions(&self) -> &CompletionQueue {
        &self.completions
    }

    fn lock(&self) -> Locked<'_> {
        Locked::new(&self.state)
    }

    /// Checks a request, adds it to its queue, and posts as much as the window permits.
    pub(super) fn start(&self, request: Request, message_size: u64) -> Result<JobId> {
        let shared = &self.shared;
        let message_size = message_size.clamp(1, shared.max_message_size);
        let side = if request.operation.is_some() { Side::Send } else { Side::Recv };
        let mut state = self.lock();
        if side == Side::Recv {
            match state.queue(side).adopt(&request, message_size) {
                Ok(None) => {}
                // Even if the connection has failed since: the message may have come before.
                Ok(Some(id)) => return Ok(id),
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
        let id = state.queue(side).push(request, message_size);
        if let Err(error) = state.queue(side).post(shared) {
            shared.fail(|| error.to_string());
            drop(state.abandon(id));
            self.drain(&mut state);
            return Err(error);
        }
        Ok(id)
    }

    /// Waits for a job. Calls `report` with the bytes transferred, after each change.
    pub(super) fn wait(&self, id: JobId, mut report: impl FnMut(u64)) -> Result<Transferred> {
        let (mut reported, mut spins) = (0, 0_u32);
        let mut state = self.lock();
        loop {
            let progress = self.drive(&mut state);
            let Job { done, over, deadline, ending, .. } = *state.job(id);
            if done != reported {
                reported = done;
                if state.watched {
                    // The event loops must not miss what completes during the report.
                    self.leave(&mut state)?;
                }
                drop(state);
                report(done);
                state = self.lock();
                if !over {
                    // Another thread may have ended it meanwhile.
                    continue;
                }
            }
            if over {
                return self.take(state, id);
            }
            if state.has_released() {
                drop(state);
                state = self.lock();
                continue;
            }
            if progress && deadline.is_none() && ending.is_none() {
                continue;
            }
            if self.busy_poll {
                spins = spins.wrapping_add(1);
                if !spins.is_multiple_of(256) {
                    drop(state);
                    std::hint::spin_loop();
                    state = self.lock();
                    continue;
                }
            }
            let left = match self.due(&mut state, id) {
                Due::In(left) => left,
                Due::Now => continue,
                Due::Parked(error) => {
                    self.leave(&mut state)?;
                    return Err(error);
                }
            };
            if !self.busy_poll && !progress {
                state = self.sleep(state, left)?;
            }
        }
    }

    /// Takes the outcome of a job that has ended.
    fn take(&self, mut state: Locked<'_>, id: JobId) -> Result<Transferred> {
        let outcome = state.job(id).outcome.take();
        let job = state.abandon(id);
        // An error fails the connection, and the outcome says more.
        let _ = self.leave(&mut state);
        drop(state);
        // Unlocked, since it may deregister memory.
        drop(job);
        match outcome {
            Some(outcome) => outcome.map_err(|error| *error),
            None => Err(Error::Unusable { reason: "the transfer has ended".into(), done: 0 }),
        }
    }

    /// Leaves the descriptors to others: what came is handed out, and the next completion raises an event.
    fn leave(&self, state: &mut State) -> Result<()> {
        if state.has_jobs() {
            if !self.busy_poll {
                self.arm(state)?;
            }
            self.drain(state);
        }
        if !state.sleeping && state.followers > 0 {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Sleeps until something may have changed.
    fn sleep<'e>(&'e self, mut state: Locked<'e>, left: Duration) -> Result<Locked<'e>> {
        if state.sleeping {
            return Ok(state.follow(&self.changed, left));
        }
        self.arm(&mut state)?;
        // A completion that came before raises no event.
        if self.drive(&mut state) {
            return Ok(state);
        }
        state.sleeping = true;
        drop(state);
        let channel = self.completions.channel().into_iter();
        let slept = self.events.sleep(channel.chain(self.shared.link.get().map(|link| link.fd())), left);
        let mut state = self.lock();
        state.sleeping = false;
        if state.followers > 0 {
            // One of them sleeps now, unless this thread comes back first.
            self.changed.notify_one();
        }
        self.take_events(&mut state, slept)?;
        Ok(state)
    }

    /// Consumes the events of the descriptors, and does what they ask for.
    fn take_events(&self, state: &mut State, slept: io::Result<()>) -> Result<()> {
        let context = self.shared.domain.context();
        // Lazily, since this runs after every sleep.
        let slept = slept.map_err(|source| context.failed("wait for events")(source));
        match slept.and_then(|()| self.completions.consume_event()) {
            Ok(consumed) => state.armed &= !consumed,
            Err(error) => return Err(self.broken(state, error)),
        }
        self.check_link(state);
        Ok(())
    }

    /// Makes the next completion raise an event. Each arming raises one, so events never pile up.
    fn arm(&self, state: &mut State) -> Result<()> {
        if !state.armed {
            self.completions.arm().map_err(|error| self.broken(state, error))?;
            state.armed = true;
        }
        Ok(())
    }

    /// Ends everything, because the device or its descriptors failed.
    fn broken(&self, state: &mut State, error: verbs::Error) -> Error {
        self.shared.fail(|| error.to_string());
        state.discard(&self.shared);
        self.drain(state);
        error.into()
    }

    /// The outcome of a job if it has ended. If not, the descriptor becomes readable when it may have.
    pub(super) fn try_wait(&self, id: JobId) -> Result<Option<Transferred>> {
        let mut state = self.lock();
        self.look(&mut state)?;
        loop {
            if state.job(id).over {
                return self.take(state, id).map(Some);
            }
            match self.due(&mut state, id) {
                Due::In(_) => return Ok(None),
                Due::Now => self.drain(&mut state),
                Due::Parked(error) => return Err(error),
            }
        }
    }

    /// Like `try_wait`, for a future.
    pub(super) fn poll(&self, id: JobId, context: &mut Context<'_>) -> Poll<Result<Transferred>> {
        if let Some(ended) = self.try_wait(id).transpose() {
            return Poll::Ready(ended);
        }
        self.set_waker(id, context);
        Poll::Pending
    }

    /// Wakes the task when the job has ended.
    pub(super) fn set_waker(&self, id: JobId, context: &mut Context<'_>) {
        let mut state = self.lock();
        let changed = |job: &Job| job.over || job.ending == Some(Ending::Cancelled);
        if state.find(id).is_none_or(|job| changed(job)) {
            drop(state);
            context.waker().wake_by_ref();
        } else {
            state.set_waker(id, Some(context.waker().clone()));
        }
    }

    /// Makes progress for all transfers, and wakes the tasks whose transfers have ended or whose time is up.
    pub(super) fn process_events(&self) -> Result<()> {
        let mut state = self.lock();
        self.look(&mut state)?;
        state.wake_overdue(self.stall_timeout);
        Ok(())
    }

    /// Consumes the events that made the descriptor readable, does what they ask for, and arms the queue for the
    /// next one.
    fn look(&self, state: &mut State) -> Result<()> {
        state.watched = true;
        self.events.looked();
        self.take_events(state, Ok(()))?;
        self.arm(state)?;
        // A completion that came before raises no event.
        self.drain(state);
        Ok(())
    }

    /// Takes the next completions, posts, and tells those who wait. Returns whether anything changed.
    fn drive(&self, state: &mut State) -> bool {
        let step = state.step(&self.shared, &self.completions);
        if step.ended && state.sleeping {
            // Its job may have ended without a completion.
            self.events.kick();
        }
        if step.ended && state.watched {
            self.events.notify();
        }
        if step.is_progress() && state.followers > 0 {
            self.changed.notify_all();
        }
        step.is_progress()
    }

    /// Drives until nothing changes, or for long enough.
    fn drain(&self, state: &mut State) {
        let all = (0..MAX_BATCHES).any(|_| !self.drive(state));
        if !all && state.watched {
            // An event loop looks again at once.
            self.events.notify();
        }
    }

    /// Looks whether the peer has disconnected. What came before that counts.
    fn check_link(&self, state: &mut State) {
        self.drain(state);
        self.shared.check_link();
        self.drain(state);
    }

    /// How long a job may still wait, after its timeouts and the link were looked at.
    fn due(&self, state: &mut State, id: JobId) -> Due {
        let (shared, now) = (&self.shared, Instant::now());
        let usable = !shared.is_failed();
        let waits = state.queue(id.side).is_untouched(id);
        if usable && id.side == Side::Recv && state.job(id).ending == Some(Ending::Cancelled) {
            if waits {
                return self.park(state, id, Duration::ZERO);
            }
            // Its first message came after the call. Only the error state flushes a posted receive.
            shared.fail(|| "a receive was cancelled".into());
            return Due::Now;
        }
        let stalled = state.queue(id.side).stalled_since(now);
        let quiet = stalled.is_none_or(|since| now.duration_since(since) >= QUIET);
        if self.busy_poll && quiet && usable {
            self.check_link(state);
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
        let flush = state.flush_until.map(|end| end.saturating_duration_since(now));
        Due::In(flush.map_or(left, |rest| left.min(rest.max(Duration::from_millis(1)))))
    }

    /// Ends a job because its deadline has passed, or the connection because its queue stalls.
    fn time_out(&self, state: &mut State, id: JobId, timeout: Duration, stalls: bool) -> Due {
        // What completed meanwhile counts.
        let progress = self.drive(state);
        self.drain(state);
        if state.job(id).over || (progress && stalls) {
            return Due::Now;
        }
        let untouched = state.queue(id.side).is_untouched(id);
        let job = state.job(id);
        (job.deadline, job.ending) = (None, Some(job.ending.unwrap_or(Ending::TimedOut(timeout))));
        let (opcode, begun) = (job.opcode, job.is_begun());
        if opcode == Opcode::Recv && untouched && !stalls {
            return self.park(state, id, timeout);
        }
        if begun || stalls {
            self.shared.fail(|| format!("{opcode:?} timed out after {timeout:?}"));
        } else {
            state.withdraw(id, &self.shared);
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
                let hint = self.shared.hint(None);
                Error::Timeout { opcode, done: 0, length, timeout, hint, usable: true }
            }
        })
    }

    /// Whether the outcome of a job is still to be taken.
    pub(super) fn is_held(&self, id: JobId) -> bool {
        self.lock().find(id).is_some_and(|job| job.owner == Owner::Transfer)
    }

    /// Limits the time for a job, from now.
    pub(super) fn set_timeout(&self, id: JobId, timeout: Duration) {
        let deadline = Instant::now().checked_add(timeout).map(|end| (timeout, end));
        if let Some(job) = self.lock().find(id) {
            job.deadline = deadline;
        }
    }

    /// Bytes of a job that are transferred for certain; `None` if its outcome was taken.
    pub(super) fn done(&self, id: JobId) -> Option<u64> {
        let mut state = self.lock();
        self.drain(&mut state);
        state.find(id).filter(|job| job.owner == Owner::Transfer).map(|job| job.done)
    }

    /// Cancels a job, which may have ended and gone: no further message is posted.
    pub(super) fn cancel(&self, id: JobId) {
        let mut state = self.lock();
        self.drive(&mut state);
        let untouched = state.queue(id.side).is_untouched(id);
        let Some(job) = state.find(id).filter(|job| !job.over && job.owner == Owner::Transfer) else {
            return;
        };
        job.ending = Some(Ending::Cancelled);
        match (id.side, job.is_begun()) {
            // Its owner learns of it.
            (Side::Recv, _) if untouched => {}
            // Only the error state flushes a posted receive.
            (Side::Recv, _) => self.shared.fail(|| "a receive was cancelled".into()),
            (Side::Send, true) => job.stop(),
            (Side::Send, false) => state.withdraw(id, &self.shared),
        }
        self.drain(&mut state);
        state.wake(id);
        drop(state);
        self.changed.notify_all();
        self.events.kick();
        self.events.notify();
    }

    /// Lets go of a job. If it is in flight, its memory stays until the device is done; a receive without a message
    /// stays posted for the next one into the same memory.
    pub(super) fn detach(&self, id: JobId) {
        if !self.shared.pair.is_own() {
            // A child of `fork`: the jobs are its parent's, and another thread may have held the lock.
            return;
        }
        let mut state = self.lock();
        state.set_waker(id, None);
        if id.side == Side::Recv && state.queue(id.side).is_untouched(id) {
            state.queue(id.side).park(id);
            return;
        }
        let job = state.abandon(id);
        drop(state);
        drop(job);
    }

    /// Why the connection is unusable, as far as it is known or the device says.
    pub(super) fn failure(&self) -> Option<&str> {
        if !self.shared.pair.is_own() {
            return self.shared.reason();
        }
        self.why_unusable(&mut self.lock())
    }

    fn why_unusable(&self, state: &mut State) -> Option<&str> {
        self.check_link(state);
        if !self.shared.is_failed() {
            match self.shared.is_connected() {
                Ok(true) => return None,
                Ok(false) => return Some(NOT_CONNECTED),
                Err(reason) => {
                    // A completion may say it better.
                    self.drain(state);
                    self.shared.fail(|| reason);
                    self.drain(state);
                }
            }
        }
        self.shared.reason()
    }

    /// Ends the connection.
    pub(super) fn disconnect(&self) {
        self.shared.fail(|| "it was disconnected".into());
        if let Some(link) = self.shared.link.get() {
            link.disconnect();
        }
        if self.shared.pair.is_own() {
            self.drain(&mut self.lock());
        }
    }
}
