//! What a transfer is to do, checked before anything of it is posted.

use std::ffi::c_int;

use ibverbs_sys as ffi;

use super::RemoteAddr;
use super::local::{LocalCursor, LocalRange};
use super::remote::{RemoteCursor, RemoteRange};
use crate::Result;
use crate::error::TransferError;
use crate::mr::Access;
use crate::verbs::{Opcode, Operation, ProtectionDomain};

/// One call's work: an operation with its local and its remote range, both as long as you like.
#[derive(Debug)]
pub struct Request<'a> {
    kind: Kind,
    local: Option<LocalRange<'a>>,
    remote: Option<RemoteRange<'a>>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Write,
    WriteWithImm(u32),
    Read,
    Send,
    FetchAdd(u64),
    CompareSwap(u64, u64),
    Recv,
}

impl Kind {
    fn opcode(self) -> Opcode {
        match self {
            Self::Write => Opcode::Write,
            Self::WriteWithImm(_) => Opcode::WriteWithImm,
            Self::Read => Opcode::Read,
            Self::Send => Opcode::Send,
            Self::FetchAdd(_) => Opcode::FetchAdd,
            Self::CompareSwap(..) => Opcode::CompareSwap,
            Self::Recv => Opcode::Recv,
        }
    }
}

impl<'a> Request<'a> {
    /// Local bytes are written at the peer.
    pub fn write(local: impl Into<LocalRange<'a>>, remote: impl Into<RemoteRange<'a>>) -> Self {
        Self::new(Kind::Write, local.into(), Some(remote.into()))
    }

    /// As `write`, and the peer's next receive completes with a number when all bytes are there.
    pub fn write_with_imm(
        local: impl Into<LocalRange<'a>>,
        remote: impl Into<RemoteRange<'a>>,
        imm: u32,
    ) -> Self {
        Self::new(Kind::WriteWithImm(imm), local.into(), Some(remote.into()))
    }

    /// The peer's bytes are read into local ones.
    pub fn read(local: impl Into<LocalRange<'a>>, remote: impl Into<RemoteRange<'a>>) -> Self {
        Self::new(Kind::Read, local.into(), Some(remote.into()))
    }

    /// Local bytes go to where the peer receives as many.
    pub fn send(local: impl Into<LocalRange<'a>>) -> Self {
        Self::new(Kind::Send, local.into(), None)
    }

    /// Adds to the peer's u64; what it was comes into 8 local bytes.
    pub fn fetch_add(local: impl Into<LocalRange<'a>>, remote: impl Into<RemoteRange<'a>>, add: u64) -> Self {
        Self::new(Kind::FetchAdd(add), local.into(), Some(remote.into()))
    }

    /// Replaces the peer's u64 if it is `compare`; what it was comes into 8 local bytes.
    pub fn compare_swap(
        local: impl Into<LocalRange<'a>>,
        remote: impl Into<RemoteRange<'a>>,
        compare: u64,
        swap: u64,
    ) -> Self {
        Self::new(Kind::CompareSwap(compare, swap), local.into(), Some(remote.into()))
    }

    pub(super) fn recv(local: LocalRange<'a>) -> Self {
        Self::new(Kind::Recv, local, None)
    }

    /// A receive of no bytes, for a number.
    pub(super) fn recv_imm() -> Self {
        Self { kind: Kind::Recv, local: None, remote: None }
    }

    fn new(kind: Kind, local: LocalRange<'a>, remote: Option<RemoteRange<'a>>) -> Self {
        Self { kind, local: Some(local), remote }
    }

    fn check(&self, domain: &ProtectionDomain, message: u64, max_sge: u32) -> Result<()> {
        let opcode = self.kind.opcode();
        let needed = match self.kind {
            Kind::Write | Kind::WriteWithImm(_) => Access::REMOTE_WRITE,
            Kind::Read => Access::REMOTE_READ,
            Kind::FetchAdd(_) | Kind::CompareSwap(..) => Access::REMOTE_ATOMIC,
            Kind::Send | Kind::Recv => Access::empty(),
        };
        let written = !matches!(self.kind, Kind::Write | Kind::WriteWithImm(_) | Kind::Send);
        let Some(local) = &self.local else { return Ok(()) };
        local.check(opcode, domain, written)?;
        let Some(remote) = &self.remote else {
            return local.check_messages(opcode, message, max_sge);
        };
        if local.len() != remote.len() {
            let (local, remote) = (local.len(), remote.len());
            return Err(TransferError::LengthMismatch { opcode, local, remote }.into());
        }
        let granted = remote.access();
        if !granted.contains(needed) {
            return Err(TransferError::RemoteAccessMissing { opcode, needed, granted }.into());
        }
        if let Kind::FetchAdd(_) | Kind::CompareSwap(..) = self.kind {
            let (RemoteAddr { addr, .. }, together) = remote.cursor().here();
            if local.len() != 8 || together < 8 || addr % 8 != 0 {
                return Err(crate::Error::InvalidAtomic { opcode, addr, length: local.len() });
            }
            // The old value comes in one piece too.
            local.check_messages(opcode, 8, 1)?;
        }
        Ok(())
    }
}

/// A request under way: what of it is posted.
#[derive(Debug)]
pub(super) struct Job<'a> {
    kind: Kind,
    local: Option<LocalCursor<'a>>,
    remote: Option<RemoteCursor<'a>>,
    /// All of the peer's.
    target: Option<RemoteRange<'a>>,
    pub length: u64,
    pub posted: u64,
    message: u64,
    /// A message of no bytes is still to be posted.
    empty: bool,
}

/// A message of a job.
pub(super) struct Message {
    /// How many elements it has, and of how many bytes.
    pub elements: c_int,
    pub bytes: u64,
    pub operation: Operation,
}

impl<'a> Job<'a> {
    pub(super) fn new(
        request: Request<'a>,
        domain: &ProtectionDomain,
        message: u64,
        max_sge: u32,
    ) -> Result<Self> {
        request.check(domain, message, max_sge)?;
        let Request { kind, local, remote } = request;
        let length = local.as_ref().map_or(0, LocalRange::len);
        let empty = local.is_none();
        let (local, target) = (local.map(LocalCursor::new), remote);
        let remote = target.map(|target| target.cursor());
        Ok(Self { kind, local, remote, target, length, posted: 0, message, empty })
    }

    pub(super) fn opcode(&self) -> Opcode {
        self.kind.opcode()
    }

    /// Where at the peer the byte at `offset` goes or comes from.
    pub(super) fn place(&self, offset: u64) -> Option<RemoteAddr> {
        self.target.map(|target| target.at(offset))
    }

    pub(super) fn is_posted(&self) -> bool {
        self.posted == self.length && !self.empty
    }

    /// Takes the next message, whose elements go into these places, as posted.
    #[inline(always)]
    pub(super) fn take(&mut self, places: &mut [ffi::ibv_sge]) -> Message {
        let left = self.length - self.posted;
        let mut most = left.min(self.message);
        let mut place = RemoteAddr { addr: 0, rkey: crate::mr::Rkey(0) };
        if let Some(remote) = &self.remote {
            let (here, together) = remote.here();
            (place, most) = (here, most.min(together));
        }
        let (elements, bytes) = self.local.as_mut().map_or((0, 0), |local| local.gather(most, places));
        self.posted += bytes;
        self.empty = false;
        if let Some(remote) = &mut self.remote {
            remote.advance(bytes);
        }
        Message { elements, bytes, operation: self.operation(place, bytes == left) }
    }

    #[inline(always)]
    fn operation(&self, remote: RemoteAddr, last: bool) -> Operation {
        match self.kind {
            Kind::Write => Operation::Write { remote },
            // The number goes with the last message, behind all bytes.
            Kind::WriteWithImm(imm) if last => Operation::WriteWithImm { remote, imm },
            Kind::WriteWithImm(_) => Operation::Write { remote },
            Kind::Read => Operation::Read { remote },
            Kind::Send | Kind::Recv => Operation::Send,
            Kind::FetchAdd(add) => Operation::FetchAdd { remote, add },
            Kind::CompareSwap(compare, swap) => Operation::CompareSwap { remote, compare, swap },
        }
    }

    /// Nothing more of it will be posted.
    pub(super) fn cut_short(&mut self) {
        self.length = self.posted;
        self.empty = false;
    }
}
