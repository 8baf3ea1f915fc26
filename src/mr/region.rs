//! A registered region.

use std::fmt;
use std::io;

use super::path::{Path, Registered};
use super::{Access, DmaHandle, MemoryRegionBuilder};
use crate::dmabuf::DmaBuf;
use crate::exporter::Backing;
use crate::observe;
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
/// [`deregister`](Self::deregister) reports one. In a child of `fork` dropping it does nothing: the
/// registration is the parent's.
#[derive(Debug)]
pub struct MemoryRegion {
    registered: Registered,
    /// Cleared by `deregister`, so that `drop` does nothing more.
    live: bool,
    path: Path,
    access: Access,
    umem: Umem,
    /// The process that registered it, as forks are counted.
    generation: u32,
    // Dropped after the region was deregistered in `drop`.
    domain: ProtectionDomain,
    _kept: Kept,
}

/// What else must outlive a registration.
#[derive(Debug)]
pub(super) enum Kept {
    Nothing,
    /// The host pages that it is of.
    Backing(#[allow(dead_code)] Backing),
    /// The DMA handle that it was made with, which the kernel would not free before it.
    Handle(#[allow(dead_code)] DmaHandle),
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

    #[inline]
    pub(super) fn new(
        registered: Registered,
        path: Path,
        access: Access,
        umem: Umem,
        domain: ProtectionDomain,
        kept: Kept,
    ) -> Self {
        observe::count_region(path, umem.len());
        let generation = observe::generation();
        Self { registered, live: true, path, access, umem, generation, domain, _kept: kept }
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

    /// Checks by small transfers that the device reaches the region's first and last byte; it catches
    /// what registers and does not transfer.
    ///
    /// A byte is read, written with another value, read, and written back, through a queue pair that is
    /// connected to itself. Nothing else may use these bytes meanwhile. Where the access does not permit
    /// writing they are only read.
    ///
    /// # Errors
    /// - [`RegistrationError::SelfCheck`](crate::error::RegistrationError::SelfCheck): a transfer failed; its source is [`Error::Completion`].
    /// - [`RegistrationError::SelfCheckMismatch`](crate::error::RegistrationError::SelfCheckMismatch): it ended with success, and another byte came back.
    /// - [`Error::Verbs`], [`Error::NoGid`]: the queue pair or its scratch memory could not be made.
    pub fn self_check(&self) -> Result<()> {
        super::self_check::check(&self.domain, std::slice::from_ref(self))
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
            if observe::listening() || self.generation != observe::generation() {
                return self.release_otherwise();
            }
            self.registered.deregister(&self.domain)?;
            self.gone();
        }
        Ok(())
    }

    #[inline]
    fn gone(&mut self) {
        self.live = false;
        observe::discount_region(self.path, self.umem.len());
    }

    /// In a span; or in a child of `fork`, where it is the parent's to deregister.
    #[cold]
    #[inline(never)]
    fn release_otherwise(&mut self) -> io::Result<()> {
        let lkey = self.lkey().0;
        if self.generation != observe::generation() {
            tracing::debug!(lkey, "a region of the parent process is left to it");
            self.gone();
            return Ok(());
        }
        let about = observe::About {
            device: self.domain.context().device_name(),
            buffer: self.umem.buffer(),
            offset: self.umem.offset(),
            length: self.umem.len(),
        };
        observe::span(false, about, |span| {
            span.record("path", tracing::field::display(self.path)).record("lkey", lkey);
            let answer = self.registered.deregister(&self.domain);
            answer.map_err(|source| Error::Deregister { lkey, source })?;
            tracing::debug!("deregistered");
            Ok(())
        })
        .map_err(|error| match error {
            Error::Deregister { source, .. } => source,
            other => io::Error::other(other),
        })?;
        self.gone();
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
