//! One direction of a connection: the requests under way in one queue of the pair.
//!
//! Everything that a request needs is made with the lane: its place in a batch, and a note of which bytes
//! it moves. The notes are as many as the queue is deep, and a request is posted only where one is free,
//! so neither the queue nor its completions, which have a queue as deep, can overrun.

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ibverbs_sys as ffi;

use super::RemoteAddr;
use super::request::{Job, Message, Request};
use crate::cm::Link;
use crate::error::TransferError;
use crate::umem::Iova;
use crate::verbs::{
    Completion, CompletionQueue, CompletionStatus, ProtectionDomain, QueuePair, RecvBatch, SendBatch,
};
use crate::{Error, Result};

/// Longest time for a stopped queue pair to hand back what was under way, which takes no answer from
/// anybody. Then it is reset, which forgets it.
const FLUSH: Duration = Duration::from_secs(1);

/// Bytes after which a list ends, however many requests it might have: its last request alone is answered,
/// and of what is not answered nobody knows that it moves.
const LIST: u64 = 64 << 20;

/// Completions that one call takes.
const REAP: usize = 16;

/// What both directions have in common.
pub(super) struct Shared {
    /// Set once it was connected by IP address. Dropped first, so that the peer is told.
    pub link: OnceLock<Link>,
    pub pair: QueuePair,
    pub domain: ProtectionDomain,
    pub max_message: u64,
    pub max_sge: u32,
    /// Why the connection is of no more use, once it is.
    pub failed: OnceLock<String>,
}

impl Shared {
    /// Whether the peer has disconnected, as far as that is known.
    pub(super) fn peer_left(&self) -> bool {
        self.link.get().is_some_and(Link::has_left)
    }

    #[inline]
    pub(super) fn check_usable(&self) -> Result<()> {
        #[cold]
        fn unusable(reason: &str) -> Error {
            TransferError::Unusable { reason: reason.into() }.into()
        }
        self.failed.get().map_or(Ok(()), |reason| Err(unusable(reason)))
    }

    /// Stops the queue pair for good. The first reason is kept.
    #[cold]
    pub(super) fn fail(&self, reason: &dyn Fn() -> String) {
        self.failed.get_or_init(reason);
        if let Err(error) = self.pair.stop() {
            // The device is gone, and took the requests with it.
            tracing::debug!(%error, "cannot stop a queue pair");
        }
    }
}

enum Batch {
    Send(SendBatch),
    Recv(RecvBatch),
}

/// The bytes of a request under way.
#[derive(Debug, Clone, Copy, Default)]
struct Flight {
    end: u64,
    length: u64,
}

pub(super) struct Lane {
    pub shared: Arc<Shared>,
    pub queue: CompletionQueue,
    batch: Batch,
    /// Requests to a list.
    most: usize,
    depth: usize,
    /// As many, and up to the next power of two.
    flights: Box<[Flight]>,
    /// Number of the next request, and of the first that is not known to have ended.
    next: u64,
    ended: u64,
    /// Bytes of the job that are known to have moved.
    pub done: u64,
    pub imm: Option<u32>,
    completions: Box<[ffi::ibv_wc; REAP]>,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { next, ended, .. } = self;
        f.debug_struct("Lane").field("next", next).field("ended", ended).finish_non_exhaustive()
    }
}

impl Lane {
    pub(super) fn sending(shared: Arc<Shared>, queue: CompletionQueue, depth: u32, batch: u32) -> Self {
        let most = batch.clamp(1, depth) as usize;
        let posts = Batch::Send(SendBatch::new(most, shared.max_sge as usize));
        Self::new(shared, queue, posts, most, depth)
    }

    pub(super) fn receiving(shared: Arc<Shared>, queue: CompletionQueue, depth: u32, batch: u32) -> Self {
        let most = batch.clamp(1, depth) as usize;
        let posts = Batch::Recv(RecvBatch::new(most, shared.max_sge as usize));
        Self::new(shared, queue, posts, most, depth)
    }

    fn new(shared: Arc<Shared>, queue: CompletionQueue, batch: Batch, most: usize, depth: u32) -> Self {
        Self {
            shared,
            queue,
            batch,
            most,
            depth: depth as usize,
            flights: vec![Flight::default(); depth.next_power_of_two() as usize].into(),
            next: 0,
            ended: 0,
            done: 0,
            imm: None,
            completions: Box::new([ffi::ibv_wc::default(); REAP]),
        }
    }

    /// Whether nothing is under way.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.next == self.ended
    }

    #[inline]
    fn flight(&mut self, number: u64) -> &mut Flight {
        let mask = self.flights.len() - 1;
        &mut self.flights[number as usize & mask]
    }

    /// Posts what there is room for, in whole lists: one while the others are under way.
    pub(super) fn post(&mut self, request: &Request<'_>, job: &mut Job) -> Result<()> {
        while !job.is_posted() {
            let free = self.depth - (self.next - self.ended) as usize;
            if free < self.most {
                break;
            }
            let (mut count, before) = (0, job.posted);
            while count < self.most && job.posted - before < LIST && !job.is_posted() {
                self.add(request, job)?;
                count += 1;
            }
            self.post_list(count, request)?;
        }
        Ok(())
    }

    /// Posts the first message of a job that is likely to have no other, so that it leaves soonest.
    // Inline and without a loop, whose next turn nothing has to be kept for: half as many instructions lie
    // between the caller and the device.
    #[inline(always)]
    pub(super) fn post_first(&mut self, request: &Request<'_>, job: &mut Job) -> Result<()> {
        if !job.is_small() {
            return Ok(());
        }
        self.add(request, job)?;
        self.post_list(1, request)
    }

    /// Adds the job's next message to the list. There is room.
    #[inline(always)]
    fn add(&mut self, request: &Request<'_>, job: &mut Job) -> Result<()> {
        let number = self.next;
        let bytes = match &mut self.batch {
            Batch::Send(batch) => {
                let (wr, places) = batch.next();
                let Message { elements, bytes, operation } = job.take(request, places);
                operation.fill(wr, bytes)?;
                (wr.wr_id, wr.num_sge) = (number, elements);
                batch.add();
                bytes
            }
            Batch::Recv(batch) => {
                let (wr, places) = batch.next();
                let Message { elements, bytes, .. } = job.take(request, places);
                (wr.wr_id, wr.num_sge) = (number, elements);
                batch.add();
                bytes
            }
        };
        *self.flight(number) = Flight { end: job.posted, length: bytes };
        self.next += 1;
        Ok(())
    }

    #[inline(always)]
    fn post_list(&mut self, count: usize, request: &Request<'_>) -> Result<()> {
        let posted = match &mut self.batch {
            Batch::Send(batch) => {
                batch.signal_last();
                batch.post(&self.shared.pair)
            }
            Batch::Recv(batch) => batch.post(&self.shared.pair),
        };
        posted.map_err(|refused| self.not_posted(count, refused, request))
    }

    #[cold]
    fn not_posted(
        &mut self,
        count: usize,
        (posted, source): (usize, io::Error),
        request: &Request<'_>,
    ) -> Error {
        self.next -= (count - posted) as u64;
        Error::Post { opcode: request.opcode(), source }
    }

    /// Takes the completions that are there, up to 16; how many.
    ///
    /// # Errors
    /// The first that failed, with everything behind it still under way.
    #[inline]
    pub(super) fn reap(&mut self, request: &Request<'_>) -> Result<usize> {
        let count = self.queue.take(&mut self.completions[..])?;
        for at in 0..count {
            let wc = &self.completions[at];
            let number = wc.wr_id();
            if wc.error().is_some() {
                let status = Completion::from(*wc).status;
                // Requests without a completion of their own, before this one, ended well.
                let flight = *self.flight(number);
                (self.ended, self.done) = (number + 1, flight.end - flight.length);
                return Err(self.failed(request, flight, status));
            }
            let (received, imm) = (wc.len() as u64, wc.imm_data().map(u32::from_be));
            let flight = *self.flight(number);
            (self.ended, self.done) = (number + 1, flight.end);
            if let Batch::Recv(_) = self.batch {
                self.imm = imm;
                // A number may come with a WRITE, whose length the receive is told and does not hold.
                if received != flight.length && !(flight.length == 0 && imm.is_some()) {
                    let (offset, expected) = (flight.end - flight.length, flight.length);
                    self.done = offset;
                    return Err(TransferError::UnexpectedMessage { offset, expected, received }.into());
                }
            }
        }
        Ok(count)
    }

    fn failed(&self, request: &Request<'_>, flight: Flight, status: CompletionStatus) -> Error {
        let Flight { end, length } = flight;
        let (offset, done) = (end - length, self.done);
        let place = request.place(offset).map(|RemoteAddr { addr, rkey }| (Iova(addr), rkey));
        TransferError::Failed { opcode: request.opcode(), offset, length, remote: place, status, done }.into()
    }

    /// Ends the connection and waits until the device is done with what was under way.
    #[cold]
    pub(super) fn abandon(&mut self, reason: &dyn Fn() -> String) {
        self.shared.fail(reason);
        let end = Instant::now() + FLUSH;
        while !self.is_idle() {
            match self.queue.take(&mut self.completions[..]) {
                Ok(0) if Instant::now() < end => std::thread::sleep(Duration::from_micros(200)),
                Ok(0) | Err(_) => {
                    if let Err(error) = self.shared.pair.reset() {
                        tracing::debug!(%error, "cannot reset a queue pair");
                    }
                    self.ended = self.next;
                }
                Ok(count) => {
                    for at in 0..count {
                        let wc = &self.completions[at];
                        let (number, fine) = (wc.wr_id(), wc.error().is_none());
                        self.ended = number + 1;
                        if fine {
                            self.done = self.flight(number).end;
                        }
                    }
                }
            }
        }
    }

    /// Checks a new request, to be done in messages of that size or what the port takes.
    #[inline(always)]
    pub(super) fn admit(&mut self, request: &Request<'_>, message: u64) -> Result<Job> {
        if !self.is_idle() {
            // A transfer was leaked, not dropped.
            self.abandon(&|| "a transfer was forgotten while it was under way".into());
        }
        (self.done, self.imm) = (0, None);
        let shared = &*self.shared;
        shared.check_usable()?;
        let message = message.clamp(1, shared.max_message);
        request.check(&shared.domain, message, shared.max_sge)?;
        Ok(Job::new(request, message))
    }
}
