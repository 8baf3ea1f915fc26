//! A registered region.

use std::fmt;
use std::io;

use super::path::{Path, Registered};
use super::{Access, MemoryRegionBuilder};
use crate::dmabuf::DmaBuf;
use crate::exporter::Backing;
use crate::transfer::{RemoteRegion, RemoteRun};
use crate::umem::{Iova, Umem, check_range};
use crate::verbs::{ProtectionDomain, Sge};
use crate::{Error, Result};

/// The key by which this side's work requests name a region.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lkey(pub u32);

/// The key by which a peer names a region.
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

/// A range of a dma-buf that a device may read and write, as permitted.
///
/// It holds the buffer's memory, through the kernel, and the protection domain. It needs no
/// descriptor: the [`DmaBuf`] may be dropped. Dropping the region deregisters it and logs a failure;
/// [`deregister`](Self::deregister) reports one.
#[derive(Debug)]
pub struct MemoryRegion {
    registered: Registered,
    /// Cleared by `deregister`, so that `drop` does nothing more.
    live: bool,
    path: Path,
    access: Access,
    umem: Umem,
    // Dropped after the region was deregistered in `drop`: the domain, and host pages if it is of them.
    domain: ProtectionDomain,
    _backing: Option<Backing>,
}

/// A region that could not be deregistered, handed back with the reason.
#[derive(Debug, thiserror::Error)]
#[error("the region stays registered")]
pub struct DeregisterError {
    /// The region, registered as before.
    pub region: Box<MemoryRegion>,
    /// Why not.
    #[source]
    pub error: Error,
}

impl MemoryRegion {
    /// Starts a registration in a protection domain. By default it is the whole buffer, addressed from
    /// iova 0 on, for local reading only.
    #[doc(alias("ibv_reg_dmabuf_mr", "UVERBS_METHOD_REG_DMABUF_MR"))]
    pub fn builder<'a>(domain: &'a ProtectionDomain, buffer: &'a DmaBuf) -> MemoryRegionBuilder<'a> {
        MemoryRegionBuilder::new(domain, buffer)
    }

    pub(super) fn new(
        registered: Registered,
        path: Path,
        access: Access,
        umem: Umem,
        domain: ProtectionDomain,
        backing: Option<Backing>,
    ) -> Self {
        Self { registered, live: true, path, access, umem, domain, _backing: backing }
    }

    /// The key for this side's work requests.
    pub fn lkey(&self) -> Lkey {
        self.registered.lkey
    }

    /// The key for a peer's.
    pub fn rkey(&self) -> Rkey {
        self.registered.rkey
    }

    /// Address of the region's first byte.
    pub fn iova(&self) -> Iova {
        self.umem.iova()
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range cannot be registered
    pub fn len(&self) -> u64 {
        self.umem.len()
    }

    /// The path that registered it.
    pub fn path(&self) -> Path {
        self.path
    }

    /// What it may be used for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The range that it covers.
    pub fn umem(&self) -> &Umem {
        &self.umem
    }

    /// The protection domain that it is in.
    pub fn domain(&self) -> &ProtectionDomain {
        &self.domain
    }

    /// `length` bytes from `offset` of the region, for a work request.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::OutOfRange`]: the range is empty or not inside the region.
    /// - [`Error::SgeTooLong`]: longer than one element can be; split it.
    pub fn sge(&self, offset: u64, length: u64) -> Result<Sge<'_>> {
        check_range(offset, length, self.len())?;
        let too_long = || Error::SgeTooLong { length };
        let run = self.umem.sg().run_at(offset).filter(|run| run.len >= length).ok_or_else(too_long)?;
        let length = u32::try_from(length).map_err(|_| too_long())?;
        Ok(Sge::new(run.addr, length, self.lkey()))
    }

    /// What a peer must know to read and write the region.
    pub fn remote(&self) -> RemoteRegion {
        let run = RemoteRun { iova: self.iova(), length: self.len(), rkey: self.rkey() };
        // One run, whose end was checked when the range was described.
        RemoteRegion::new([run], self.access, self.umem.buffer()).expect("a region is a run")
    }

    /// Deregisters the region: from here on the device cannot reach the memory.
    ///
    /// # Errors
    /// [`DeregisterError`] with [`Error::Deregister`] (`EBUSY`: a memory window is bound to it); it
    /// hands the region back.
    #[doc(alias = "ibv_dereg_mr")]
    #[inline]
    pub fn deregister(mut self) -> Result<(), DeregisterError> {
        match self.release() {
            Ok(()) => Ok(()),
            Err(source) => {
                let error = Error::Deregister { lkey: self.lkey().0, source };
                Err(DeregisterError { region: Box::new(self), error })
            }
        }
    }

    #[inline]
    fn release(&mut self) -> io::Result<()> {
        if self.live {
            self.registered.deregister(&self.domain)?;
            self.live = false;
            if tracing::level_enabled!(tracing::Level::DEBUG) {
                log_deregistered(self.lkey(), self.len());
            }
        }
        Ok(())
    }

    /// Out of line, so that nothing of it is where `deregister` ends.
    #[inline(never)]
    fn drop_live(&mut self) {
        let Err(source) = self.release() else { return };
        let error = Error::Deregister { lkey: self.lkey().0, source };
        let (device, errno) = (self.domain.context().device_name(), error.errno());
        tracing::warn!(device, %error, errno, "a region stays registered");
    }
}

impl Drop for MemoryRegion {
    #[inline]
    fn drop(&mut self) {
        if self.live {
            self.drop_live();
        }
    }
}

#[cold]
fn log_deregistered(lkey: Lkey, length: u64) {
    tracing::debug!(lkey = lkey.0, length, "deregistered");
}
