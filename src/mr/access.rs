//! What a region may be used for.

use crate::dmabuf::DmaBuf;
use crate::{Error, Result};

bitflags::bitflags! {
    /// Access flags of a memory region: those that the kernel permits for a dma-buf. READ by the
    /// device itself is always permitted.
    ///
    /// Source: `UVERBS_METHOD_REG_DMABUF_MR` in `drivers/infiniband/core/uverbs_std_types_mr.c`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    #[doc(alias = "ibv_access_flags")]
    pub struct Access: u32 {
        /// The device may write: receives and READs may land here.
        const LOCAL_WRITE = 1;
        /// A peer may write. Needs `LOCAL_WRITE`.
        const REMOTE_WRITE = 1 << 1;
        /// A peer may read.
        const REMOTE_READ = 1 << 2;
        /// A peer may do atomics. Needs `LOCAL_WRITE`.
        const REMOTE_ATOMIC = 1 << 3;
        /// The device may reorder its PCIe writes; ignored where it cannot.
        const RELAXED_ORDERING = 1 << 20;
        // Flags unknown here survive, to be refused by name.
        const _ = !0;
    }
}

impl Access {
    /// Everything a peer may be allowed: LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ and REMOTE_ATOMIC.
    pub const REMOTE: Self =
        Self::LOCAL_WRITE.union(Self::REMOTE_WRITE).union(Self::REMOTE_READ).union(Self::REMOTE_ATOMIC);

    const PERMITTED: Self = Self::REMOTE.union(Self::RELAXED_ORDERING);

    const WRITES: Self = Self::LOCAL_WRITE.union(Self::REMOTE_WRITE).union(Self::REMOTE_ATOMIC);

    /// Checks the flags by themselves and against the buffer's mode, which the kernel does not.
    #[inline]
    pub(super) fn check(self, buffer: &DmaBuf) -> Result<()> {
        self.check_flags()?;
        if self.intersects(Self::WRITES) && !buffer.is_writable() {
            let access = format!("{:?}", self.intersection(Self::WRITES));
            return Err(Error::ReadOnlyBuffer { access });
        }
        Ok(())
    }

    fn check_flags(self) -> Result<()> {
        let flags = self.difference(Self::PERMITTED);
        if !flags.is_empty() {
            return Err(Error::AccessNotPermitted { flags });
        }
        if self.intersects(Self::REMOTE_WRITE | Self::REMOTE_ATOMIC) && !self.contains(Self::LOCAL_WRITE) {
            return Err(Error::LocalWriteMissing { flags: self });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_have_the_values_of_libibverbs() {
        use ibverbs_sys::ibv_access_flags as Sys;
        assert_eq!(Access::LOCAL_WRITE.bits(), Sys::IBV_ACCESS_LOCAL_WRITE.0);
        assert_eq!(Access::REMOTE_WRITE.bits(), Sys::IBV_ACCESS_REMOTE_WRITE.0);
        assert_eq!(Access::REMOTE_READ.bits(), Sys::IBV_ACCESS_REMOTE_READ.0);
        assert_eq!(Access::REMOTE_ATOMIC.bits(), Sys::IBV_ACCESS_REMOTE_ATOMIC.0);
        assert_eq!(Access::RELAXED_ORDERING.bits(), Sys::IBV_ACCESS_RELAXED_ORDERING.0);
    }

    #[test]
    fn flags_that_the_kernel_refuses_are_named() {
        let on_demand = Access::from_bits_retain(ibverbs_sys::ibv_access_flags::IBV_ACCESS_ON_DEMAND.0);
        match (Access::LOCAL_WRITE | on_demand).check_flags() {
            Err(Error::AccessNotPermitted { flags }) => assert_eq!(flags, on_demand),
            other => panic!("expected AccessNotPermitted, got {other:?}"),
        }
    }

    #[test]
    fn a_peer_may_write_only_where_the_owner_may() {
        for flags in [Access::REMOTE_WRITE, Access::REMOTE_ATOMIC, Access::REMOTE_WRITE | Access::REMOTE_READ]
        {
            assert!(matches!(flags.check_flags(), Err(Error::LocalWriteMissing { .. })), "{flags:?}");
            (flags | Access::LOCAL_WRITE).check_flags().unwrap();
        }
        Access::REMOTE_READ.check_flags().unwrap();
        Access::empty().check_flags().unwrap();
    }
}
