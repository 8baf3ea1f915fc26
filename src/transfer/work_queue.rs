//! One direction of a connection: its queue of work requests, and the transfer in flight there.
//!
//! All memory for work requests is allocated with the queue. A request is posted only into a free in-flight
//! record, and there are as many records as the queue is deep, so neither the queue nor its completion queue can
//! overrun.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dma_sg::Iova;

use super::ConnectionOptions;
use super::error::{Error, Result};
use super::request::{Job, Message, Request};
use super::shared::{POLL_BATCH, Shared, Side};
use crate::verbs::{
    self, Completion, CompletionQueue, CompletionStatus, Opcode, RecvBatch, RemoteAddr, SendBatch, ffi,
};

/// Longest time for a queue pair in the error state to flush, which needs no reply from the peer. Afterwards the
/// queue pair is reset, which discards its work requests.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum number of bytes in a work request chain. Only the last request of a chain is signaled, so progress is
/// visible only when that one completes.
const MAX_CHAIN_BYTES: u64 = 64 << 20;

enum Batch {
    Send(SendBatch),
    Recv(RecvBatch),
}

/// The bytes of a work request in flight.
#[derive(Debug, Clone, Copy, Default)]
struct InFlight {
    end: u64,
    length: u64,
}

pub(super) struct WorkQueue {
    pub shared: Arc<Shared>,
    /// For its channel; completions are taken through `shared`.
    pub completions: CompletionQueue,
    side: Side,
    /// The transfer in flight. It holds handles of its memory until the device is done, even if the caller forgets
    /// the `Transfer`.
    pub job: Option<Job>,
    /// Whether the job is a receive that its `Transfer` left posted, for the next one to take up.
    pub parked: bool,
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
    /// Number of the job's first work request, and of the first one that is not known to have succeeded.
    first: u64,
    succeeded: u64,
    /// The job's first failure, until `poll` returns it.
    failure: Option<Error>,
    /// Whether a request of the job failed. Later completions only say that the device is done with the memory.
    broken: bool,
    /// Bytes of the job that are transferred for certain.
    pub done: u64,
    pub imm: Option<u32>,
    polled: Box<[ffi::ibv_wc; POLL_BATCH]>,
}

impl fmt::Debug for WorkQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { next, completed, .. } = self;
        f.debug_struct("WorkQueue").field("next", next).field("completed", completed).finish_non_exhaustive()
    }
}

impl WorkQueue {
    pub(super) fn new(
        side: Side,
        shared: Arc<Shared>,
        completions: CompletionQueue,
        options: &ConnectionOptions,
    ) -> Self {
        let (depth, chain) = (options.window as usize, options.chain as usize);
        let max_sge = options.queue_pair.max_sge as usize;
        let batch = match side {
            Side::Send => Batch::Send(SendBatch::new(chain, max_sge)),
            Side::Recv => Batch::Recv(RecvBatch::new(chain, max_sge)),
        };
        Self {
            shared,
            completions,
            side,
            job: None,
            parked: false,
            batch,
            chain,
            depth,
            in_flight: vec![InFlight::default(); depth.next_power_of_two()].into(),
            next: 0,
            completed: 0,
            first: 0,
            succeeded: 0,
            failure: None,
            broken: false,
            done: 0,
            imm: None,
            polled: Box::new([ffi::ibv_wc::default(); POLL_BATCH]),
        }
    }

    /// Whether no work request is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.next == self.completed
    }

    /// Whether every message of the job was posted and succeeded.
    pub(super) fn is_complete(&self) -> bool {
        self.succeeded == self.next && self.job.as_ref().is_some_and(Job::is_whole)
    }

    /// Whether no message of the job has completed.
    pub(super) fn is_untouched(&self) -> bool {
        self.completed == self.first
    }

    pub(super) fn opcode(&self) -> Opcode {
        self.job.as_ref().map_or(Opcode::Recv, |job| job.request.opcode())
    }

    /// Checks a request and makes it the current job, in messages of at most `message_size` bytes. A receive that is
    /// still posted is taken up again.
    pub(super) fn admit(&mut self, request: Request, message_size: u64) -> Result<()> {
        let shared = &*self.shared;
        let message_size = message_size.clamp(1, shared.max_message_size);
        if let Some(job) = self.job.as_ref().filter(|_| self.parked) {
            if job.is_same_recv(&request, message_size) {
                // Even if the connection has failed since: the message may have come before.
                self.parked = false;
                return Ok(());
            }
            shared.check_usable(0)?;
            return Err(Error::ReceivePosted { length: job.length });
        }
        if !self.is_idle() {
            self.abandon(|| "a transfer in flight was forgotten".into());
            self.job = None;
        }
        let shared = &*self.shared;
        shared.check_usable(0)?;
        shared.pair.check_depth(request.opcode())?;
        request.check(&shared.domain, message_size, shared.options.max_sge)?;
        if shared.domain.context().is_iwarp() {
            request.check_iwarp()?;
        }
        if self.side == Side::Send {
            shared.check_ready()?;
        }
        (self.done, self.imm) = (0, None);
        (self.first, self.succeeded) = (self.next, self.next);
        self.job = Some(Job::new(request, message_size));
        Ok(())
    }

    /// Posts as many messages as the window permits, in whole chains, so that a chain is posted while others are in
    /// flight.
    pub(super) fn post(&mut self) -> Result<()> {
        loop {
            let Some(job) = self.job.as_mut().filter(|job| !job.is_posted()) else { return Ok(()) };
            let free = self.depth - (self.next - self.completed) as usize;
            if free < self.chain {
                return Ok(());
            }
            let before = job.posted;
            let (mut count, mask) = (0, self.in_flight.len() - 1);
            let most = self.shared.pair.max_sge(job.request.opcode()) as usize;
            while count < self.chain && job.posted - before < MAX_CHAIN_BYTES && !job.is_posted() {
                let number = self.next;
                let length = match &mut self.batch {
                    Batch::Send(batch) => {
                        let (wr, elements) = batch.next();
                        let Message { sges, bytes, operation } = job.next_message(&mut elements[..most]);
                        operation.unwrap_or(verbs::Operation::Send).fill(wr, bytes)?;
                        (wr.wr_id, wr.num_sge) = (number, sges);
                        batch.add();
                        bytes
                    }
                    Batch::Recv(batch) => {
                        let (wr, elements) = batch.next();
                        let Message { sges, bytes, .. } = job.next_message(elements);
                        (wr.wr_id, wr.num_sge) = (number, sges);
                        batch.add();
                        bytes
                    }
                };
                self.in_flight[number as usize & mask] = InFlight { end: job.posted, length };
                self.next += 1;
                count += 1;
            }
            self.post_chain(count)?;
        }
    }

    fn post_chain(&mut self, count: usize) -> Result<()> {
        let posted = match &mut self.batch {
            Batch::Send(batch) => {
                batch.signal_last();
                batch.post(&self.shared.pair)
            }
            Batch::Recv(batch) => batch.post(&self.shared.pair),
        };
        posted.map_err(|(posted, source): (usize, io::Error)| {
            self.next -= (count - posted) as u64;
            if let Some(job) = &mut self.job {
                job.fail();
            }
            self.shared.pair.post_error(self.opcode(), source).into()
        })
    }

    /// Processes the completions in the queue, at most 16, and returns how many.
    ///
    /// # Errors
    /// The first failure of the job. Later work requests may still be in flight.
    pub(super) fn poll(&mut self) -> Result<usize> {
        let count = self.take_completions()?;
        match self.failure.take() {
            Some(error) => Err(error),
            None => Ok(count),
        }
    }

    fn take_completions(&mut self) -> verbs::Result<usize> {
        let count = self.shared.poll(self.side, &mut self.polled)?;
        for at in 0..count {
            let completion = self.polled[at];
            self.complete(&completion);
        }
        Ok(count)
    }

    fn complete(&mut self, wc: &ffi::ibv_wc) {
        let number = wc.wr_id();
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
        (self.done, self.succeeded) = (end - length, number);
        if wc.error().is_some() {
            self.broken = true;
            self.failure = Some(self.failed(end - length, length, Completion::from(*wc)));
            return;
        }
        if let Batch::Recv(_) = self.batch {
            let (received, imm) = (wc.len() as u64, wc.imm_data().map(u32::from_be));
            self.imm = imm;
            // With immediate data the length may be that of its WRITE.
            if received != length && !(length == 0 && imm.is_some()) {
                self.broken = true;
                self.failure =
                    Some(Error::UnexpectedMessage { offset: end - length, expected: length, received });
                return;
            }
        }
        (self.done, self.succeeded) = (end, number + 1);
    }

    fn failed(&self, offset: u64, length: u64, completion: Completion) -> Error {
        let Completion { status, vendor_err, .. } = completion;
        if status == CompletionStatus::WR_FLUSH_ERR
            && let Some(reason) = self.shared.reason_of_flush(self.side)
        {
            return Error::Unusable { reason, done: self.done };
        }
        let remote = self.job.as_ref().and_then(|job| job.request.remote_addr(offset));
        let remote = remote.map(|RemoteAddr { addr, rkey }| (Iova(addr), rkey));
        let hint = self.shared.hint(Some(status));
        let opcode = self.opcode();
        Error::Failed { opcode, offset, length, remote, status, vendor_err, hint, done: self.done }
    }

    /// Ends the connection, and waits until the device is done with all work requests in flight. Those that
    /// completed before count.
    pub(super) fn abandon(&mut self, reason: impl FnOnce() -> String) {
        self.shared.fail(reason);
        if !self.shared.pair.is_own() {
            // A child of `fork`: the queue pair is the parent's.
            (self.completed, self.job) = (self.next, None);
            return;
        }
        let start = Instant::now();
        while !self.is_idle() {
            // Read before the queue, so that no completion of before the reset is missed.
            let discarded = self.shared.is_discarded();
            match self.take_completions() {
                Ok(1..) => {}
                Ok(0) if !discarded && start.elapsed() < FLUSH_TIMEOUT => {
                    std::thread::sleep(Duration::from_micros(200));
                }
                Ok(0) | Err(_) => {
                    if !discarded {
                        self.shared.discard();
                    }
                    self.completed = self.next;
                }
            }
        }
        self.parked = false;
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        if !self.is_idle() {
            self.abandon(|| "half of the connection was dropped with a transfer in flight".into());
        }
    }
}
