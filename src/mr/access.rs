//! Access flags of a region.

use super::{Buffer, RegisterError};

type Result<T, E = RegisterError> = std::result::Result<T, E>;

bitflags::bitflags! {
    /// Access flags of a memory region. The constants are the flags that the kernel permits for a dma-buf, and this
    /// library for host memory; the device may always read.
    ///
    /// Source: `UVERBS_METHOD_REG_DMABUF_MR` in `drivers/infiniband/core/uverbs_std_types_mr.c`. The values are
    /// those of `ibv_access_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    #[doc(alias = "ibv_access_flags")]
    pub struct Access: u32 {
        /// The device may write: the region can be the target of receives, READs and atomics' results.
        const LOCAL_WRITE = 1;
        /// A peer may WRITE. Needs `LOCAL_WRITE`.
        const REMOTE_WRITE = 1 << 1;
        /// A peer may READ.
        const REMOTE_READ = 1 << 2;
        /// A peer may execute atomics. Needs `LOCAL_WRITE`.
        const REMOTE_ATOMIC = 1 << 3;
        /// The device may reorder its PCIe writes; a device that cannot ignores the flag.
        const RELAXED_ORDERING = 1 << 20;
        // Unknown flags are kept, so that the error can name them.
        const _ = !0;
    }
}

impl Access {
    /// All access of a peer: LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ and REMOTE_ATOMIC.
    pub const REMOTE: Self =
        Self::LOCAL_WRITE.union(Self::REMOTE_WRITE).union(Self::REMOTE_READ).union(Self::REMOTE_ATOMIC);

    const PERMITTED: Self = Self::REMOTE.union(Self::RELAXED_ORDERING);

    const WRITES: Self = Self::LOCAL_WRITE.union(Self::REMOTE_WRITE).union(Self::REMOTE_ATOMIC);

    /// Checks the flags, and that the buffer permits them, which the kernel does not check for a dma-buf.
    pub(super) fn check(self, buffer: Buffer<'_>) -> Result<()> {
        self.check_flags()?;
        if self.intersects(Self::WRITES) && !buffer.is_writable() {
            return Err(RegisterError::ReadOnlyBuffer { access: self.intersection(Self::WRITES) });
        }
        Ok(())
    }

    pub(super) fn check_flags(self) -> Result<()> {
        let flags = self.difference(Self::PERMITTED);
        if !flags.is_empty() {
            return Err(RegisterError::AccessNotPermitted { flags, device: None, source: None });
        }
        if self.intersects(Self::REMOTE_WRITE | Self::REMOTE_ATOMIC) && !self.contains(Self::LOCAL_WRITE) {
            return Err(RegisterError::LocalWriteMissing { flags: self });
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
            Err(RegisterError::AccessNotPermitted { flags, device: None, .. }) => {
                assert_eq!(flags, on_demand)
            }
            other => panic!("expected AccessNotPermitted, got {other:?}"),
        }
    }

    #[test]
    fn a_peer_may_write_only_where_the_owner_may() {
        for flags in [Access::REMOTE_WRITE, Access::REMOTE_ATOMIC, Access::REMOTE_WRITE | Access::REMOTE_READ]
        {
            assert!(matches!(flags.check_flags(), Err(RegisterError::LocalWriteMissing { .. })), "{flags:?}");
            (flags | Access::LOCAL_WRITE).check_flags().unwrap();
        }
        Access::REMOTE_READ.check_flags().unwrap();
        Access::empty().check_flags().unwrap();
    }
}
