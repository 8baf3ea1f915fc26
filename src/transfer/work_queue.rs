//! One direction of a connection: its jobs in order, and its queue of work requests.
//!
//! All memory for work requests is allocated with the queue. A request is posted only into a free in-flight
//! record, and there are as many records as the queue is deep, so neither the queue nor its completion queue can
//! overrun.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use dma_sg::Iova;
use slab::Slab;

use super::error::{Error, Result};
use super::job::{Ending, Job, JobId, Message, Owner};
use super::request::Request;
use super::shared::Shared;
use super::state::Released;
use super::{ConnectionOptions, Transferred};
use crate::mr::{Blocks, RegionSlice};
use crate::verbs::{self, Completion, CompletionStatus, Opcode, RecvBatch, RemoteAddr, SendBatch, ffi};

/// Bytes after which a work request chain ends. Only the last request of a chain is signaled, so progress is visible
/// only when that one completes.
const CHAIN_BYTES: u64 = 4 << 20;

/// Work requests after which the numbers of a queue may meet those of the next one.
const ORIGIN_SHIFT: u32 = 40;

/// A direction of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Send,
    Recv,
}

impl Side {
    /// The bit of a work request's identifier that tells its direction.
    const BIT: u64 = 1 << 63;

    /// The direction of a completion.
    pub(super) fn of(completion: &ffi::ibv_wc) -> Self {
        if completion.wr_id() & Self::BIT == 0 { Self::Send } else { Self::Recv }
    }

    fn wr_id(self, number: u64) -> u64 {
        if self == Self::Send { number } else { number | Self::BIT }
    }
}

enum Batch {
    Send(SendBatch),
    Recv(RecvBatch),
}

/// The bytes of a work request in flight.
#[derive(Debug, Clone, Copy, Default)]
struct InFlight {
    /// Where its bytes end in its job.
    end: u64,
    length: u64,
}

pub(super) struct WorkQueue {
    side: Side,
    /// Those that have not ended, and those whose owners have not taken the outcome.
    jobs: Slab<Job>,
    /// Keys of the jobs in the order in which they are posted. The first one has not ended.
    row: VecDeque<usize>,
    /// Jobs at the front of the row of which everything is posted.
    posted: usize,
    /// Number of the next job.
    next_job: u64,
    /// Number of receives that were left posted.
    parked: usize,
    /// No job has an earlier deadline.
    earliest: Option<Instant>,
    batch: Batch,
    /// Maximum number of work requests in a chain.
    chain: usize,
    depth: usize,
    /// Records by work request number, modulo their count: a power of two, at least `depth`.
    in_flight: Box<[InFlight]>,
    /// Number of the next work request.
    next: u64,
    /// Number of the first work request that may still be in flight.
    completed: u64,
    /// `completed` at the last check, and since when.
    progress: (u64, Instant),
    /// Whether a request failed. Later completions only say that the device is done with the memory.
    broken: bool,
}

impl WorkQueue {
    pub(super) fn new(side: Side, options: &ConnectionOptions) -> Self {
        let (depth, chain) = (options.window as usize, options.chain as usize);
        let max_sge = options.queue_pair.max_sge as usize;
        let batch = match side {
            Side::Send => Batch::Send(SendBatch::new(chain, max_sge)),
            Side::Recv => Batch::Recv(RecvBatch::new(chain, max_sge)),
        };
        Self {
            side,
            jobs: Slab::new(),
            row: VecDeque::new(),
            posted: 0,
            next_job: 0,
            parked: 0,
            earliest: None,
            batch,
            chain,
            depth,
            in_flight: vec![InFlight::default(); depth.next_power_of_two()].into(),
            next: 0,
            completed: 0,
            progress: (0, Instant::now()),
            broken: false,
        }
    }

    /// Sets the numbers of the work requests apart from those of `added` earlier queues.
    pub(super) fn set_origin(&mut self, added: u64) {
        self.next = (added % (1 << (62 - ORIGIN_SHIFT - 1))) << ORIGIN_SHIFT;
        self.completed = self.next;
        self.progress.0 = self.next;
    }

    /// Whether no work request is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.next == self.completed
    }

    /// Adds a job. Returns its key and number.
    pub(super) fn push(&mut self, request: Request, message_size: u64) -> (usize, u64) {
        if self.is_idle() {
            self.progress = (self.completed, Instant::now());
        }
        let number = self.next_job;
        self.next_job += 1;
        let key = self.jobs.insert(Job::new(request, message_size, number));
        self.row.push_back(key);
        (key, number)
    }

    /// A job that may have ended and gone, or have another owner.
    pub(super) fn find(&mut self, id: JobId) -> Option<&mut Job> {
        self.jobs.get_mut(id.key).filter(|job| job.number == id.number)
    }

    /// Gives up a job: nobody asks for its outcome any more. Returns it if it has ended.
    pub(super) fn abandon(&mut self, id: JobId, released: &mut Released) -> Option<Job> {
        let job = self.find(id)?;
        if job.over && !job.in_row {
            return Some(self.jobs.remove(id.key));
        }
        job.owner = Owner::Nobody;
        released.wakers.extend(job.waker.take());
        if job.over {
            // It leaves its place in the row later.
            released.requests.push(job.take_request());
        }
        None
    }

    /// Leaves a receive posted for its next owner.
    pub(super) fn park(&mut self, id: JobId) {
        if let Some(job) = self.find(id) {
            (job.owner, job.deadline, job.ending) = (Owner::Parked, None, None);
            self.parked += 1;
        }
    }

    /// Gives a receive that was left posted to a new owner: the first one for the same memory. Returns its key and
    /// number.
    ///
    /// # Errors
    /// The length of another one.
    pub(super) fn adopt(
        &mut self,
        request: &Request,
        message_size: u64,
    ) -> Result<Option<(usize, u64)>, u64> {
        if self.parked == 0 {
            return Ok(None);
        }
        let parked = self.jobs.iter_mut().filter(|(_, job)| job.owner == Owner::Parked);
        let same = |job: &Job| job.message_size == message_size && job.request.is_same_recv(request);
        let first =
            parked.map(|(key, job)| (!same(job), job.number, key, job)).min_by_key(|all| (all.0, all.1));
        match first {
            None => Ok(None),
            Some((true, _, _, job)) => Err(job.length),
            Some((false, _, key, job)) => {
                // Under a new number, so that earlier owners have no say.
                (job.owner, job.number) = (Owner::Transfer, self.next_job);
                self.next_job += 1;
                self.parked -= 1;
                Ok(Some((key, job.number)))
            }
        }
    }

    /// Whether a job has not ended.
    pub(super) fn has_jobs(&self) -> bool {
        !self.row.is_empty()
    }

    /// Whether the job waits for its first completion.
    pub(super) fn is_untouched(&mut self, id: JobId) -> bool {
        let completed = self.completed;
        self.find(id).is_some_and(|job| job.waits(completed))
    }

    /// Since when no work request has completed although some are in flight; `None` if nothing is due: a receive waits
    /// for the first message of its peer.
    pub(super) fn stalled_since(&mut self, now: Instant) -> Option<Instant> {
        if self.progress.0 != self.completed {
            self.progress = (self.completed, now);
        }
        let first = self.row.front().map(|&key| &self.jobs[key]);
        let waits = self.side == Side::Recv && first.is_none_or(|job| job.waits(self.completed));
        (!waits).then_some(self.progress.1)
    }

    /// Limits the time for a job.
    pub(super) fn set_deadline(&mut self, id: JobId, deadline: (Duration, Instant)) {
        if let Some(job) = self.find(id) {
            job.deadline = Some(deadline);
            self.earliest = Some(self.earliest.map_or(deadline.1, |earliest| earliest.min(deadline.1)));
        }
    }

    /// Wakes the tasks whose time is up: they look at their timeouts when they are polled. Returns when it is to be called
    /// again.
    pub(super) fn wake_overdue(
        &mut self,
        now: Instant,
        stall_timeout: Duration,
        released: &mut Released,
    ) -> Option<Instant> {
        let stalled = self.has_jobs().then(|| self.stalled_since(now)).flatten();
        let stalls = stalled.and_then(|since| since.checked_add(stall_timeout));
        let stall = stalls.is_some_and(|end| end <= now);
        if stall || self.earliest.is_some_and(|earliest| earliest <= now) {
            self.earliest = None;
            for &key in &self.row {
                let job = &mut self.jobs[key];
                let end = job.deadline.map(|(_, end)| end);
                if stall || end.is_some_and(|end| end <= now) {
                    released.wakers.extend(job.waker.take());
                } else {
                    self.earliest = [self.earliest, end].into_iter().flatten().min();
                }
            }
        }
        [stalls.filter(|_| !stall), self.earliest].into_iter().flatten().min()
    }

    /// Wakes all tasks.
    #[cfg(feature = "tokio")]
    pub(super) fn wake_all(&mut self, released: &mut Released) {
        released.wakers.extend(self.jobs.iter_mut().filter_map(|(_, job)| job.waker.take()));
    }

    /// Posts as many messages as the window permits, in whole chains, so that a chain is posted while others are in
    /// flight.
    pub(super) fn post(&mut self, shared: &Shared) -> Result<()> {
        while self.posted < self.row.len() && !self.broken {
            let free = self.depth - (self.next - self.completed) as usize;
            if free < self.chain {
                return Ok(());
            }
            let before = (self.posted, self.next);
            self.fill_chain(shared)?;
            let count = (self.next - before.1) as usize;
            self.post_chain(shared, count, before.0)?;
        }
        Ok(())
    }

    fn fill_chain(&mut self, shared: &Shared) -> Result<()> {
        let (mut count, mut bytes) = (0, 0);
        let mask = self.in_flight.len() - 1;
        while count < self.chain && bytes < CHAIN_BYTES {
            let Some(&key) = self.row.get(self.posted) else { return Ok(()) };
            let job = &mut self.jobs[key];
            if job.is_posted() {
                self.posted += 1;
                continue;
            }
            let number = self.next;
            if !job.is_begun() {
                (job.first, job.end, job.succeeded) = (number, number, number);
            }
            let length = match &mut self.batch {
                Batch::Send(batch) => {
                    let (wr, elements) = batch.next();
                    let most = shared.pair.max_sge(job.opcode) as usize;
                    let Message { sges, bytes, operation } = job.next_message(&mut elements[..most]);
                    operation.unwrap_or(verbs::Operation::Send).fill(wr, bytes)?;
                    (wr.wr_id, wr.num_sge) = (self.side.wr_id(number), sges);
                    if job.is_posted() {
                        // Its end must not wait for the transfers behind it.
                        wr.send_flags |= ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
                    }
                    if !job.request.payload.is_empty() {
                        wr.send_flags |= ffi::ibv_send_flags::IBV_SEND_INLINE.0;
                    }
                    batch.add();
                    bytes
                }
                Batch::Recv(batch) => {
                    let (wr, elements) = batch.next();
                    let Message { sges, bytes, .. } = job.next_message(elements);
                    (wr.wr_id, wr.num_sge) = (self.side.wr_id(number), sges);
                    batch.add();
                    bytes
                }
            };
            self.in_flight[number as usize & mask] = InFlight { end: job.posted, length };
            job.end = number + 1;
            self.next += 1;
            (count, bytes) = (count + 1, bytes + length);
        }
        Ok(())
    }

    /// Posts the chain of `count` requests, which belong to the jobs from the one at `from`.
    fn post_chain(&mut self, shared: &Shared, count: usize, from: usize) -> Result<()> {
        let posted = match &mut self.batch {
            Batch::Send(batch) => {
                batch.signal_last();
                batch.post(&shared.pair)
            }
            Batch::Recv(batch) => batch.post(&shared.pair),
        };
        posted.map_err(|(posted, source): (usize, io::Error)| {
            self.next -= (count - posted) as u64;
            let mut refused = None;
            for &key in self.row.range(from..) {
                let job = &mut self.jobs[key];
                if job.end <= self.next {
                    continue;
                }
                (job.first, job.end) = (job.first.min(self.next), self.next);
                job.succeeded = job.succeeded.min(job.end);
                refused.get_or_insert(job.opcode);
                job.fail();
            }
            self.posted = from;
            let opcode = refused.unwrap_or(Opcode::Recv);
            shared.pair.post_error(opcode, source).into()
        })
    }

    /// Processes a completion of this queue.
    pub(super) fn complete(&mut self, wc: &ffi::ibv_wc, shared: &Shared) {
        let number = wc.wr_id() & !Side::BIT;
        // Also false for numbers before `completed`.
        if number.wrapping_sub(self.completed) >= self.next - self.completed {
            tracing::warn!(number, "a completion of no work request in flight");
            return;
        }
        let InFlight { end, length } = self.in_flight[number as usize & (self.in_flight.len() - 1)];
        self.completed = number + 1;
        if self.broken {
            return;
        }
        // Unsignaled requests before this one have succeeded.
        let mut row = self.row.iter();
        let job = loop {
            let Some(&key) = row.next() else { return };
            let job = &mut self.jobs[key];
            if job.end > number {
                break job;
            }
            (job.done, job.succeeded) = (job.posted, job.end);
        };
        (job.done, job.succeeded) = (end - length, number);
        if wc.error().is_some() {
            self.broken = true;
            let completion = Completion::from(*wc);
            if completion.status != CompletionStatus::WR_FLUSH_ERR {
                let error = failed(job, end - length, length, completion, shared);
                shared.fail(|| error.to_string());
                job.failure = Some(Box::new(error));
            }
            return;
        }
        if self.side == Side::Recv {
            let (received, imm) = (wc.len() as u64, wc.imm_data().map(u32::from_be));
            job.imm = imm;
            // The length beside immediate data may be that of a WRITE, which fills no receive.
            let written = wc.opcode() == ffi::ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM;
            if if written { length > 0 } else { received != length } {
                self.broken = true;
                let error = Error::UnexpectedMessage { offset: end - length, expected: length, received };
                shared.fail(|| error.to_string());
                job.failure = Some(Box::new(error));
                return;
            }
        }
        (job.done, job.succeeded) = (end, number + 1);
    }

    /// The memory of what is in flight.
    pub(super) fn memory(&self) -> impl Iterator<Item = Blocks<RegionSlice>> {
        let jobs = self.jobs.iter().map(|(_, job)| job).filter(|job| !job.over);
        jobs.filter_map(|job| job.request.local.clone())
    }

    /// Counts everything in flight as completed: the device is done with it without completions.
    pub(super) fn discard(&mut self) {
        self.broken |= !self.is_idle();
        self.completed = self.next;
    }

    /// Ends the jobs whose last completion was taken: gives them their outcome, and releases their tasks. Returns whether
    /// there were any. `more` completions may be in the queue.
    pub(super) fn settle(&mut self, shared: &Shared, more: bool, released: &mut Released) -> bool {
        if self.broken && !shared.is_failed() {
            if more {
                // The cause of the flush may be among them.
                return false;
            }
            self.fail_unexplained(shared);
        }
        let (mut any, failed) = (false, shared.is_failed());
        while let Some(&key) = self.row.front() {
            let job = &mut self.jobs[key];
            if failed {
                // Nothing more is posted.
                job.stop();
            }
            if !job.over {
                if !job.is_posted() || self.completed < job.end {
                    break;
                }
                end(job, shared, released);
                any = true;
            }
            self.row.pop_front();
            job.in_row = false;
            if job.is_forgotten() {
                self.parked -= usize::from(job.owner == Owner::Parked);
                released.requests.push(self.jobs.remove(key).request);
            }
            self.posted = self.posted.saturating_sub(1);
        }
        if failed {
            for &key in &self.row {
                let job = &mut self.jobs[key];
                if !job.is_begun() && !job.over {
                    job.stop();
                    end(job, shared, released);
                    any = true;
                }
            }
        }
        any
    }

    /// Requests were flushed, and no completion says why. Brings the queue pair to the error state, since a device that
    /// did so itself may leave some requests in its queue.
    fn fail_unexplained(&mut self, shared: &Shared) {
        if let Some(event) = shared.cause() {
            shared.fail_by(event);
            return;
        }
        let status = CompletionStatus::WR_FLUSH_ERR;
        let completion = Completion { status, ..Completion::from(ffi::ibv_wc::default()) };
        let unfinished = |key: &&usize| !self.jobs[**key].over && !self.jobs[**key].is_complete();
        match self.row.iter().find(unfinished) {
            Some(&key) => {
                let job = &mut self.jobs[key];
                let error = failed(job, job.done, job.length - job.done, completion, shared);
                shared.fail(|| error.to_string());
                job.failure = Some(Box::new(error));
            }
            None => shared.fail(|| format!("a request completed with {status}")),
        }
    }

    /// Ends a job of which nothing was posted, and nothing will be.
    pub(super) fn withdraw(&mut self, id: JobId, shared: &Shared, released: &mut Released) {
        if let Some(job) = self.find(id) {
            job.stop();
            end(job, shared, released);
        }
    }
}

/// Gives a job its outcome, and releases its task.
fn end(job: &mut Job, shared: &Shared, released: &mut Released) {
    job.over = true;
    job.outcome = Some(match job.is_complete() {
        true => Ok(Transferred { bytes: job.length, imm: job.imm }),
        false => Err(reason(job, shared)),
    });
    released.wakers.extend(job.waker.take());
}

/// Why a job did not complete.
fn reason(job: &mut Job, shared: &Shared) -> Box<Error> {
    let Job { opcode, done, length, .. } = *job;
    if let Some(error) = job.failure.take() {
        return error;
    }
    let usable = !shared.is_failed();
    Box::new(match job.ending {
        Some(Ending::Cancelled) => Error::Cancelled { opcode, done, length, usable },
        Some(Ending::TimedOut(timeout)) => {
            Error::Timeout { opcode, done, length, timeout, hint: shared.hint(None), usable }
        }
        None if shared.is_disconnected() => Error::PeerDisconnected { opcode, done, length },
        None => shared.event_error(opcode, done, length).unwrap_or_else(|| {
            let reason = shared.reason().unwrap_or("its requests were discarded").to_owned();
            Error::Unusable { reason, done }
        }),
    })
}

/// The error of a message that completed with an error.
fn failed(job: &Job, offset: u64, length: u64, completion: Completion, shared: &Shared) -> Error {
    let Completion { status, vendor_err, .. } = completion;
    let remote = job.request.remote_addr(offset);
    let remote = remote.map(|RemoteAddr { addr, rkey }| (Iova(addr), rkey));
    let hint = shared.hint(Some(status));
    Error::Failed { opcode: job.opcode, offset, length, remote, status, vendor_err, hint, done: job.done }
}
