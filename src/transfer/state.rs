//! What the lock of an engine guards: the work queues of its queue pairs.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use slab::Slab;

use super::arrivals::{Arrivals, Waiters};
use super::job::{Job, JobId};
use super::pool::Pool;
use super::queues::Queues;
use super::request::Request;
use super::work_queue::WorkQueue;
use super::{Notification, RequestError};
use crate::verbs::{Completion, CompletionQueue, CompletionStatus, ffi};

/// Maximum number of completions that one poll returns.
const POLL_BATCH: usize = 16;

pub(super) struct State {
    pub pairs: Slab<Queues>,
    /// The receives of notifications, if there are any.
    pool: Option<Pool>,
    /// Tasks that wait for a notification of any queue pair.
    waiters: Waiters,
    /// Key of the queue pair whose turn it is.
    turn: usize,
    /// Keys by the numbers of the queue pairs.
    numbers: FxHashMap<u32, usize>,
    /// Keys of those that the next step is to look at.
    touched: Vec<usize>,
    polled: Box<[ffi::ibv_wc; POLL_BATCH]>,
    /// Room in the completion queue that is not reserved.
    room: u32,
    /// Number of queue pairs that were ever added.
    added: u64,
    /// Whether a thread sleeps on the descriptors, and how many others wait for it.
    pub sleeping: bool,
    pub followers: usize,
    /// Whether an event loop uses the engine.
    pub watched: bool,
    /// When the event loop or the task of a runtime looks again by itself.
    pub timer: Option<Instant>,
    /// Whether the completion queue is armed, or its event was not consumed yet.
    pub armed: bool,
    /// Why no notification comes any more, of any queue pair that there is or will be.
    ended: Option<String>,
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
    /// For a completion queue with room for `room` completions besides those of the pool.
    pub(super) fn new(room: u32, pool: Option<Pool>) -> Self {
        Self {
            pairs: Slab::new(),
            pool,
            waiters: Waiters::default(),
            turn: 0,
            numbers: FxHashMap::default(),
            touched: Vec::new(),
            polled: Box::new([ffi::ibv_wc::default(); POLL_BATCH]),
            room,
            added: 0,
            sleeping: false,
            followers: 0,
            watched: false,
            timer: None,
            armed: false,
            ended: None,
            released: Released::default(),
        }
    }

    /// Adds a queue pair, and returns its key.
    ///
    /// # Errors
    /// The room that is left, which is not enough.
    pub(super) fn add(&mut self, mut queues: Queues) -> Result<usize, u32> {
        self.room = self.room.checked_sub(queues.room).ok_or(self.room)?;
        queues.set_origin(self.added);
        self.added += 1;
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
        if let Some(twin) = queues.twin.and_then(|twin| self.pairs.get_mut(twin)) {
            // The key is given to another connection.
            twin.twin = None;
        }
        queues
    }

    /// Gives back the room of a queue pair that was destroyed: no completion of it comes any more, and those in the queue
    /// were taken.
    pub(super) fn give_back(&mut self, room: u32) {
        self.room += room;
    }

    /// # Errors
    /// There are no notifications.
    pub(super) fn check_pool(&self) -> Result<(), RequestError> {
        match self.pool {
            Some(_) => Ok(()),
            None => Err(RequestError::NoNotifications { side: "this side" }),
        }
    }

    /// Takes the oldest notification of a queue pair.
    pub(super) fn take_of(&mut self, key: usize) -> Option<Notification> {
        self.pairs[key].arrivals.take()
    }

    /// Takes the oldest notification of one of the queue pairs, which take turns.
    pub(super) fn take_in_turn(&mut self) -> Option<Notification> {
        let has = |(key, pair): (usize, &Queues)| (pair.arrivals.len() > 0).then_some(key);
        let turn = self.turn;
        let later = self.pairs.iter().filter(|(key, _)| *key >= turn).find_map(has);
        let key = later.or_else(|| self.pairs.iter().find_map(has))?;
        self.turn = key + 1;
        self.take_of(key)
    }

    fn refill(&mut self) {
        let Some(pool) = &mut self.pool else { return };
        if let Err(error) = pool.refill() {
            self.fail(&error.to_string());
        }
    }

    /// Those who wait for a notification of a queue pair, or of any.
    fn waiters(&mut self, key: Option<usize>) -> Option<&mut Waiters> {
        match key {
            Some(key) => Some(&mut self.pairs.get_mut(key)?.arrivals.waiters),
            None => Some(&mut self.waiters),
        }
    }

    /// Wakes a task at the next notification.
    pub(super) fn add_waiter(&mut self, key: Option<usize>, number: u64, waker: &Waker) {
        let replaced = self.waiters(key).and_then(|waiters| waiters.add(number, waker));
        self.released.replaced.extend(replaced);
    }

    pub(super) fn remove_waiter(&mut self, key: Option<usize>, number: u64) {
        let replaced = self.waiters(key).and_then(|waiters| waiters.remove(number));
        self.released.replaced.extend(replaced);
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

    /// Whether it receives notifications, which no job stands for.
    pub(super) fn has_pool(&self) -> bool {
        self.pool.is_some()
    }

    /// Gives up a job, and returns it if it has ended.
    pub(super) fn abandon(&mut self, id: JobId) -> Option<Job> {
        let Self { pairs, released, .. } = self;
        pairs[id.pair].queue(id.side).abandon(id, released)
    }

    /// Whether this is earlier than the time at which somebody looks again.
    pub(super) fn is_before_timer(&self, end: Option<Instant>) -> bool {
        end.is_some_and(|end| self.timer.is_none_or(|timer| end < timer))
    }

    /// Wakes the tasks whose time is up. Returns when it is to be called again.
    pub(super) fn wake_overdue(&mut self) -> Option<Instant> {
        let (now, Self { pairs, released, .. }) = (Instant::now(), self);
        pairs.iter_mut().filter_map(|(_, pair)| pair.wake_overdue(now, released)).min()
    }

    /// Wakes all tasks once the lock is released.
    #[cfg(feature = "tokio")]
    pub(super) fn wake_all(&mut self) {
        let Self { pairs, released, waiters, .. } = self;
        released.wakers.extend(waiters.take_all());
        pairs.iter_mut().for_each(|(_, pair)| pair.wake_all(released));
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
        let (mut ended, mut received) = (false, false);
        for at in 0..taken {
            let completion = self.polled[at];
            // `None` if it was destroyed, or dropped meanwhile.
            let key = self.numbers.get(&completion.qp_num).copied();
            match (Pool::slot(&completion), key) {
                (Some(slot), key) => {
                    ended |= self.receive(slot, &completion, key);
                    received = true;
                }
                (None, Some(key)) => self.pairs[key].complete(&completion),
                (None, None) => {}
            }
            key.into_iter().for_each(|key| self.touch(key));
        }
        if received {
            self.refill();
        }
        ended |= self.advance(taken == POLL_BATCH);
        Step { taken, ended }
    }

    /// Posts, and ends the jobs that are over. Returns whether there were any, or a queue pair has failed.
    fn advance(&mut self, more: bool) -> bool {
        let (mut ended, mut touched) = (false, std::mem::take(&mut self.touched));
        for key in touched.drain(..) {
            let Some(pair) = self.pairs.get_mut(key) else { continue };
            ended |= pair.advance(more, &mut self.released);
            if pair.touched {
                self.touched.push(key);
            }
            let (twin, reason) = (pair.twin, pair.shared.reason().map(str::to_owned));
            let event = pair.shared.event();
            if let (Some(twin), Some(reason)) = (twin, reason)
                && let Some(twin_pair) = self.pairs.get(twin)
                && !twin_pair.shared.is_failed()
            {
                match event {
                    Some(event) => twin_pair.shared.fail_by(event),
                    None => twin_pair.shared.fail(|| reason),
                }
                self.touch(twin);
            }
        }
        if self.touched.is_empty() {
            // Its memory serves the next step.
            self.touched = touched;
        }
        ended
    }

    /// Takes a receive of the pool. Returns whether it has brought a notification.
    fn receive(&mut self, slot: u32, completion: &ffi::ibv_wc, key: Option<usize>) -> bool {
        let Some(pool) = &mut self.pool else { return false };
        pool.free(slot);
        let Some(pair) = key.map(|key| &mut self.pairs[key]) else { return false };
        if completion.error().is_some() {
            let Completion { status, .. } = Completion::from(*completion);
            if status != CompletionStatus::WR_FLUSH_ERR {
                pair.shared.fail(|| format!("a receive of a notification completed with {status}"));
            }
            return false;
        }
        let Some(imm) = completion.imm_data() else {
            pair.shared
                .fail(|| "the peer sent a message without immediate data, which is no notification".into());
            return false;
        };
        // The length beside immediate data may be that of a WRITE, which fills no receive.
        let written = completion.opcode() == ffi::ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM;
        let length = if written { 0 } else { completion.len() as u64 };
        let payload = match pool.payload(slot, length) {
            Ok(payload) => payload,
            Err(error) => {
                pair.shared.fail(|| format!("the payload of a notification cannot be read: {error}"));
                return false;
            }
        };
        let notification = Notification { id: u32::from_be(imm), payload, qp_num: completion.qp_num };
        if !pair.arrivals.push(notification) {
            if pair.shared.is_failed() {
                return false;
            }
            let reason = || {
                format!("the peer sent more notifications than the {} that wait to be taken", Arrivals::MAX)
            };
            pair.shared.fail(reason);
            return false;
        }
        self.released.wakers.extend(pair.arrivals.waiters.take_all());
        self.released.wakers.extend(self.waiters.take_all());
        true
    }

    /// Ends the notifications of all queue pairs. Keeps the first reason.
    pub(super) fn end(&mut self, reason: &str) {
        self.ended.get_or_insert_with(|| reason.to_owned());
        self.released.wakers.extend(self.waiters.take_all());
    }

    /// Why there are no more notifications of any queue pair.
    pub(super) fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// Fails all queue pairs, because the device or its descriptors failed.
    pub(super) fn fail(&mut self, reason: &str) {
        self.end(reason);
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
