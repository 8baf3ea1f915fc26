//! A transfer as the caller requests it, and its checks.

use super::RequestError;
use super::error::Result;
use crate::mr::{Access, Blocks, RegionSlice, RemoteCursor, RemoteSlice, SliceCursor};
use crate::verbs::{self, Opcode, Operation, ProtectionDomain, RemoteAddr, Rkey, ffi};

/// An operation with its local memory and, for most operations, the peer's memory. It holds handles of the local
/// memory until the device is done.
#[derive(Debug)]
pub(super) struct Request {
    /// `None` for a receive. The message decides its remote address.
    pub operation: Option<Operation>,
    /// `None` for a receive of 0 bytes.
    pub local: Option<Blocks<RegionSlice>>,
    /// As many blocks as `local` has, each of the same length.
    pub remote: Option<Blocks<RemoteSlice>>,
    /// Bytes that go into the work request itself; empty for most operations.
    pub payload: Box<[u8]>,
}

impl Request {
    pub(super) fn send(local: impl Into<RegionSlice>) -> Self {
        Self { operation: Some(Operation::Send), local: Some(local.into().into()), ..Self::empty() }
    }

    pub(super) fn recv(local: impl Into<RegionSlice>) -> Self {
        Self { local: Some(local.into().into()), ..Self::empty() }
    }

    /// A message of a few bytes that are copied, with immediate data. Without bytes it is a WRITE, which needs no
    /// address (C9-88 of the InfiniBand specification).
    pub(super) fn notify(imm: u32, payload: &[u8]) -> Self {
        let operation = match payload {
            [] => Operation::WriteWithImm { remote: RemoteAddr { addr: 0, rkey: Rkey(0) }, imm },
            _ => Operation::SendWithImm { imm },
        };
        Self { operation: Some(operation), local: None, remote: None, payload: payload.into() }
    }

    /// What is left of a request whose memory was taken.
    pub(super) fn empty() -> Self {
        Self { operation: None, local: None, remote: None, payload: Box::default() }
    }

    pub(super) fn one_sided(
        local: impl Into<Blocks<RegionSlice>>,
        remote: impl Into<Blocks<RemoteSlice>>,
        operation: impl FnOnce(RemoteAddr) -> Operation,
    ) -> Self {
        let remote = remote.into();
        let first = remote.memory().at(remote.block(0).0);
        Self {
            operation: Some(operation(first)),
            local: Some(local.into()),
            remote: Some(remote),
            payload: Box::default(),
        }
    }

    pub(super) fn opcode(&self) -> Opcode {
        self.operation.map_or(Opcode::Recv, |operation| operation.opcode())
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.local.as_ref().map_or(0, Blocks::len)
    }

    /// The remote address of the byte at `offset` of all blocks in a row. It goes through the table: for failures.
    pub(super) fn remote_addr(&self, mut offset: u64) -> Option<RemoteAddr> {
        let remote = self.remote.as_ref()?;
        for index in 0..remote.count() {
            let (start, length) = remote.block(index);
            if offset < length {
                return Some(remote.memory().at(start + offset));
            }
            offset -= length;
        }
        None
    }

    /// Whether this is a receive into the same memory as `other`, which is in flight and so keeps its regions.
    pub(super) fn is_same_recv(&self, other: &Self) -> bool {
        let memory = |blocks: &Blocks<RegionSlice>| -> Vec<_> {
            let segments = blocks.memory().segments();
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
        check_local(local.memory(), opcode, domain, written)?;
        if domain.context().is_iwarp() {
            check_iwarp(local.memory(), opcode)?;
        }
        let Some(remote) = &self.remote else {
            return check_messages(local.memory(), opcode, message_size, max_sge);
        };
        check_lengths(local, remote, opcode)?;
        let granted = remote.memory().access();
        if !granted.contains(needed) {
            return Err(RequestError::RemoteAccessMissing { opcode, needed, granted }.into());
        }
        if let Opcode::FetchAdd | Opcode::CompareSwap = opcode {
            let at = RemoteCursor::new(remote.memory(), remote.block(0).0);
            let RemoteCursor { addr: RemoteAddr { addr, .. }, left, .. } = at;
            if local.len() != 8 || local.count() > 1 || left < 8 || addr % 8 != 0 {
                return Err(verbs::Error::InvalidAtomic { opcode, addr, length: local.len() }.into());
            }
            // The previous value needs one local element.
            let (offset, length) = local.block(0);
            let value = local.memory().slice(offset..offset + length).expect("a table checks its blocks");
            check_messages(&value, opcode, 8, 1)?;
        }
        Ok(())
    }
}

/// Checks what iWARP needs besides: the peer answers a READ with a WRITE to the reader's memory (RFC 5040).
fn check_iwarp(local: &RegionSlice, opcode: Opcode) -> Result<()> {
    let mut offset = 0;
    for segment in local.segments().filter(|_| opcode == Opcode::Read) {
        if !segment.region.access().contains(Access::REMOTE_WRITE) {
            return Err(
                RequestError::LocalAccessMissing { opcode, needed: Access::REMOTE_WRITE, offset }.into()
            );
        }
        offset += segment.length;
    }
    Ok(())
}

/// Checks that both tables have as many blocks, and each block of one the length of the other's.
fn check_lengths(local: &Blocks<RegionSlice>, remote: &Blocks<RemoteSlice>, opcode: Opcode) -> Result<()> {
    if local.count() != remote.count() {
        return Err(
            RequestError::CountMismatch { opcode, local: local.count(), remote: remote.count() }.into()
        );
    }
    // Tables of one length need one comparison.
    let count = match (local.uniform(), remote.uniform()) {
        (Some(_), Some(_)) => 1,
        _ => local.count(),
    };
    let differ = |&block: &usize| local.block(block).1 != remote.block(block).1;
    match (0..count).find(differ) {
        Some(block) => {
            let (local, remote) = (local.block(block).1, remote.block(block).1);
            Err(RequestError::LengthMismatch { opcode, block, local, remote }.into())
        }
        None => Ok(()),
    }
}

/// Checks that the regions are in `domain`, and have LOCAL_WRITE if the operation writes them.
fn check_local(local: &RegionSlice, opcode: Opcode, domain: &ProtectionDomain, written: bool) -> Result<()> {
    let mut offset = 0;
    for segment in local.segments() {
        if segment.region.domain().id() != domain.id() {
            return Err(RequestError::ForeignRegion { offset }.into());
        }
        if written && !segment.region.access().contains(Access::LOCAL_WRITE) {
            return Err(
                RequestError::LocalAccessMissing { opcode, needed: Access::LOCAL_WRITE, offset }.into()
            );
        }
        offset += segment.length;
    }
    Ok(())
}

/// Checks that every message of at most `message_size` bytes needs at most `max_sge` elements.
fn check_messages(local: &RegionSlice, opcode: Opcode, message_size: u64, max_sge: u32) -> Result<()> {
    if local.segments().nth(1).is_none() {
        // A message of one region, at most 1 GiB, needs one element.
        return Ok(());
    }
    let mut cursor = SliceCursor::new(local, 0);
    let mut elements = vec![ffi::ibv_sge::default(); max_sge as usize];
    let mut offset = 0;
    while offset < local.len() {
        let length = message_size.min(local.len() - offset);
        if cursor.gather(local, length, &mut elements, &mut 0) < length {
            return Err(RequestError::TooScattered { opcode, offset, length, max_sge }.into());
        }
        offset += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mr::tests::fake;
    use crate::transfer::Error;

    fn write(local: impl Into<Blocks<RegionSlice>>, remote: impl Into<Blocks<RemoteSlice>>) -> Request {
        Request::one_sided(local, remote, |remote| Operation::Write { remote })
    }

    #[test]
    fn messages_with_too_many_elements_are_refused() {
        let region = fake::region(1000, Access::empty());
        let ranges = [(0, 10), (100, 10), (200, 10), (300, 70)];
        let slice =
            RegionSlice::concat(ranges.map(|(at, length)| region.slice(at..at + length).unwrap())).unwrap();
        check_messages(&slice, Opcode::Send, 50, 4).unwrap();
        match check_messages(&slice, Opcode::Send, 50, 3) {
            Err(Error::Request(RequestError::TooScattered { offset: 0, length: 50, max_sge: 3, .. })) => {}
            other => panic!("{other:?}"),
        }
        check_messages(&slice, Opcode::Send, 10, 1).unwrap();
    }

    #[test]
    fn on_iwarp_a_read_needs_memory_that_the_peer_may_write() {
        let slice = |access| RegionSlice::from(fake::region(100, access));
        match check_iwarp(&slice(Access::LOCAL_WRITE), Opcode::Read) {
            Err(Error::Request(RequestError::LocalAccessMissing {
                needed: Access::REMOTE_WRITE,
                offset: 0,
                ..
            })) => {}
            other => panic!("{other:?}"),
        }
        check_iwarp(&slice(Access::REMOTE), Opcode::Read).unwrap();
        check_iwarp(&slice(Access::LOCAL_WRITE), Opcode::Write).unwrap();
    }

    #[test]
    fn only_the_same_receive_is_taken_up_again() {
        let region = fake::region(100, Access::REMOTE);
        let part = |range: std::ops::Range<u64>| Request::recv(region.slice(range).unwrap());
        let others = [part(10..61), part(9..59), Request::empty(), Request::send(&region)];
        assert!(part(10..60).is_same_recv(&part(10..60)));
        assert!(others.iter().all(|other| !part(10..60).is_same_recv(other)));
        assert!(Request::empty().is_same_recv(&Request::empty()));
    }

    #[test]
    fn tables_that_differ_are_refused() {
        let region = fake::region(1000, Access::REMOTE);
        let (local, remote) = (RegionSlice::from(&region), RemoteSlice::from(region.remote()));
        let check = |request: Request| request.check(region.domain(), 1 << 20, 4);
        let ours = local.strided(10, 20, 5).unwrap();
        check(write(&ours, remote.blocks(10, [0, 1, 2, 3, 4]).unwrap())).unwrap();
        match check(write(&ours, remote.strided(10, 20, 4).unwrap())) {
            Err(Error::Request(RequestError::CountMismatch { local: 5, remote: 4, .. })) => {}
            other => panic!("{other:?}"),
        }
        match check(write(&ours, remote.strided(11, 20, 5).unwrap())) {
            Err(Error::Request(RequestError::LengthMismatch { block: 0, local: 10, remote: 11, .. })) => {}
            other => panic!("{other:?}"),
        }
        let ranges = remote.ranges([0..10, 0..10, 5..15, 7..16, 0..10]).unwrap();
        match check(write(&ours, &ranges)) {
            Err(Error::Request(RequestError::LengthMismatch { block: 3, local: 10, remote: 9, .. })) => {}
            other => panic!("{other:?}"),
        }
        check(write(ours.select([1, 1]).unwrap(), ranges.select([4, 0]).unwrap())).unwrap();
    }

    #[test]
    fn an_offset_has_its_address_in_the_table() {
        let region = fake::region(1000, Access::REMOTE);
        let remote = RemoteSlice::from(region.remote()).blocks(10, [500, 0, 90]).unwrap();
        let request = write(RegionSlice::from(&region).strided(10, 10, 3).unwrap(), remote);
        let addr = |offset| request.remote_addr(offset).map(|remote| remote.addr);
        assert_eq!([0, 9, 10, 29].map(addr), [Some(500), Some(509), Some(0), Some(99)]);
        assert_eq!(addr(30), None);
    }
}
