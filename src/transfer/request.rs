//! A transfer as the caller requests it, its checks, and the messages that it is cut into.

use std::ffi::c_int;

use super::error::{Error, Result};
use crate::mr::{Access, RegionSlice, RemoteCursor, RemoteSlice, SliceCursor};
use crate::verbs::{self, Opcode, Operation, ProtectionDomain, RemoteAddr, ffi};

/// A transfer of any length: an operation with its local memory and, for most operations, the peer's memory.
///
/// It holds handles of its memory, and the connection keeps them until the device is done.
#[derive(Debug, Clone)]
pub struct Request {
    /// `None` for a receive. Its remote address is that of the first byte.
    operation: Option<Operation>,
    local: Option<RegionSlice>,
    remote: Option<RemoteSlice>,
}

impl Request {
    /// Writes local bytes into the peer's memory.
    pub fn write(local: impl Into<RegionSlice>, remote: impl Into<RemoteSlice>) -> Self {
        Self::one_sided(local, remote, |remote| Operation::Write { remote })
    }

    /// Like [`write`](Self::write); the peer's next receive completes with the immediate data, after all bytes are
    /// in its memory.
    pub fn write_with_imm(local: impl Into<RegionSlice>, remote: impl Into<RemoteSlice>, imm: u32) -> Self {
        Self::one_sided(local, remote, |remote| Operation::WriteWithImm { remote, imm })
    }

    /// Reads the peer's bytes into local memory.
    pub fn read(local: impl Into<RegionSlice>, remote: impl Into<RemoteSlice>) -> Self {
        Self::one_sided(local, remote, |remote| Operation::Read { remote })
    }

    /// Sends local bytes to a peer that receives the same number of bytes with the same message size.
    pub fn send(local: impl Into<RegionSlice>) -> Self {
        Self { operation: Some(Operation::Send), local: Some(local.into()), remote: None }
    }

    /// Adds to a u64 of the peer, and returns its previous value in 8 local bytes.
    pub fn fetch_add(local: impl Into<RegionSlice>, remote: impl Into<RemoteSlice>, add: u64) -> Self {
        Self::one_sided(local, remote, |remote| Operation::FetchAdd { remote, add })
    }

    /// Replaces a u64 of the peer if it equals `compare`, and returns its previous value in 8 local bytes.
    pub fn compare_swap(
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        compare: u64,
        swap: u64,
    ) -> Self {
        Self::one_sided(local, remote, |remote| Operation::CompareSwap { remote, compare, swap })
    }

    pub(super) fn recv(local: impl Into<RegionSlice>) -> Self {
        Self { operation: None, local: Some(local.into()), remote: None }
    }

    /// A receive of 0 bytes, for immediate data.
    pub(super) fn recv_imm() -> Self {
        Self { operation: None, local: None, remote: None }
    }

    fn one_sided(
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
        operation: impl FnOnce(RemoteAddr) -> Operation,
    ) -> Self {
        let remote = remote.into();
        Self { operation: Some(operation(remote.at(0))), local: Some(local.into()), remote: Some(remote) }
    }

    pub(super) fn opcode(&self) -> Opcode {
        self.operation.map_or(Opcode::Recv, |operation| operation.opcode())
    }

    /// The remote address of the byte at `offset`.
    pub(super) fn remote_addr(&self, offset: u64) -> Option<RemoteAddr> {
        self.remote.as_ref().map(|remote| remote.at(offset))
    }

    /// Whether this is a receive into the same memory as `other`, which is in flight and so keeps its regions.
    fn is_same_recv(&self, other: &Self) -> bool {
        let memory = |slice: &RegionSlice| -> Vec<_> {
            let segments = slice.segments();
            segments.map(|segment| (segment.region.lkey(), segment.offset, segment.length)).collect()
        };
        let (ours, theirs) = (self.local.as_ref().map(memory), other.local.as_ref().map(memory));
        self.operation.is_none() && other.operation.is_none() && ours == theirs
    }

    /// Checks that a connection in `domain` can carry out the request in messages of `message_size` bytes.
    pub(super) fn check(&self, domain: &ProtectionDomain, message_size: u64, max_sge: u32) -> Result<()> {
        let opcode = self.opcode();
        let (needed, written) = match opcode {
            Opcode::Write | Opcode::WriteWithImm => (Access::REMOTE_WRITE, false),
            Opcode::Read => (Access::REMOTE_READ, true),
            Opcode::FetchAdd | Opcode::CompareSwap => (Access::REMOTE_ATOMIC, true),
            Opcode::Send | Opcode::SendWithImm => (Access::empty(), false),
            Opcode::Recv => (Access::empty(), true),
        };
        let Some(local) = &self.local else { return Ok(()) };
        check_local(local, opcode, domain, written)?;
        let Some(remote) = &self.remote else {
            return check_messages(local, opcode, message_size, max_sge);
        };
        if local.len() != remote.len() {
            let (local, remote) = (local.len(), remote.len());
            return Err(Error::LengthMismatch { opcode, local, remote });
        }
        let granted = remote.access();
        if !granted.contains(needed) {
            return Err(Error::RemoteAccessMissing { opcode, needed, granted });
        }
        if let Opcode::FetchAdd | Opcode::CompareSwap = opcode {
            let RemoteCursor { addr: RemoteAddr { addr, .. }, left, .. } = RemoteCursor::new(remote);
            if local.len() != 8 || left < 8 || addr % 8 != 0 {
                return Err(verbs::Error::InvalidAtomic { opcode, addr, length: local.len() }.into());
            }
            // The previous value needs one local element.
            check_messages(local, opcode, 8, 1)?;
        }
        Ok(())
    }
}

impl Request {
    /// Checks what iWARP needs besides: the peer answers a READ with a WRITE to the reader's memory (RFC 5040).
    pub(super) fn check_iwarp(&self) -> Result<()> {
        let mut offset = 0;
        let read = self.local.iter().filter(|_| self.opcode() == Opcode::Read);
        for segment in read.flat_map(RegionSlice::segments) {
            if !segment.region.access().contains(Access::REMOTE_WRITE) {
                return Err(Error::RemoteWriteMissing { offset });
            }
            offset += segment.length;
        }
        Ok(())
    }
}

/// Checks that the regions are in `domain`, and have LOCAL_WRITE if the operation writes them.
fn check_local(local: &RegionSlice, opcode: Opcode, domain: &ProtectionDomain, written: bool) -> Result<()> {
    let mut offset = 0;
    for segment in local.segments() {
        if segment.region.domain().id() != domain.id() {
            return Err(Error::ForeignRegion { offset });
        }
        if written && !segment.region.access().contains(Access::LOCAL_WRITE) {
            return Err(Error::LocalWriteMissing { opcode, offset });
        }
        offset += segment.length;
    }
    Ok(())
}

/// Checks that every message of at most `message_size` bytes needs at most `max_sge` elements.
fn check_messages(local: &RegionSlice, opcode: Opcode, message_size: u64, max_sge: u32) -> Result<()> {
    let mut cursor = SliceCursor::new(local);
    let mut elements = vec![ffi::ibv_sge::default(); max_sge as usize];
    let mut offset = 0;
    while offset < local.len() {
        let length = message_size.min(local.len() - offset);
        if cursor.gather(local, length, &mut elements).1 < length {
            return Err(Error::TooScattered { opcode, offset, length, max_sge });
        }
        offset += length;
    }
    Ok(())
}

/// A request in progress.
#[derive(Debug)]
pub(super) struct Job {
    pub request: Request,
    local: Option<SliceCursor>,
    remote: RemoteCursor,
    pub length: u64,
    pub posted: u64,
    message_size: u64,
    /// A message of 0 bytes is still to be posted.
    empty_pending: bool,
    /// Nothing more is posted, although something is left.
    stopped: bool,
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
    /// Starts a request that was [checked](Request::check) for messages of this size.
    pub(super) fn new(request: Request, message_size: u64) -> Self {
        // An atomic is one message of 8 bytes.
        let message_size = match request.opcode() {
            Opcode::FetchAdd | Opcode::CompareSwap => 8,
            _ => message_size,
        };
        Self {
            local: request.local.as_ref().map(SliceCursor::new),
            remote: request.remote.as_ref().map_or(RemoteCursor::NONE, RemoteCursor::new),
            length: request.local.as_ref().map_or(0, RegionSlice::len),
            posted: 0,
            message_size,
            empty_pending: request.local.is_none(),
            stopped: false,
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

    /// Whether `request` with this message size asks for what this receive waits for.
    pub(super) fn is_same_recv(&self, request: &Request, message_size: u64) -> bool {
        self.message_size == message_size && self.request.is_same_recv(request)
    }

    /// Fills in the elements of the next message, and counts it as posted.
    pub(super) fn next_message(&mut self, elements: &mut [ffi::ibv_sge]) -> Message {
        let Request { operation, local, remote } = &self.request;
        let left = self.length - self.posted;
        let max_bytes = left.min(self.message_size).min(self.remote.left);
        let addr = self.remote.addr;
        let (sges, bytes) = match (&mut self.local, local) {
            (Some(cursor), Some(local)) => cursor.gather(local, max_bytes, elements),
            _ => (0, 0),
        };
        let operation = operation.map(|operation| operation.message(addr, bytes == left));
        self.posted += bytes;
        self.empty_pending = false;
        self.remote.advance(remote.as_ref(), bytes);
        Message { sges, bytes, operation }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mr::tests::fake;

    #[test]
    fn messages_with_too_many_elements_are_refused() {
        let region = fake::region(1000, Access::empty());
        let ranges = [(0, 10), (100, 10), (200, 10), (300, 70)];
        let slice =
            RegionSlice::concat(ranges.map(|(at, length)| region.slice(at..at + length).unwrap())).unwrap();
        check_messages(&slice, Opcode::Send, 50, 4).unwrap();
        match check_messages(&slice, Opcode::Send, 50, 3) {
            Err(Error::TooScattered { offset: 0, length: 50, max_sge: 3, .. }) => {}
            other => panic!("{other:?}"),
        }
        check_messages(&slice, Opcode::Send, 10, 1).unwrap();
    }

    #[test]
    fn on_iwarp_a_read_needs_memory_that_the_peer_may_write() {
        let region = |access| fake::region(100, access);
        let (ours, theirs) = (region(Access::LOCAL_WRITE), region(Access::REMOTE));
        let read = |local: &crate::mr::MemoryRegion| Request::read(local, theirs.remote()).check_iwarp();
        assert!(matches!(read(&ours), Err(Error::RemoteWriteMissing { offset: 0 })));
        read(&theirs).unwrap();
        Request::write(&ours, theirs.remote()).check_iwarp().unwrap();
    }

    #[test]
    fn immediate_data_goes_with_the_last_message() {
        let region = fake::region(100, Access::REMOTE);
        let request = Request::write_with_imm(&region, region.remote(), 7);
        request.check(region.domain(), 60, 1).unwrap();
        let mut job = Job::new(request, 60);
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
        let mut job = Job::new(Request::write(&region, region.remote()), 60);
        job.next_message(&mut elements);
        assert!(!job.is_posted());
        job.stop();
        assert!(job.is_posted() && !job.is_whole());

        let mut job = Job::new(Request::write(&region, region.remote()), 100);
        job.next_message(&mut elements);
        job.stop();
        assert!(job.is_posted() && job.is_whole());
        job.fail();
        assert!(!job.is_whole());
        assert!(!Job::new(Request::recv_imm(), 100).is_posted());
    }

    #[test]
    fn only_the_same_receive_is_taken_up_again() {
        let region = fake::region(100, Access::REMOTE);
        let part = |range: std::ops::Range<u64>| Request::recv(region.slice(range).unwrap());
        let job = Job::new(part(10..60), 20);
        assert!(job.is_same_recv(&part(10..60), 20));
        for (other, message_size) in [
            (part(10..60), 30),
            (part(10..61), 20),
            (part(9..59), 20),
            (Request::recv_imm(), 20),
            (Request::send(region.slice(10..60).unwrap()), 20),
        ] {
            assert!(!job.is_same_recv(&other, message_size), "{other:?}");
        }
        assert!(Job::new(Request::recv_imm(), 20).is_same_recv(&Request::recv_imm(), 20));
    }

    #[test]
    fn an_atomic_is_one_message_of_any_message_size() {
        let region = fake::region(8, Access::all());
        let requests = [
            Request::fetch_add(&region, region.remote(), 1),
            Request::compare_swap(&region, region.remote(), 0, 1),
        ];
        for request in requests {
            request.check(region.domain(), 4, 1).unwrap();
            let mut job = Job::new(request, 4);
            assert_eq!(job.next_message(&mut [ffi::ibv_sge::default()]).bytes, 8);
            assert!(job.is_whole());
        }
    }

    proptest! {
        /// Messages of any size cover each byte once.
        #[test]
        fn messages_cover_the_request(message_size in prop_oneof![Just(1_u64), Just(u64::MAX), 1..200_u64]) {
            let region = fake::region(100, Access::REMOTE);
            for request in [Request::write(&region, region.remote()), Request::send(&region), Request::recv_imm()] {
                request.check(region.domain(), message_size, 1).unwrap();
                let (mut job, mut elements) = (Job::new(request, message_size), [ffi::ibv_sge::default()]);
                let mut bytes = 0;
                while !job.is_posted() {
                    bytes += job.next_message(&mut elements).bytes;
                }
                prop_assert_eq!((bytes, bytes), (job.length, job.posted));
            }
        }
    }
}
