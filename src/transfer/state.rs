//! What the lock of an engine guards: the work queues of its queue pairs.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use slab::Slab;

use super::job::{Job, JobId};
use super::queues::Queues;
use super::request::Request;
use super::work_queue::WorkQueue;
use crate::verbs::{CompletionQueue, ffi};

/// Maximum number of completions that one poll returns.
const POLL_BATCH: usize = 16;

pub(super) struct State {
    pub pairs: Slab<Queues>,
    /// Keys by the numbers of the queue pairs.
    numbers: FxHashMap<u32, usize>,
    /// Keys of those that the next step is to look at.
    touched: Vec<usize>,
    polled: Box<[ffi::ibv_wc; POLL_BATCH]>,
    /// Room in the completion queue that is not reserved.
    room: u32,
    /// Whether a thread sleeps on the descriptors, and how many others wait for it.
    pub sleeping: bool,
    pub followers: usize,
    /// Whether an event loop uses the engine.
    pub watched: bool,
    /// Whether the completion queue is armed, or its event was not consumed yet.
    pub armed: bool,
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
    /// Whether jobs have ended, or a queue pair has failed.
    pub ended: bool,
}

impl Step {
    pub(super) fn is_progress(self) -> bool {
        self.taken > 0 || self.ended
    }
}

impl State {
    /// For a completion queue with room for `room` completions.
    pub(super) fn new(room: u32) -> Self {
        Self {
            pairs: Slab::new(),
            numbers: FxHashMap::default(),
            touched: Vec::new(),
            polled: Box::new([ffi::ibv_wc::default(); POLL_BATCH]),
            room,
            sleeping: false,
            followers: 0,
            watched: false,
            armed: false,
            released: Released::default(),
        }
    }

    /// Adds a queue pair, and returns its key.
    ///
    /// # Errors
    /// The room that is left, which is not enough.
    pub(super) fn add(&mut self, queues: Queues) -> Result<usize, u32> {
        self.room = self.room.checked_sub(queues.room).ok_or(self.room)?;
        let number = queues.shared.pair.number();
        let key = self.pairs.insert(queues);
        self.numbers.insert(number, key);
        Ok(key)
    }

    /// Removes a queue pair. Its room stays reserved until its completions are gone.
    pub(super) fn remove(&mut self, key: usize) -> Queues {
        let queues = self.pairs.remove(key);
        self.numbers.remove(&queues.shared.pair.number());
        self.touched.retain(|&touched| touched != key);
        queues
    }

    /// Gives back the room of a queue pair that was destroyed: no completion of it comes any more, and those in the queue
    /// were taken.
    pub(super) fn give_back(&mut self, room: u32) {
        self.room += room;
    }

    /// Has the next step look at a queue pair.
    pub(super) fn touch(&mut self, key: usize) {
        if let Some(pair) = self.pairs.get_mut(key)
            && !std::mem::replace(&mut pair.touched, true)
        {
            self.touched.push(key);
        }
    }

    /// The queue pair of a handle that lives.
    pub(super) fn pair(&mut self, key: usize) -> &mut Queues {
        &mut self.pairs[key]
    }

    pub(super) fn queue(&mut self, id: JobId) -> &mut WorkQueue {
        self.pairs[id.pair].queue(id.side)
    }

    /// A job that its `Transfer` holds.
    pub(super) fn job(&mut self, id: JobId) -> &mut Job {
        self.queue(id).find(id).expect("a job stays until its transfer lets go of it")
    }

    /// A job that may have ended and gone, or have another owner.
    pub(super) fn find(&mut self, id: JobId) -> Option<&mut Job> {
        self.queue(id).find(id)
    }

    /// Whether something waits for the lock to be released.
    pub(super) fn has_released(&self) -> bool {
        let Released { wakers, requests, replaced } = &self.released;
        !(wakers.is_empty() && requests.is_empty() && replaced.is_empty())
    }

    /// Whether a job has not ended.
    pub(super) fn has_jobs(&self) -> bool {
        self.pairs.iter().any(|(_, pair)| pair.has_jobs())
    }

    /// Gives up a job, and returns it if it has ended.
    pub(super) fn abandon(&mut self, id: JobId) -> Option<Job> {
        let Self { pairs, released, .. } = self;
        pairs[id.pair].queue(id.side).abandon(id, released)
    }

    /// Wakes the tasks whose time is up.
    pub(super) fn wake_overdue(&mut self) {
        let (now, Self { pairs, released, .. }) = (Instant::now(), self);
        pairs.iter_mut().for_each(|(_, pair)| pair.wake_overdue(now, released));
    }

    /// Ends a job of which nothing was posted, and nothing will be.
    pub(super) fn withdraw(&mut self, id: JobId) {
        self.pairs[id.pair].withdraw(id, &mut self.released);
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
    pub(super) fn step(&mut self, completions: &CompletionQueue) -> Step {
        let taken = match completions.poll_into(&mut *self.polled) {
            Ok(taken) => taken,
            Err(error) => {
                self.fail(&error.to_string());
                0
            }
        };
        for at in 0..taken {
            let completion = &self.polled[at];
            // Of a queue pair that was destroyed otherwise.
            let Some(&key) = self.numbers.get(&completion.qp_num) else { continue };
            self.pairs[key].complete(completion);
            self.touch(key);
        }
        let (mut ended, Self { pairs, touched, released, .. }) = (false, self);
        touched.retain(|&key| {
            let Some(pair) = pairs.get_mut(key) else { return false };
            ended |= pair.advance(taken == POLL_BATCH, released);
            pair.touched
        });
        Step { taken, ended }
    }

    /// Fails all queue pairs, because the device or its descriptors failed.
    pub(super) fn fail(&mut self, reason: &str) {
        for (key, pair) in &mut self.pairs {
            pair.shared.fail(|| reason.to_owned());
            pair.discard();
            if !std::mem::replace(&mut pair.touched, true) {
                self.touched.push(key);
            }
        }
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
