//! What can be posted to a queue pair.

use std::marker::PhantomData;

use ibverbs_sys as ffi;

use crate::mr::{Lkey, Rkey};
use crate::transfer::RemoteAddr;
use crate::{Error, Result};

/// A scatter/gather element: up to 4 GiB less one byte of a registered region, made by
/// [`MemoryRegion::sge`](crate::MemoryRegion::sge).
///
/// It borrows its region, so that a request cannot be posted for one that is gone. One that goes while
/// the request is under way fails the request; the device never reaches memory without a region.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Sge<'mr> {
    raw: ffi::ibv_sge,
    region: PhantomData<&'mr ()>,
}

impl std::fmt::Debug for Sge<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ffi::ibv_sge { addr, length, lkey } = self.raw;
        write!(f, "Sge {{ addr: {addr:#x}, length: {length}, lkey: {lkey:#x} }}")
    }
}

impl Sge<'_> {
    /// An element for addresses that the region of `lkey` covers; the caller chooses what it borrows.
    pub(crate) fn new(addr: u64, length: u32, lkey: Lkey) -> Self {
        Self { raw: ffi::ibv_sge { addr, length, lkey: lkey.0 }, region: PhantomData }
    }

    /// Wraps an element for memory that another library registered.
    ///
    /// # Safety
    /// The device will read or write these bytes when a request with this element is posted: they are
    /// registered under the element's key until it completes, and nobody holds a reference to them
    /// that the device's access would break.
    pub unsafe fn from_raw(raw: ffi::ibv_sge) -> Self {
        Self { raw, region: PhantomData }
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // made for at least one byte
    pub fn len(&self) -> u32 {
        self.raw.length
    }
}

/// What a posted request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Local bytes are written at the peer.
    #[doc(alias = "IBV_WR_RDMA_WRITE")]
    Write {
        /// Where at the peer.
        remote: RemoteAddr,
    },
    /// As `Write`, and the peer's next receive completes with a number.
    #[doc(alias = "IBV_WR_RDMA_WRITE_WITH_IMM")]
    WriteWithImm {
        /// Where at the peer.
        remote: RemoteAddr,
        /// The number.
        imm: u32,
    },
    /// The peer's bytes are read into local ones.
    #[doc(alias = "IBV_WR_RDMA_READ")]
    Read {
        /// Where at the peer.
        remote: RemoteAddr,
    },
    /// Local bytes go to the peer's next receive.
    #[doc(alias = "IBV_WR_SEND")]
    Send,
    /// As `Send`, with a number beside.
    #[doc(alias = "IBV_WR_SEND_WITH_IMM")]
    SendWithImm {
        /// The number.
        imm: u32,
    },
    /// Adds to the peer's u64 and returns what it was into 8 local bytes.
    #[doc(alias = "IBV_WR_ATOMIC_FETCH_AND_ADD")]
    FetchAdd {
        /// Where at the peer; a multiple of 8.
        remote: RemoteAddr,
        /// What is added.
        add: u64,
    },
    /// Replaces the peer's u64 if it is `compare`, and returns what it was into 8 local bytes.
    #[doc(alias = "IBV_WR_ATOMIC_CMP_AND_SWP")]
    CompareSwap {
        /// Where at the peer; a multiple of 8.
        remote: RemoteAddr,
        /// What it must be.
        compare: u64,
        /// What it becomes.
        swap: u64,
    },
}

/// The kind of an [`Operation`], for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // the names are those of the operations
pub enum Opcode {
    Write,
    WriteWithImm,
    Read,
    Send,
    SendWithImm,
    FetchAdd,
    CompareSwap,
    Recv,
}

impl Operation {
    /// Its kind.
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

    /// The libibverbs request for it; `next` and the list are null and 0, for the caller to fill in.
    pub(super) fn request(&self, elements: &[Sge<'_>]) -> Result<ffi::ibv_send_wr> {
        let mut wr = ffi::ibv_send_wr::default();
        self.fill(&mut wr, elements.iter().map(|sge| u64::from(sge.len())).sum())?;
        Ok(wr)
    }

    /// What it sets in a request of elements of so many bytes, which may have been another one before.
    #[inline(always)]
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

    #[test]
    fn requests_carry_their_arguments() {
        let remote = RemoteAddr { addr: 0x1_2345_6780, rkey: Rkey(0x77) };
        let eight = [Sge::new(64, 8, Lkey(1))];
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
        let (four, eight) = ([Sge::new(0, 4, Lkey(1))], [Sge::new(0, 8, Lkey(1))]);
        assert!(refused(add(4), &eight) && refused(add(8), &four) && refused(add(8), &[]));
        assert!(!refused(add(8), &eight));
    }
}
