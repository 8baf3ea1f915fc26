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

    /// A message of it, to or from this place.
    #[inline(always)]
    fn operation(self, remote: RemoteAddr, last: bool) -> Operation {
        match self {
            Self::Write => Operation::Write { remote },
            // The number goes with the last message, behind all bytes.
            Self::WriteWithImm(imm) if last => Operation::WriteWithImm { remote, imm },
            Self::WriteWithImm(_) => Operation::Write { remote },
            Self::Read => Operation::Read { remote },
            Self::Send | Self::Recv => Operation::Send,
            Self::FetchAdd(add) => Operation::FetchAdd { remote, add },
            Self::CompareSwap(compare, swap) => Operation::CompareSwap { remote, compare, swap },
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

    pub(super) fn opcode(&self) -> Opcode {
        self.kind.opcode()
    }

    /// Where at the peer the byte at `offset` goes or comes from.
    pub(super) fn place(&self, offset: u64) -> Option<RemoteAddr> {
        self.remote.map(|target| target.at(offset))
    }

    /// Whether it can be done on a connection of that domain, in messages of that size.
    #[inline(always)]
    pub(super) fn check(&self, domain: &ProtectionDomain, message: u64, max_sge: u32) -> Result<()> {
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
            let RemoteCursor { place: RemoteAddr { addr, .. }, left, .. } = RemoteCursor::new(remote);
            if local.len() != 8 || left < 8 || addr % 8 != 0 {
                return Err(crate::Error::InvalidAtomic { opcode, addr, length: local.len() });
            }
            // The old value comes in one piece too.
            local.check_messages(opcode, 8, 1)?;
        }
        Ok(())
    }
}

/// What of a request is posted.
#[derive(Debug)]
pub(super) struct Job {
    local: Option<LocalCursor>,
    remote: RemoteCursor,
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

impl Job {
    /// Of a request that was [checked](Request::check) for messages of this size.
    #[inline(always)]
    pub(super) fn new(request: &Request<'_>, message: u64) -> Self {
        let local = request.local.as_ref();
        Self {
            local: local.map(LocalCursor::new),
            remote: request.remote.as_ref().map_or(RemoteCursor::NOWHERE, RemoteCursor::new),
            length: local.map_or(0, LocalRange::len),
            posted: 0,
            message,
            empty: local.is_none(),
        }
    }

    /// Whether its bytes fit into one message.
    #[inline(always)]
    pub(super) fn is_small(&self) -> bool {
        self.length <= self.message
    }

    #[inline(always)]
    pub(super) fn is_posted(&self) -> bool {
        self.posted == self.length && !self.empty
    }

    /// Takes the request's next message, whose elements go into these places, as posted.
    #[inline(always)]
    pub(super) fn take(&mut self, request: &Request<'_>, places: &mut [ffi::ibv_sge]) -> Message {
        let left = self.length - self.posted;
        let most = left.min(self.message).min(self.remote.left);
        let place = self.remote.place;
        let (elements, bytes) = match (&mut self.local, &request.local) {
            (Some(cursor), Some(range)) => cursor.gather(range, most, places),
            _ => (0, 0),
        };
        self.posted += bytes;
        self.empty = false;
        self.remote.advance(request.remote.as_ref(), bytes);
        Message { elements, bytes, operation: request.kind.operation(place, bytes == left) }
    }

    /// Nothing more of it will be posted.
    pub(super) fn cut_short(&mut self) {
        self.length = self.posted;
        self.empty = false;
    }
}
