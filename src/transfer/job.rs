//! A transfer in its queue: the messages that it is cut into, and what has become of them.

use std::ffi::c_int;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::Transferred;
use super::error::{Error, Result};
use super::request::Request;
use super::work_queue::Side;
use crate::mr::{RemoteCursor, SliceCursor};
use crate::verbs::{Opcode, Operation, ffi};

/// A job of an engine.
#[derive(Debug, Clone, Copy)]
pub(super) struct JobId {
    /// Key of its queue pair.
    pub pair: usize,
    pub side: Side,
    pub key: usize,
    /// Tells it from other jobs with the same key.
    pub number: u64,
}

/// Why a job was ended before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    TimedOut(Duration),
    Cancelled,
}

/// Who asks for the outcome of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Transfer,
    /// Nobody. Its memory stays until the device is done.
    Nobody,
    /// The next receive into the same memory: this one was dropped before its first message.
    Parked,
}

/// A request in its queue.
#[derive(Debug)]
pub(super) struct Job {
    /// Tells it from earlier jobs in its place.
    pub number: u64,
    /// Whether it has its place in the row of jobs.
    pub in_row: bool,
    pub request: Request,
    pub opcode: Opcode,
    /// Length in bytes.
    pub length: u64,
    pub message_size: u64,
    /// Bytes that are posted.
    pub posted: u64,
    /// Bytes that are transferred for certain.
    pub done: u64,
    pub imm: Option<u32>,
    /// Numbers of its work requests: the first one, the one after the last that is posted, and the one after the last
    /// that is known to have succeeded.
    pub first: u64,
    pub end: u64,
    pub succeeded: u64,
    /// A message of 0 bytes is still to be posted.
    empty_pending: bool,
    /// Nothing more is posted, although something is left.
    stopped: bool,
    cursor: Cursor,
    pub ending: Option<Ending>,
    /// The first failure of one of its messages.
    pub failure: Option<Box<Error>>,
    /// How it ended, until its `Transfer` takes it.
    pub outcome: Option<Result<Transferred, Box<Error>>>,
    /// Whether it has ended: the device is done with its memory.
    pub over: bool,
    pub owner: Owner,
    pub deadline: Option<(Duration, Instant)>,
    /// Whom to wake when it ends.
    pub waker: Option<Waker>,
}

/// The next byte to post.
#[derive(Debug)]
struct Cursor {
    /// Index of the block, and bytes left in it.
    block: usize,
    left: u64,
    local: Option<SliceCursor>,
    remote: RemoteCursor,
}

/// A message of a job.
pub(super) struct Message {
    /// Number of its elements, and of the bytes in them.
    pub sges: c_int,
    pub bytes: u64,
    /// `None` for a receive.
    pub operation: Option<Operation>,
}

impl Job {
    /// A request that was [checked](Request::check) for messages of this size.
    pub(super) fn new(request: Request, message_size: u64, number: u64) -> Self {
        let opcode = request.opcode();
        Self {
            number,
            in_row: true,
            opcode,
            length: request.len(),
            // An atomic is one message of 8 bytes.
            message_size: if opcode.is_atomic() { 8 } else { message_size },
            posted: 0,
            done: 0,
            imm: None,
            first: 0,
            end: 0,
            succeeded: 0,
            empty_pending: request.local.is_none(),
            stopped: false,
            cursor: Cursor::at_block(&request, 0),
            ending: None,
            failure: None,
            outcome: None,
            over: false,
            owner: Owner::Transfer,
            deadline: None,
            waker: None,
            request,
        }
    }

    /// Whether nothing more is to be posted.
    pub(super) fn is_posted(&self) -> bool {
        self.stopped || self.is_whole()
    }

    /// Whether every message is posted.
    pub(super) fn is_whole(&self) -> bool {
        !self.stopped && self.posted == self.length && !self.empty_pending
    }

    /// Whether every message is posted and has succeeded.
    pub(super) fn is_complete(&self) -> bool {
        self.is_whole() && self.succeeded == self.end
    }

    /// Whether nobody will ask for its outcome.
    pub(super) fn is_forgotten(&self) -> bool {
        match self.owner {
            Owner::Transfer => false,
            Owner::Nobody => true,
            // A failure is not worth keeping.
            Owner::Parked => matches!(self.outcome, Some(Err(_))),
        }
    }

    /// Takes the memory of a job that has ended.
    pub(super) fn take_request(&mut self) -> Request {
        std::mem::replace(&mut self.request, Request::empty())
    }

    /// Whether a work request is posted.
    pub(super) fn is_begun(&self) -> bool {
        self.end > self.first
    }

    /// Whether none of its messages has completed, where those before `completed` have.
    pub(super) fn waits(&self, completed: u64) -> bool {
        !self.over && (!self.is_begun() || completed <= self.first)
    }

    /// Fills in the elements of the next message, and counts it as posted.
    pub(super) fn next_message(&mut self, elements: &mut [ffi::ibv_sge]) -> Message {
        let Request { operation, local, remote, payload } = &self.request;
        let cursor = &mut self.cursor;
        let start = cursor.remote.addr;
        let (mut sges, mut bytes) = (0, 0);
        if let (Some(blocks), Some(_)) = (local, &cursor.local) {
            loop {
                let most = (self.message_size - bytes).min(cursor.left).min(cursor.remote.left);
                let Some(local) = &mut cursor.local else { break };
                let added = local.gather(blocks.memory(), most, elements, &mut sges);
                bytes += added;
                cursor.left -= added;
                let remote_memory = remote.as_ref().map(|remote| remote.memory());
                cursor.remote.advance(remote_memory, added);
                if cursor.left == 0 && cursor.block + 1 < blocks.count() {
                    *cursor = Cursor::at_block(&self.request, cursor.block + 1);
                }
                // The next bytes join the message if they follow at the peer.
                let follows =
                    cursor.remote.addr.rkey == start.rkey && cursor.remote.addr.addr == start.addr + bytes;
                if added < most || bytes == self.message_size || cursor.left == 0 || !follows {
                    break;
                }
            }
        }
        if let (false, Some(element)) = (payload.is_empty(), elements.first_mut()) {
            // The provider copies them while it posts.
            let (addr, length) = (payload.as_ptr().expose_provenance() as u64, payload.len());
            (*element, sges) = (ffi::ibv_sge { addr, length: length as u32, lkey: 0 }, 1);
        }
        self.posted += bytes;
        self.empty_pending = false;
        let last = self.posted == self.length;
        Message {
            sges: sges as c_int,
            bytes,
            operation: operation.map(|operation| operation.message(start, last)),
        }
    }

    /// Ends the job after the messages that are posted. A job whose messages are all posted stays whole.
    pub(super) fn stop(&mut self) {
        self.stopped = !self.is_whole();
    }

    /// Ends the job because the last messages could not be posted.
    pub(super) fn fail(&mut self) {
        self.stopped = true;
    }
}

impl Cursor {
    fn at_block(request: &Request, block: usize) -> Self {
        let local = request.local.as_ref().map(|blocks| {
            let (offset, length) = blocks.block(block);
            (SliceCursor::new(blocks.memory(), offset), length)
        });
        let remote = request.remote.as_ref().map(|blocks| {
            let (offset, _) = blocks.block(block);
            RemoteCursor::new(blocks.memory(), offset)
        });
        Self {
            block,
            left: local.map_or(0, |(_, length)| length),
            local: local.map(|(cursor, _)| cursor),
            remote: remote.unwrap_or(RemoteCursor::NONE),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mr::tests::fake;
    use crate::mr::{Access, Blocks, RegionSlice, RemoteSlice};

    fn write(local: impl Into<Blocks<RegionSlice>>, remote: impl Into<Blocks<RemoteSlice>>) -> Request {
        Request::one_sided(local, remote, |remote| Operation::Write { remote })
    }

    /// The messages of a job: remote address, and the elements' addresses and lengths.
    fn messages(request: Request, message_size: u64, max_sge: usize) -> Vec<(u64, Vec<(u64, u32)>)> {
        let mut elements = vec![ffi::ibv_sge::default(); max_sge];
        let (mut job, mut all) = (Job::new(request, message_size, 0), Vec::new());
        while !job.is_posted() {
            let message = job.next_message(&mut elements);
            let used = &elements[..message.sges as usize];
            assert_eq!(used.iter().map(|sge| u64::from(sge.length)).sum::<u64>(), message.bytes);
            let addr = match message.operation {
                Some(Operation::Write { remote } | Operation::WriteWithImm { remote, .. }) => remote.addr,
                _ => 0,
            };
            all.push((addr, used.iter().map(|sge| (sge.addr, sge.length)).collect()));
        }
        all
    }

    #[test]
    fn immediate_data_goes_with_the_last_message() {
        let region = fake::region(100, Access::REMOTE);
        let imm = |remote| Operation::WriteWithImm { remote, imm: 7 };
        let mut job = Job::new(Request::one_sided(&region, region.remote(), imm), 60, 0);
        let mut elements = [ffi::ibv_sge::default()];
        let first = job.next_message(&mut elements);
        assert!(matches!((first.operation, first.bytes), (Some(Operation::Write { .. }), 60)));
        let last = job.next_message(&mut elements);
        match last.operation {
            Some(Operation::WriteWithImm { remote, imm: 7 }) => assert_eq!(remote.addr, 60),
            other => panic!("{other:?}"),
        }
        assert!(job.is_posted());
    }

    #[test]
    fn a_stopped_job_is_whole_only_if_everything_is_posted() {
        let region = fake::region(100, Access::REMOTE);
        let mut elements = [ffi::ibv_sge::default()];
        let mut job = Job::new(write(&region, region.remote()), 60, 0);
        job.next_message(&mut elements);
        assert!(!job.is_posted());
        job.stop();
        assert!(job.is_posted() && !job.is_whole());

        let mut job = Job::new(write(&region, region.remote()), 100, 0);
        job.next_message(&mut elements);
        job.stop();
        assert!(job.is_posted() && job.is_whole());
        job.fail();
        assert!(!job.is_whole());
        assert!(!Job::new(Request::empty(), 100, 0).is_posted());
    }

    #[test]
    fn an_atomic_is_one_message_of_any_message_size() {
        let region = fake::region(8, Access::all());
        let operations: [fn(_) -> _; 2] = [
            |remote| Operation::FetchAdd { remote, add: 1 },
            |remote| Operation::CompareSwap { remote, compare: 0, swap: 1 },
        ];
        for operation in operations {
            let request = Request::one_sided(&region, region.remote(), operation);
            request.check(region.domain(), 4, 1).unwrap();
            let mut job = Job::new(request, 4, 0);
            assert_eq!(job.next_message(&mut [ffi::ibv_sge::default()]).bytes, 8);
            assert!(job.is_whole());
        }
    }

    #[test]
    fn scattered_blocks_are_a_message_each() {
        let region = fake::region(1000, Access::REMOTE);
        let local = RegionSlice::from(&region).strided(10, 100, 3).unwrap();
        let remote = RemoteSlice::from(region.remote()).blocks(10, [50, 0, 500]).unwrap();
        let expected = [(50, vec![(0, 10)]), (0, vec![(100, 10)]), (500, vec![(200, 10)])];
        assert_eq!(messages(write(&local, &remote), 100, 4), expected);
        // A message size below a block cuts it.
        assert_eq!(
            messages(write(local.select([1]).unwrap(), remote.select([0]).unwrap()), 6, 4),
            [(50, vec![(100, 6)]), (56, vec![(106, 4)]),]
        );
    }

    #[test]
    fn blocks_that_adjoin_at_the_peer_are_gathered() {
        let region = fake::region(1000, Access::REMOTE);
        let (local, remote) = (RegionSlice::from(&region), RemoteSlice::from(region.remote()));
        let scattered = local.blocks(10, [900, 100, 500, 0, 300]).unwrap();
        let row = remote.strided(10, 10, 5).unwrap();
        // At most two elements, then at most 25 bytes.
        assert_eq!(
            messages(write(&scattered, &row), 1000, 2),
            [(0, vec![(900, 10), (100, 10)]), (20, vec![(500, 10), (0, 10)]), (40, vec![(300, 10)]),]
        );
        assert_eq!(
            messages(write(&scattered, &row), 25, 4),
            [(0, vec![(900, 10), (100, 10), (500, 5)]), (25, vec![(505, 5), (0, 10), (300, 10)]),]
        );
        // What adjoins on both sides merges, in the same order only.
        let pages = local.blocks(10, [0, 10, 20, 50, 40]).unwrap();
        assert_eq!(
            messages(write(&pages, &row), 1000, 1),
            [(0, vec![(0, 30)]), (30, vec![(50, 10)]), (40, vec![(40, 10)]),]
        );
    }

    proptest! {
        /// Messages of any size cover each byte once.
        #[test]
        fn messages_cover_the_request(message_size in prop_oneof![Just(1_u64), Just(u64::MAX), 1..200_u64]) {
            let region = fake::region(100, Access::REMOTE);
            for request in [write(&region, region.remote()), Request::send(&region), Request::empty()] {
                let (mut job, mut elements) = (Job::new(request, message_size, 0), [ffi::ibv_sge::default()]);
                let mut bytes = 0;
                while !job.is_posted() {
                    bytes += job.next_message(&mut elements).bytes;
                }
                prop_assert_eq!((bytes, bytes), (job.length, job.posted));
            }
        }

        /// Byte for byte, messages move each block to its partner.
        #[test]
        fn messages_move_each_block_to_its_partner(
            blocks in proptest::collection::vec((0..50_u64, 0..50_u64, 1..20_u64), 1..20),
            message_size in 1..60_u64, max_sge in 1..4_usize
        ) {
            let region = fake::region(1000, Access::REMOTE);
            let ranges = |pick: fn(&(u64, u64, u64)) -> u64| {
                let ranges: Vec<_> = blocks.iter().map(|all| pick(all)..pick(all) + all.2).collect();
                ranges
            };
            let local = RegionSlice::from(&region).ranges(ranges(|all| all.0)).unwrap();
            let remote = RemoteSlice::from(region.remote()).ranges(ranges(|all| all.1)).unwrap();
            let expected: Vec<_> =
                blocks.iter().flat_map(|&(from, to, length)| (0..length).map(move |at| (to + at, from + at))).collect();
            let mut moved = Vec::new();
            for (addr, elements) in messages(write(&local, &remote), message_size, max_sge) {
                let bytes = elements.iter().flat_map(|&(addr, length)| addr..addr + u64::from(length));
                moved.extend((addr..).zip(bytes));
            }
            prop_assert_eq!(moved, expected);
        }
    }
}
