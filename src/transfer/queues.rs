//! Both work queues of a queue pair, and what they need of their engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ConnectionOptions;
use super::arrivals::Arrivals;
use super::job::JobId;
use super::shared::Shared;
use super::state::Released;
use super::work_queue::{Side, WorkQueue};
use crate::mr::{Blocks, RegionSlice};
use crate::verbs::ffi;

/// Longest time for a queue pair in the error state to flush, which needs no reply from the peer. Afterwards the
/// queue pair is reset, which discards its work requests.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) struct Queues {
    pub shared: Arc<Shared>,
    queues: [WorkQueue; 2],
    pub arrivals: Arrivals,
    /// Key of the connection's other queue pair: if one of them fails, so does the other.
    pub twin: Option<usize>,
    stall_timeout: Duration,
    /// Completions of the queue that are reserved for this queue pair.
    pub room: u32,
    /// Whether the engine is to look at it in its next step.
    pub touched: bool,
    /// Whether completions of it were taken in this step.
    taken: bool,
    /// Whether its failure was seen here.
    failed: bool,
    /// When a flush of the failed queue pair is given up.
    pub flush_until: Option<Instant>,
    /// Memory that the device may still access, because the queue pair could not be reset.
    kept: Vec<Blocks<RegionSlice>>,
}

impl Queues {
    pub(super) fn new(shared: Arc<Shared>, options: &ConnectionOptions, room: u32) -> Self {
        Self {
            shared,
            queues: [WorkQueue::new(Side::Send, options), WorkQueue::new(Side::Recv, options)],
            arrivals: Arrivals::default(),
            twin: None,
            stall_timeout: options.stall_timeout,
            room,
            touched: false,
            taken: false,
            failed: false,
            flush_until: None,
            kept: Vec::new(),
        }
    }

    pub(super) fn queue(&mut self, side: Side) -> &mut WorkQueue {
        &mut self.queues[side as usize]
    }

    /// Makes its work requests differ from those of the queue pairs that were added before, whose completions may still
    /// come under the same queue pair number.
    pub(super) fn set_origin(&mut self, added: u64) {
        self.queues.iter_mut().for_each(|queue| queue.set_origin(added));
    }

    /// Ends a job of which nothing was posted, and nothing will be.
    pub(super) fn withdraw(&mut self, id: JobId, released: &mut Released) {
        self.queues[id.side as usize].withdraw(id, &self.shared, released);
    }

    /// What holds memory for the device. What else is here is dropped.
    pub(super) fn into_memory(self) -> ([WorkQueue; 2], Vec<Blocks<RegionSlice>>) {
        (self.queues, self.kept)
    }

    /// Whether a job has not ended.
    pub(super) fn has_jobs(&self) -> bool {
        self.queues.iter().any(WorkQueue::has_jobs)
    }

    /// Wakes the tasks whose time is up. Returns when it is to be called again.
    pub(super) fn wake_overdue(&mut self, now: Instant, released: &mut Released) -> Option<Instant> {
        let queues = self.queues.iter_mut();
        let next = queues.filter_map(|queue| queue.wake_overdue(now, self.stall_timeout, released)).min();
        [next, self.flush_until].into_iter().flatten().min()
    }

    /// Wakes all tasks.
    #[cfg(feature = "tokio")]
    pub(super) fn wake_all(&mut self, released: &mut Released) {
        released.wakers.extend(self.arrivals.waiters.take_all());
        self.queues.iter_mut().for_each(|queue| queue.wake_all(released));
    }

    pub(super) fn complete(&mut self, completion: &ffi::ibv_wc) {
        self.taken = true;
        self.queues[Side::of(completion) as usize].complete(completion, &self.shared);
    }

    /// Posts, and ends the jobs that are over. Returns whether any has ended, or the queue pair has failed. `more`
    /// completions may be in the queue.
    pub(super) fn advance(&mut self, more: bool, released: &mut Released) -> bool {
        let Self { shared, queues, .. } = self;
        for queue in queues.iter_mut().filter(|_| !shared.is_failed()) {
            if let Err(error) = queue.post(shared) {
                shared.fail(|| error.to_string());
            }
        }
        if !std::mem::take(&mut self.taken) && self.shared.is_failed() {
            self.check_flush();
        }
        let Self { shared, queues, .. } = self;
        let mut ended = false;
        for queue in queues {
            ended |= queue.settle(shared, more, released);
        }
        let failed = shared.is_failed();
        // Until everything is flushed.
        let idle = self.is_idle();
        self.touched = more || failed && !idle;
        if idle {
            self.flush_until = None;
        }
        let fails = failed && !std::mem::replace(&mut self.failed, failed);
        if fails {
            released.wakers.extend(self.arrivals.waiters.take_all());
        }
        ended | fails
    }

    fn is_idle(&self) -> bool {
        self.queues.iter().all(WorkQueue::is_idle)
    }

    /// Gives up on requests in flight that a failed queue pair does not flush.
    fn check_flush(&mut self) {
        if self.is_idle() {
            return;
        }
        let now = Instant::now();
        let until = *self.flush_until.get_or_insert(now + FLUSH_TIMEOUT);
        if now >= until {
            self.discard();
        }
    }

    /// Ends what is in flight without completions.
    pub(super) fn discard(&mut self) {
        if !self.shared.discard() {
            self.kept.extend(self.queues.iter().flat_map(WorkQueue::memory));
        }
        self.queues.iter_mut().for_each(WorkQueue::discard);
        self.flush_until = None;
    }
}
