//! Work requests: keys, scatter/gather elements and operations.

use std::fmt;
use std::marker::PhantomData;

use ibverbs_sys as ffi;

use super::error::{Error, Result};
use super::{DomainId, ProtectionDomain};

/// The local key: names a region in work requests of this side.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lkey(pub u32);

/// The remote key: names a region in a peer's work requests.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Rkey(pub u32);

impl fmt::Debug for Lkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lkey({:#x})", self.0)
    }
}

impl fmt::Debug for Rkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rkey({:#x})", self.0)
    }
}

/// An address in a peer's memory with the key for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddr {
    /// Address at the peer: the iova that the peer registered.
    pub addr: u64,
    /// Key of the peer's region.
    pub rkey: Rkey,
}

/// A scatter/gather element: 1 byte to 4 GiB less 4 KiB of a registered region. Use
/// [`MemoryRegion::sge`](crate::MemoryRegion::sge) to get one.
///
/// An element borrows its region, so posting it needs a live region. If the region is deregistered while the
/// work request is in flight, the request fails: a device accesses no memory without a registration.
///
/// The key of an element names its region in one protection domain only. A queue pair refuses the elements of
/// another domain, where the same key may name other memory.
#[derive(Clone, Copy)]
#[doc(alias = "ibv_sge")]
pub struct Sge<'mr> {
    raw: ffi::ibv_sge,
    /// The domain of its region; `None` for memory that another library registered.
    domain: Option<DomainId>,
    region: PhantomData<&'mr ()>,
}

impl std::fmt::Debug for Sge<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ffi::ibv_sge { addr, length, lkey } = self.raw;
        write!(f, "Sge {{ addr: {addr:#x}, length: {length}, lkey: {lkey:#x} }}")
    }
}

impl Sge<'_> {
    /// An element for addresses that the region of `lkey` in `domain` covers. The caller chooses the lifetime.
    pub(crate) fn new(domain: &ProtectionDomain, addr: u64, length: u32, lkey: Lkey) -> Self {
        let raw = ffi::ibv_sge { addr, length, lkey: lkey.0 };
        Self { raw, domain: Some(domain.id()), region: PhantomData }
    }

    /// Wraps an element for memory that another library registered.
    ///
    /// # Safety
    /// The device reads or writes these bytes once a work request with this element is posted. They must stay
    /// registered under the element's key until the request completes, in the protection domain of the queue pair,
    /// which is not compared. No reference may exist that the device's access would violate.
    pub unsafe fn from_raw(raw: ffi::ibv_sge) -> Self {
        Self { raw, domain: None, region: PhantomData }
    }

    /// The element as libibverbs reads it.
    pub(super) fn raw(&self) -> ffi::ibv_sge {
        self.raw
    }

    /// Whether the element may be posted to a queue pair in `domain`.
    pub(super) fn fits(&self, domain: DomainId) -> bool {
        self.domain.is_none_or(|own| own == domain)
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an element has at least one byte
    pub fn len(&self) -> u32 {
        self.raw.length
    }
}

/// The operation of a work request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Writes local bytes into the peer's memory.
    #[doc(alias = "IBV_WR_RDMA_WRITE")]
    Write {
        /// Target address at the peer.
        remote: RemoteAddr,
    },
    /// Like `Write`; the peer's next receive completes with the immediate data.
    #[doc(alias = "IBV_WR_RDMA_WRITE_WITH_IMM")]
    WriteWithImm {
        /// Target address at the peer.
        remote: RemoteAddr,
        /// Immediate data.
        imm: u32,
    },
    /// Reads the peer's bytes into local memory.
    #[doc(alias = "IBV_WR_RDMA_READ")]
    Read {
        /// Source address at the peer.
        remote: RemoteAddr,
    },
    /// Sends local bytes into the peer's next receive.
    #[doc(alias = "IBV_WR_SEND")]
    Send,
    /// Like `Send`, with immediate data.
    #[doc(alias = "IBV_WR_SEND_WITH_IMM")]
    SendWithImm {
        /// Immediate data.
        imm: u32,
    },
    /// Adds to a u64 of the peer, and returns its previous value in 8 local bytes.
    #[doc(alias = "IBV_WR_ATOMIC_FETCH_AND_ADD")]
    FetchAdd {
        /// Address of the u64 at the peer, a multiple of 8.
        remote: RemoteAddr,
        /// The value to add; the sum wraps.
        add: u64,
    },
    /// Replaces a u64 of the peer if it equals `compare`, and returns its previous value in 8 local bytes.
    #[doc(alias = "IBV_WR_ATOMIC_CMP_AND_SWP")]
    CompareSwap {
        /// Address of the u64 at the peer, a multiple of 8.
        remote: RemoteAddr,
        /// The value to compare with.
        compare: u64,
        /// The new value.
        swap: u64,
    },
}

/// An [`Operation`] without its arguments, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Opcode {
    /// [`Operation::Write`].
    Write,
    /// [`Operation::WriteWithImm`].
    WriteWithImm,
    /// [`Operation::Read`].
    Read,
    /// [`Operation::Send`].
    Send,
    /// [`Operation::SendWithImm`].
    SendWithImm,
    /// [`Operation::FetchAdd`].
    FetchAdd,
    /// [`Operation::CompareSwap`].
    CompareSwap,
    /// A receive.
    Recv,
}

impl Opcode {
    pub(crate) fn is_atomic(self) -> bool {
        matches!(self, Self::FetchAdd | Self::CompareSwap)
    }
}

impl Operation {
    /// The operation without its arguments.
    pub fn opcode(&self) -> Opcode {
        match self {
            Self::Write { .. } => Opcode::Write,
            Self::WriteWithImm { .. } => Opcode::WriteWithImm,
            Self::Read { .. } => Opcode::Read,
            Self::Send => Opcode::Send,
            Self::SendWithImm { .. } => Opcode::SendWithImm,
            Self::FetchAdd { .. } => Opcode::FetchAdd,
            Self::CompareSwap { .. } => Opcode::CompareSwap,
        }
    }

    /// The operation for one message of a longer transfer, at this address of the peer. Immediate data goes with
    /// the last message.
    pub(crate) fn message(self, remote: RemoteAddr, last: bool) -> Self {
        match self {
            Self::Write { .. } => Self::Write { remote },
            Self::WriteWithImm { imm, .. } if last => Self::WriteWithImm { remote, imm },
            Self::WriteWithImm { .. } => Self::Write { remote },
            Self::Read { .. } => Self::Read { remote },
            Self::SendWithImm { .. } if !last => Self::Send,
            Self::Send | Self::SendWithImm { .. } => self,
            Self::FetchAdd { add, .. } => Self::FetchAdd { remote, add },
            Self::CompareSwap { compare, swap, .. } => Self::CompareSwap { remote, compare, swap },
        }
    }

    /// The work request for this operation, without its elements.
    #[cfg(test)]
    fn request(&self, elements: &[Sge<'_>]) -> Result<ffi::ibv_send_wr> {
        let mut wr = ffi::ibv_send_wr::default();
        self.fill(&mut wr, elements.iter().map(|sge| u64::from(sge.len())).sum())?;
        Ok(wr)
    }

    /// Sets the operation in a work request with elements of `bytes` bytes. The request may hold an earlier one.
    pub(crate) fn fill(&self, wr: &mut ffi::ibv_send_wr, bytes: u64) -> Result<()> {
        use ffi::ibv_wr_opcode::*;
        wr.send_flags = 0;
        let mut rdma = |opcode, remote: RemoteAddr| {
            wr.opcode = opcode;
            wr.wr.rdma.remote_addr = remote.addr;
            wr.wr.rdma.rkey = remote.rkey.0;
        };
        match *self {
            Self::Write { remote } => rdma(IBV_WR_RDMA_WRITE, remote),
            Self::Read { remote } => rdma(IBV_WR_RDMA_READ, remote),
            Self::WriteWithImm { remote, imm } => {
                rdma(IBV_WR_RDMA_WRITE_WITH_IMM, remote);
                wr.__bindgen_anon_1.imm_data = imm.to_be();
            }
            Self::Send => wr.opcode = IBV_WR_SEND,
            Self::SendWithImm { imm } => {
                wr.opcode = IBV_WR_SEND_WITH_IMM;
                wr.__bindgen_anon_1.imm_data = imm.to_be();
            }
            Self::FetchAdd { remote, add } => {
                wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
                wr.wr.atomic = self.atomic(remote, add, 0, bytes)?;
            }
            Self::CompareSwap { remote, compare, swap } => {
                wr.opcode = IBV_WR_ATOMIC_CMP_AND_SWP;
                wr.wr.atomic = self.atomic(remote, compare, swap, bytes)?;
            }
        }
        Ok(())
    }

    fn atomic(
        &self,
        RemoteAddr { addr, rkey: Rkey(rkey) }: RemoteAddr,
        compare_add: u64,
        swap: u64,
        length: u64,
    ) -> Result<ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_2> {
        if addr % 8 != 0 || length != 8 {
            return Err(Error::InvalidAtomic { opcode: self.opcode(), addr, length });
        }
        Ok(ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_2 { remote_addr: addr, compare_add, swap, rkey })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(length: u32) -> Sge<'static> {
        // SAFETY: it is not posted.
        unsafe { Sge::from_raw(ffi::ibv_sge { addr: 64, length, lkey: 1 }) }
    }

    #[test]
    fn requests_carry_their_arguments() {
        let remote = RemoteAddr { addr: 0x1_2345_6780, rkey: Rkey(0x77) };
        let eight = [element(8)];
        let wr = Operation::Write { remote }.request(&eight).unwrap();
        // SAFETY: `rdma` is what a WRITE fills in; every bit pattern is valid for it.
        let rdma = unsafe { wr.wr.rdma };
        assert_eq!((wr.opcode, rdma.remote_addr, rdma.rkey), (0, remote.addr, 0x77));

        let wr = Operation::SendWithImm { imm: 0x0102_0304 }.request(&[]).unwrap();
        // SAFETY: both views of the union are four plain bytes.
        let imm = unsafe { wr.__bindgen_anon_1.imm_data };
        assert_eq!(imm.to_ne_bytes(), [1, 2, 3, 4], "immediate data travels big-endian");

        let wr = Operation::CompareSwap { remote, compare: 5, swap: 6 }.request(&eight).unwrap();
        // SAFETY: `atomic` is what a compare-and-swap fills in; every bit pattern is valid for it.
        let atomic = unsafe { wr.wr.atomic };
        assert_eq!((atomic.compare_add, atomic.swap, atomic.rkey), (5, 6, 0x77));
    }

    #[test]
    fn atomics_are_eight_aligned_bytes() {
        let add = |addr| Operation::FetchAdd { remote: RemoteAddr { addr, rkey: Rkey(1) }, add: 1 };
        let refused = |operation: Operation, elements: &[Sge<'_>]| {
            matches!(operation.request(elements), Err(Error::InvalidAtomic { .. }))
        };
        let (four, eight) = ([element(4)], [element(8)]);
        assert!(refused(add(4), &eight) && refused(add(8), &four) && refused(add(8), &[]));
        assert!(!refused(add(8), &eight));
    }
}
