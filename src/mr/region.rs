//! A registered memory region.
//!
//! `unsafe` is here for regions of other libraries, whose callers vouch for them.

use std::fmt;
use std::io;
use std::mem;
use std::ops::RangeBounds;
use std::ptr::NonNull;
use std::sync::Arc;

use dma_sg::{Iova, RangeError};

use super::path::{Path, Registered};
use super::{
    Access, Buffer, DeregisterError, MemoryRegionBuilder, RegionSlice, RegisterError, RemoteRegion,
    SelfCheckError, Umem, self_check,
};
use crate::exporter::Backing;
use crate::host::HostBuffer;
use crate::observe::{self, Process};
use crate::verbs::{self, DmaHandle, Lkey, ProtectionDomain, Rkey, Sge, ffi};

/// A registered range of a dma-buf or of host memory. The device accesses its memory as the [`access`](Self::access) flags permit.
///
/// A `MemoryRegion` is a handle. Clones and [slices](Self::slice) share one registration, and dropping the last
/// of them deregisters it; a failure is logged. [`deregister`](Self::deregister) reports the failure instead. A
/// transfer in flight holds a handle too, so no order of drops frees memory that a device uses.
///
/// The registration holds its protection domain, and the kernel holds the memory of a dma-buf for it. It needs no
/// descriptor: the [`DmaBuf`](crate::DmaBuf) may be dropped. A region of host memory holds its [`HostBuffer`]. In a child of `fork` dropping the last handle does nothing, because
/// the registration belongs to the parent.
#[derive(Clone)]
#[doc(alias = "ibv_mr")]
pub struct MemoryRegion {
    inner: Arc<Registration>,
}

struct Registration {
    registered: Registered,
    /// False after the deregistration, so that `drop` does nothing.
    live: bool,
    path: Path,
    access: Access,
    umem: Umem,
    creator: Process,
    // The last two fields, so that they are dropped after `drop` deregistered the region.
    domain: ProtectionDomain,
    kept: Kept,
}

/// What must live as long as the registration.
#[derive(Debug)]
pub(super) enum Kept {
    Nothing,
    /// The mapped host pages of a HostMapping registration.
    Backing(#[allow(dead_code)] Backing),
    /// The DMA handle: the kernel refuses to free it before the region.
    Handle(#[allow(dead_code)] DmaHandle),
    /// The registered host memory.
    Host(#[allow(dead_code)] HostBuffer),
}

impl MemoryRegion {
    /// Starts the registration of a [`DmaBuf`](crate::DmaBuf) or a [`HostBuffer`] in a protection domain. The defaults
    /// are the whole buffer, an iova that equals the offset, and no access flags: the device may read.
    #[doc(alias("ibv_reg_dmabuf_mr", "UVERBS_METHOD_REG_DMABUF_MR", "ibv_reg_mr", "ibv_reg_mr_iova2"))]
    pub fn builder<'a>(
        domain: &'a ProtectionDomain,
        buffer: impl Into<Buffer<'a>>,
    ) -> MemoryRegionBuilder<'a> {
        MemoryRegionBuilder::new(domain, buffer.into())
    }

    /// Wraps a region that another library registered with these access flags. It is never deregistered here, and
    /// [`path`](Self::path) says [`Path::Foreign`].
    ///
    /// `iova` is the address of its first byte in work requests: what was passed to the registration, or the address of
    /// the memory for `ibv_reg_mr`. libibverbs sets `mr->addr` to another one for a dma-buf.
    ///
    /// # Errors
    /// - [`RegisterError::Range`]: the region has no bytes.
    /// - [`RegisterError::IovaOverflow`]: `iova` plus the length does not fit in 64 bits.
    /// - [`RegisterError::AccessNotPermitted`], [`RegisterError::LocalWriteMissing`]: no region has these flags.
    ///
    /// # Safety
    /// `raw` points to a live `ibv_mr` of a live domain and an open context. All three stay so while a clone or a slice of
    /// the result, or a transfer of one, lives. `iova` is that of the region. No reference to its memory exists that the
    /// device's access would violate. Its provider [locks](crate::verbs#providers-without-locks), or one thread at a time
    /// uses them.
    pub unsafe fn from_raw(
        raw: NonNull<ffi::ibv_mr>,
        iova: Iova,
        access: Access,
    ) -> Result<Self, RegisterError> {
        access.check_flags()?;
        // SAFETY: the caller guarantees a live region, which points to its live domain.
        let (domain, length, lkey, rkey) = unsafe {
            let ffi::ibv_mr { pd, length, lkey, rkey, .. } = *raw.as_ptr();
            let domain = ProtectionDomain::from_raw(NonNull::new(pd).expect("an ibv_mr has a domain"));
            (domain, length as u64, Lkey(lkey), Rkey(rkey))
        };
        let umem = Umem::foreign(length, iova)?;
        let registered = Registered::foreign(lkey, rkey);
        Ok(Self::new(registered, Path::Foreign, access, umem, domain, Kept::Nothing))
    }

    pub(super) fn new(
        registered: Registered,
        path: Path,
        access: Access,
        umem: Umem,
        domain: ProtectionDomain,
        kept: Kept,
    ) -> Self {
        if let Some(counter) = path.counter() {
            counter.add(umem.len());
        }
        let creator = Process::current();
        let inner = Registration { registered, live: true, path, access, umem, creator, domain, kept };
        Self { inner: Arc::new(inner) }
    }

    /// The local key, for work requests of this side.
    pub fn lkey(&self) -> Lkey {
        self.inner.registered.lkey
    }

    /// The remote key, for a peer's work requests.
    pub fn rkey(&self) -> Rkey {
        self.inner.registered.rkey
    }

    /// Address of the first byte in work requests.
    pub fn iova(&self) -> Iova {
        self.inner.umem.iova()
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range cannot be registered
    pub fn len(&self) -> u64 {
        self.inner.umem.len()
    }

    /// The path that registered the region.
    pub fn path(&self) -> Path {
        self.inner.path
    }

    /// The access flags of the region.
    pub fn access(&self) -> Access {
        self.inner.access
    }

    /// The range of the buffer and its iova.
    pub fn umem(&self) -> &Umem {
        &self.inner.umem
    }

    /// The protection domain of the region.
    pub fn domain(&self) -> &ProtectionDomain {
        &self.inner.domain
    }

    /// A byte range of the region, for a transfer, a work request or a peer. The slice is a handle: it keeps the
    /// region registered.
    ///
    /// # Errors
    /// [`RangeError`]: the range is empty, inverted, or not inside the region.
    pub fn slice(&self, range: impl RangeBounds<u64>) -> Result<RegionSlice, RangeError> {
        RegionSlice::from(self).slice(range)
    }

    /// A byte range of the region as one scatter/gather element, for [`QueuePair::post`](verbs::QueuePair::post).
    ///
    /// # Errors
    /// - [`verbs::Error::Range`]: the range is empty, inverted, or not inside the region.
    /// - [`verbs::Error::RequestTooLarge`]: the range is longer than 4 GiB less 4 KiB; [`RegionSlice::sges`] splits
    ///   it.
    pub fn sge(&self, range: impl RangeBounds<u64>) -> verbs::Result<Sge<'_>> {
        let range = dma_sg::resolve_range(range, self.len())?;
        let length = range.end - range.start;
        let limit = super::slice::MAX_SGE_LEN;
        if length > limit {
            return Err(verbs::Error::sge_too_long(length, limit));
        }
        Ok(Sge::new(self.domain(), self.iova().0 + range.start, length as u32, self.lkey()))
    }

    /// The description that a peer needs to access the region. To describe a part, call
    /// [`RegionSlice::remote`].
    pub fn remote(&self) -> RemoteRegion {
        RegionSlice::from(self).remote()
    }

    /// Checks that the device reaches the region's first and last byte. It finds memory that registers but does
    /// not transfer, such as peer-to-peer DMA that a switch or an IOMMU blocks.
    ///
    /// A queue pair connected to itself reads each byte, writes another value, reads it back and restores it.
    /// Nothing else may use the two bytes meanwhile. Without LOCAL_WRITE it only reads. It uses the first active port
    /// of the device.
    ///
    /// # Errors
    /// - [`SelfCheckError::Transfer`]: a transfer failed or did not complete in 10 s; its source has the
    ///   completion status.
    /// - [`SelfCheckError::Mismatch`]: the transfer succeeded, but the device accessed other memory.
    /// - [`SelfCheckError::Setup`]: the queue pair or its scratch page could not be created.
    pub fn self_check(&self) -> Result<(), SelfCheckError> {
        self_check::check(self.domain(), std::slice::from_ref(self))
    }

    /// Deregisters the region. Afterwards no device accesses the memory through its keys.
    ///
    /// # Errors
    /// - [`DeregisterError::InUse`]: other handles live; dropping the last one deregisters.
    /// - [`DeregisterError::Refused`]: `EBUSY` while a memory window is bound to the region.
    ///
    /// Both contain the handle, and the region stays registered.
    #[doc(alias = "ibv_dereg_mr")]
    pub fn deregister(self) -> Result<(), DeregisterError> {
        let others = Arc::strong_count(&self.inner) - 1;
        match Arc::try_unwrap(self.inner) {
            Ok(mut registration) => registration.release().map_err(|source| DeregisterError::Refused {
                region: Self { inner: Arc::new(registration) },
                source,
            }),
            // Another thread may have dropped its handle after the count.
            Err(inner) => Err(DeregisterError::InUse { region: Self { inner }, handles: others.max(1) }),
        }
    }

    /// Whether a parent process registered it and must deregister it.
    pub(super) fn is_inherited(&self) -> bool {
        !self.inner.creator.is_current()
    }

    /// Whether other handles of the region live. Exact only while nothing else can clone this handle.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.inner) > 1
    }

    /// Whether a unit test's region is still registered.
    #[cfg(test)]
    pub(super) fn is_registered(&self) -> bool {
        self.inner.registered.is_registered()
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Registration { path, access, umem, domain, .. } = &*self.inner;
        f.debug_struct("MemoryRegion")
            .field("umem", umem)
            .field("access", access)
            .field("path", path)
            .field("lkey", &self.lkey())
            .field("rkey", &self.rkey())
            .field("domain", domain)
            .finish()
    }
}

impl Registration {
    fn release(&mut self) -> io::Result<()> {
        if self.live {
            let lkey = self.registered.lkey.0;
            if !self.creator.is_current() {
                tracing::debug!(lkey, "a region stays registered for the parent process");
            } else if observe::listening() {
                self.deregister_in_a_span()?;
            } else {
                self.registered.deregister(&self.domain)?;
            }
            self.live = false;
            if let Some(counter) = self.path.counter() {
                counter.subtract(self.umem.len());
            }
        }
        Ok(())
    }

    #[cold]
    fn deregister_in_a_span(&self) -> io::Result<()> {
        let fields = observe::SpanFields {
            device: self.domain.context().device_name(),
            buffer: self.umem.buffer().inode(),
            offset: self.umem.offset(),
            length: self.umem.len(),
        };
        observe::span(false, fields, |span| {
            let lkey = self.registered.lkey.0;
            span.record("path", tracing::field::display(self.path)).record("lkey", lkey);
            self.registered.deregister(&self.domain)?;
            tracing::debug!("deregistered");
            Ok(())
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            let (device, lkey) = (self.domain.context().device_name(), self.registered.lkey.0);
            tracing::warn!(device, lkey, %error, errno = error.raw_os_error(), "a region stays registered");
            // The device still reaches the memory, so it is never freed.
            mem::forget(mem::replace(&mut self.kept, Kept::Nothing));
        }
    }
}
