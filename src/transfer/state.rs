//! What the lock of an engine guards: both work queues.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use super::ConnectionOptions;
use super::engine::JobId;
use super::job::Job;
use super::request::Request;
use super::shared::Shared;
use super::work_queue::{Side, WorkQueue};
use crate::verbs::{CompletionQueue, ffi};

/// Maximum number of completions that one poll returns.
const POLL_BATCH: usize = 16;

/// Longest time for a queue pair in the error state to flush, which needs no reply from the peer. Afterwards the
/// queue pair is reset, which discards its work requests.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) struct State {
    pub queues: [WorkQueue; 2],
    polled: Box<[ffi::ibv_wc; POLL_BATCH]>,
    /// Whether a thread sleeps on the descriptors, and how many others wait for it.
    pub sleeping: bool,
    pub followers: usize,
    /// Whether an event loop uses the connection.
    pub watched: bool,
    /// Whether the completion queue is armed, or its event was not consumed yet.
    pub armed: bool,
    /// Whether the failure of the connection was seen here.
    failed: bool,
    /// When a flush of the failed queue pair is given up.
    pub flush_until: Option<Instant>,
    released: Released,
}

/// What is dropped or called once the lock is released: a waker may drop a task with its transfers, and memory may be
/// deregistered.
#[derive(Default)]
pub(super) struct Released {
    pub wakers: Vec<Waker>,
    pub requests: Vec<Request>,
    /// Wakers that are only dropped.
    replaced: Vec<Waker>,
}

/// What a step has done.
#[derive(Clone, Copy, Default)]
pub(super) struct Step {
    /// Completions taken.
    pub taken: usize,
    /// Whether jobs have ended, or the connection has failed.
    pub ended: bool,
}

impl Step {
    pub(super) fn is_progress(self) -> bool {
        self.taken > 0 || self.ended
    }
}

impl State {
    pub(super) fn new(options: &ConnectionOptions) -> Self {
        Self {
            queues: [WorkQueue::new(Side::Send, options), WorkQueue::new(Side::Recv, options)],
            polled: Box::new([ffi::ibv_wc::default(); POLL_BATCH]),
            sleeping: false,
            followers: 0,
            watched: false,
            armed: false,
            failed: false,
            flush_until: None,
            released: Released::default(),
        }
    }

    pub(super) fn queue(&mut self, side: Side) -> &mut WorkQueue {
        &mut self.queues[side as usize]
    }

    /// A job that its `Transfer` holds.
    pub(super) fn job(&mut self, id: JobId) -> &mut Job {
        self.queue(id.side).find(id).expect("a job stays until its transfer lets go of it")
    }

    /// A job that may have ended and gone, or have another owner.
    pub(super) fn find(&mut self, id: JobId) -> Option<&mut Job> {
        self.queue(id.side).find(id)
    }

    /// Whether something waits for the lock to be released.
    pub(super) fn has_released(&self) -> bool {
        let Released { wakers, requests, replaced } = &self.released;
        !(wakers.is_empty() && requests.is_empty() && replaced.is_empty())
    }

    /// Whether a job has not ended.
    pub(super) fn has_jobs(&self) -> bool {
        self.queues.iter().any(WorkQueue::has_jobs)
    }

    /// Gives up a job, and returns it if it has ended.
    pub(super) fn abandon(&mut self, id: JobId) -> Option<Job> {
        let Self { queues, released, .. } = self;
        queues[id.side as usize].abandon(id, released)
    }

    /// Wakes the tasks whose time is up.
    pub(super) fn wake_overdue(&mut self, stall_timeout: Duration) {
        let (now, Self { queues, released, .. }) = (Instant::now(), self);
        queues.iter_mut().for_each(|queue| queue.wake_overdue(now, stall_timeout, released));
    }

    /// Ends a job of which nothing was posted, and nothing will be.
    pub(super) fn withdraw(&mut self, id: JobId, shared: &Shared) {
        let Self { queues, released, .. } = self;
        queues[id.side as usize].withdraw(id, shared, released);
    }

    /// Wakes the task of a job once the lock is released.
    pub(super) fn wake(&mut self, id: JobId) {
        let waker = self.find(id).and_then(|job| job.waker.take());
        self.released.wakers.extend(waker);
    }

    /// Sets whom to wake when a job ends, instead of another task.
    pub(super) fn set_waker(&mut self, id: JobId, waker: Option<Waker>) {
        let replaced = self.find(id).and_then(|job| std::mem::replace(&mut job.waker, waker));
        self.released.replaced.extend(replaced);
    }

    /// Takes at most [`POLL_BATCH`] completions, posts, and ends the jobs that are over.
    pub(super) fn step(&mut self, shared: &Shared, completions: &CompletionQueue) -> Step {
        let taken = match completions.poll_into(&mut *self.polled) {
            Ok(taken) => taken,
            Err(error) => {
                shared.fail(|| error.to_string());
                self.discard(shared);
                0
            }
        };
        for completion in &self.polled[..taken] {
            self.queues[Side::of(completion) as usize].complete(completion, shared);
        }
        for queue in self.queues.iter_mut().filter(|_| !shared.is_failed()) {
            if let Err(error) = queue.post(shared) {
                shared.fail(|| error.to_string());
            }
        }
        if taken == 0 && shared.is_failed() {
            self.check_flush(shared);
        }
        let Self { queues, released, .. } = self;
        let mut ended = false;
        for queue in queues {
            ended |= queue.settle(shared, taken == POLL_BATCH, released);
        }
        ended |= shared.is_failed() && !std::mem::replace(&mut self.failed, shared.is_failed());
        Step { taken, ended }
    }

    /// Gives up on requests in flight that a failed queue pair does not flush.
    fn check_flush(&mut self, shared: &Shared) {
        if self.queues.iter().all(WorkQueue::is_idle) {
            self.flush_until = None;
            return;
        }
        let now = Instant::now();
        let until = *self.flush_until.get_or_insert(now + FLUSH_TIMEOUT);
        if now >= until {
            self.discard(shared);
        }
    }

    /// Ends what is in flight without completions.
    pub(super) fn discard(&mut self, shared: &Shared) {
        shared.discard();
        self.queues.iter_mut().for_each(WorkQueue::discard);
        self.flush_until = None;
    }
}

/// The locked state. Unlocking it wakes and drops what was released.
pub(super) struct Locked<'e>(Option<MutexGuard<'e, State>>);

const LOCKED: &str = "the guard is taken only while it is dropped";

impl<'e> Locked<'e> {
    pub(super) fn new(state: &'e Mutex<State>) -> Self {
        Self(Some(state.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Waits for the thread that sleeps. Nothing is to be [released](State::has_released).
    pub(super) fn follow(mut self, changed: &Condvar, left: Duration) -> Self {
        let mut state = self.0.take().expect(LOCKED);
        state.followers += 1;
        (state, _) = changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        state.followers -= 1;
        Self(Some(state))
    }
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        self.0.as_ref().expect(LOCKED)
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        self.0.as_mut().expect(LOCKED)
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let Some(mut state) = self.0.take().filter(|state| state.has_released()) else { return };
        let released = std::mem::take(&mut state.released);
        drop(state);
        released.wakers.into_iter().for_each(Waker::wake);
    }
}
