//! What makes progress for the queue pairs of a worker: it takes completions, posts, and lets threads and tasks wait.
//!
//! One lock guards all of them. Any number of threads may wait: one of them sleeps on the descriptors, and the others on
//! a condition variable. Whoever takes completions gives each job its outcome and tells those who wait: the thread that
//! sleeps, its followers, the tasks, and the event loops.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::error::{Error, Result};
use super::events::{Events, Source};
use super::pool::Pool;
use super::queues::Queues;
use super::state::{Locked, State, Step};
use crate::observe::Process;
use crate::verbs::{
    self, AsyncEvent, CompletionQueue, Concerns, Inbox, ProtectionDomain, SharedReceiveQueue,
};

/// Batches of completions that are taken in a row, so that a stream of them holds nobody up.
pub(super) const MAX_BATCHES: usize = 64;

/// Why a child of `fork` cannot use a connection.
const NOT_OWN: &str = "it belongs to the parent of this process";

pub(super) struct Engine {
    state: Mutex<State>,
    /// Notified when something has changed, and when nobody sleeps on the descriptors any more.
    changed: Condvar,
    pub events: Arc<Events>,
    /// Where notifications are received, if they are.
    pub receives: Option<SharedReceiveQueue>,
    pub completions: CompletionQueue,
    /// Maximum number of completions in the queue.
    capacity: usize,
    pub domain: ProtectionDomain,
    /// The fatal events of the device and the queues, which come also while there is no queue pair. `None` for a
    /// foreign context.
    inbox: Option<Arc<Inbox>>,
    creator: Process,
    #[cfg(feature = "tokio")]
    pub drivers: super::driver::Drivers,
}

impl Engine {
    /// For a completion queue with room for `room` completions besides those of the pool.
    pub(super) fn new(
        domain: ProtectionDomain,
        completions: CompletionQueue,
        room: u32,
        events: Arc<Events>,
        pool: Option<Pool>,
    ) -> Self {
        let receives = pool.as_ref().map(|pool| pool.queue.clone());
        let capacity = room as usize + pool.as_ref().map_or(0, Pool::depth);
        let state = Mutex::new(State::new(room, pool));
        Self {
            state,
            changed: Condvar::new(),
            events,
            receives,
            completions,
            capacity,
            domain,
            inbox: None,
            creator: Process::current(),
            #[cfg(feature = "tokio")]
            drivers: Default::default(),
        }
    }

    /// Has the events of the device wake those who wait, unless the context is foreign.
    pub(super) fn listen(&mut self) -> Result<()> {
        let context = self.domain.context();
        if context.reads_events() {
            let srq = self.receives.as_ref().map(SharedReceiveQueue::handle);
            let concerns = Concerns::Fatal { qp_num: None, cq: self.completions.handle(), srq };
            self.inbox = Some(context.subscribe(concerns, self.events.clone().into())?);
            let failed = context.failed("create the descriptors of a worker");
            self.events.watch(context.async_fd(), Source::Device).map_err(failed)?;
        }
        Ok(())
    }

    /// # Errors
    /// This is a child of `fork`: the queues are its parent's, and another thread may have held the lock.
    pub(super) fn check_own(&self) -> Result<()> {
        match self.creator.is_current() {
            true => Ok(()),
            false => Err(Error::Unusable { reason: NOT_OWN.into(), done: 0 }),
        }
    }

    pub(super) fn lock(&self) -> Locked<'_> {
        Locked::new(&self.state)
    }

    /// Adds a queue pair, and returns its key.
    pub(super) fn add(&self, queues: Queues) -> Result<usize> {
        let needed = queues.room;
        self.lock().add(queues).map_err(|left| {
            let source = std::io::Error::from_raw_os_error(libc::ENOSPC);
            let operation = format!(
                "add a connection to a worker: it needs room for {needed} completions and {left} are left, so give the worker more `completions` or the connection a smaller `window`"
            );
            self.domain.context().failed(operation)(source).into()
        })
    }

    /// Removes a queue pair. What is returned is dropped once the queue pair is destroyed, and [`removed`](Self::removed)
    /// is called then.
    pub(super) fn remove(&self, key: usize) -> Queues {
        let mut state = self.lock();
        // Others may wait for what comes with it. A device may discard what is left when it destroys the queue pair.
        self.sweep(&mut state);
        state.remove(key)
    }

    /// Gives back the room of a queue pair that is destroyed.
    pub(super) fn removed(&self, room: u32) {
        let mut state = self.lock();
        self.sweep(&mut state);
        state.give_back(room);
    }

    /// Takes every completion that is in the queue now, however many come meanwhile.
    fn sweep(&self, state: &mut State) {
        let mut left = self.capacity;
        loop {
            let taken = self.step(state).taken;
            if taken == 0 || taken >= left {
                break;
            }
            left -= taken;
        }
        self.drain(state);
    }

    /// Takes the next completions, posts, and tells those who wait. Returns whether anything changed.
    pub(super) fn drive(&self, state: &mut State) -> bool {
        self.step(state).is_progress()
    }

    fn step(&self, state: &mut State) -> Step {
        let step = state.step(&self.completions);
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
        step
    }

    /// Drives until nothing changes, or for long enough.
    pub(super) fn drain(&self, state: &mut State) {
        let all = (0..MAX_BATCHES).any(|_| !self.drive(state));
        if !all && self.is_watched(state) {
            // An event loop, or the task of a runtime, looks again at once.
            self.events.notify();
        }
    }

    /// Tells everybody who waits that something has changed.
    pub(super) fn tell(&self, state: Locked<'_>) {
        if state.sleeping {
            self.events.kick();
        }
        self.changed.notify_all();
        self.events.notify();
    }

    /// Leaves the descriptors to others: what came is handed out, and the next completion raises an event.
    pub(super) fn leave(&self, state: &mut State, busy_poll: bool) -> Result<()> {
        if state.has_jobs() || state.has_pool() && self.is_watched(state) {
            if !busy_poll {
                self.arm(state)?;
            }
            self.drain(state);
        }
        self.reschedule(state);
        if !state.sleeping && state.followers > 0 {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Sleeps until something may have changed.
    pub(super) fn sleep<'e>(&'e self, mut state: Locked<'e>, left: Duration) -> Result<Locked<'e>> {
        if state.sleeping {
            return Ok(state.follow(&self.changed, left));
        }
        self.arm(&mut state)?;
        // A completion that came before raises no event.
        // If the queue is not armed, everything has ended.
        if self.drive(&mut state) || !state.armed {
            return Ok(state);
        }
        state.sleeping = true;
        drop(state);
        let slept = self.events.wait(left);
        let mut state = self.lock();
        state.sleeping = false;
        self.events.end_kicks();
        if state.followers > 0 {
            // One of them sleeps now, unless this thread comes back first.
            self.changed.notify_one();
        }
        self.take_events(&mut state, slept)?;
        self.reschedule(&mut state);
        Ok(state)
    }

    /// Consumes the events of the descriptors that are readable, and does what they ask for.
    fn take_events(
        &self,
        state: &mut State,
        readable: std::io::Result<impl Iterator<Item = Source>>,
    ) -> Result<()> {
        let readable = match readable {
            Ok(readable) => readable,
            Err(source) => {
                let error = self.domain.context().failed("wait for events")(source);
                return self.broken(state, error);
            }
        };
        let mut reported = false;
        for source in readable {
            match source {
                Source::Kick => {}
                Source::Device => reported = true,
                Source::Link(key) => self.check_link(state, key),
                Source::Completions => match self.completions.consume_event() {
                    Ok(consumed) => state.armed &= !consumed,
                    Err(error) => self.broken(state, error)?,
                },
            }
        }
        // After the kicks are ended: whoever kicks has reported before.
        if self.events.take_reported() || reported {
            self.check_device(state);
        }
        Ok(())
    }

    /// Makes the next completion raise an event. Each arming raises one, so events never pile up.
    fn arm(&self, state: &mut State) -> Result<()> {
        if !state.armed {
            match self.completions.arm() {
                Ok(()) => state.armed = true,
                Err(error) => self.broken(state, error)?,
            }
        }
        Ok(())
    }

    /// Ends everything, because the device or its descriptors failed. Succeeds if the device says why, which the
    /// transfers then return.
    fn broken(&self, state: &mut State, error: verbs::Error) -> Result<()> {
        let mut cause = None;
        for (_, pair) in &state.pairs {
            if let Some(event) = pair.shared.cause() {
                pair.shared.fail_by(event);
                cause = Some(event);
            }
        }
        let explained = cause.is_some();
        state.fail(&cause.map_or_else(|| error.to_string(), |event| self.reason(event)));
        if explained {
            self.unwatch_device();
        }
        self.drain(state);
        if explained { Ok(()) } else { Err(error.into()) }
    }

    fn reason(&self, event: AsyncEvent) -> String {
        format!("{}: {event}", self.domain.context().device_name())
    }

    /// The descriptors of a device that is gone stay readable.
    fn unwatch_device(&self) {
        self.completions.channel().into_iter().for_each(|channel| self.events.unwatch(channel));
        self.events.unwatch(self.domain.context().async_fd());
    }

    /// Looks whether the device reported that it, or a queue of a queue pair here, has failed. What came before counts.
    pub(super) fn check_device(&self, state: &mut State) {
        self.drain(state);
        if let Some(inbox) = &self.inbox {
            // Also without a queue pair that reads them, or they would keep the descriptor readable.
            self.domain.context().dispatch_events();
            while let Some(event) = inbox.pop() {
                if event == AsyncEvent::DeviceFatal {
                    self.unwatch_device();
                }
                state.end(&self.reason(event));
            }
        }
        let found: Vec<_> =
            state.pairs.iter().filter_map(|(key, pair)| Some((key, pair.shared.fatal_event()?))).collect();
        if found.iter().any(|(_, event)| *event == AsyncEvent::DeviceFatal) {
            self.unwatch_device();
        }
        for (key, event) in found {
            let pair = state.pair(key);
            pair.shared.fail_by(event);
            if !matches!(
                event,
                AsyncEvent::QueuePairFatal { .. }
                    | AsyncEvent::QueuePairRequestError { .. }
                    | AsyncEvent::QueuePairAccessError { .. }
            ) {
                // No completions follow.
                pair.discard();
            }
            state.touch(key);
        }
        self.drain(state);
    }

    /// Whether somebody looks when the descriptor becomes readable.
    pub(super) fn is_watched(&self, state: &State) -> bool {
        state.watched || self.is_driven()
    }

    /// As an event loop: consumes the events that made the descriptor readable, does what they ask for, and arms the
    /// queue for the next one.
    pub(super) fn look(&self, state: &mut State) -> Result<()> {
        state.watched = true;
        self.events.looked();
        self.take_all_events(state)
    }

    /// Like `look`, for a future. In a runtime whose task makes progress, an event loop beside it is still told to look.
    pub(super) fn look_for_future(&self, state: &mut State) -> Result<()> {
        if self.is_driven() { self.take_all_events(state) } else { self.look(state) }
    }

    fn take_all_events(&self, state: &mut State) -> Result<()> {
        if !state.sleeping {
            // Another reader of the device's events kicks also if nobody sleeps.
            self.events.end_kicks();
        }
        let readable = self.events.wait(Duration::ZERO);
        self.take_events(state, readable)?;
        self.arm(state)?;
        // A completion that came before raises no event.
        self.drain(state);
        Ok(())
    }

    /// Makes progress for all transfers, and wakes the tasks whose transfers have ended or whose time is up. Returns when
    /// the next timeout expires.
    pub(super) fn process_events(&self) -> Result<Option<Instant>> {
        self.process(Self::look)
    }

    /// Like `process_events`, for the task of a runtime: an event loop is still told to look.
    #[cfg(feature = "tokio")]
    pub(super) fn process_events_for_tasks(&self) -> Result<Option<Instant>> {
        self.process(Self::take_all_events)
    }

    fn process(&self, look: impl FnOnce(&Self, &mut State) -> Result<()>) -> Result<Option<Instant>> {
        self.check_own()?;
        let mut state = self.lock();
        if let Err(error) = look(self, &mut state) {
            state.timer = None;
            return Err(error);
        }
        let next = state.wake_overdue();
        if state.is_before_timer(next) {
            self.wake_drivers();
        }
        state.timer = next;
        Ok(next)
    }

    /// Whether tasks of runtimes make progress.
    pub(super) fn is_driven(&self) -> bool {
        #[cfg(feature = "tokio")]
        return !self.drivers.is_empty();
        #[cfg(not(feature = "tokio"))]
        false
    }

    /// A thread has taken completions, after which the stall timeout of another transfer may begin.
    pub(super) fn reschedule(&self, state: &mut State) {
        if self.is_watched(state) {
            let next = state.wake_overdue();
            self.schedule(state, next);
        }
    }

    /// Has event loops and the tasks of runtimes look again by then at the latest.
    pub(super) fn schedule(&self, state: &mut State, end: Option<Instant>) {
        if self.is_watched(state) && state.is_before_timer(end) {
            state.timer = end;
            if state.watched {
                self.events.notify();
            }
            self.wake_drivers();
        }
    }

    fn wake_drivers(&self) {
        #[cfg(feature = "tokio")]
        self.drivers.wake();
    }

    /// Fails all connections.
    #[cfg(feature = "tokio")]
    pub(super) fn fail(&self, reason: &str) {
        let mut state = self.lock();
        state.fail(reason);
        self.drain(&mut state);
    }

    /// Wakes all tasks, which poll again.
    #[cfg(feature = "tokio")]
    pub(super) fn wake_all(&self) {
        self.lock().wake_all();
    }

    /// Looks whether the peer of a queue pair has disconnected. What came before that counts.
    pub(super) fn check_link(&self, state: &mut State, key: usize) {
        self.drain(state);
        // It may be gone.
        if let Some(pair) = state.pairs.get(key) {
            pair.shared.check_link();
            state.touch(key);
        }
        self.drain(state);
    }
}

#[cfg(feature = "tokio")]
impl Drop for Engine {
    fn drop(&mut self) {
        if self.check_own().is_ok() {
            self.drivers.wake();
        }
    }
}
