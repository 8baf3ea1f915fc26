//! DMA handles: PCIe processing hints for the transfers to a region's memory.
//!
//! `unsafe` is here to allocate and free them.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys_ext::symbols::{self, AllocDmahFn, DeallocDmahFn, ibv_dmah, ibv_dmah_init_attr};

use super::Context;
use super::error::{Error, Result};
use crate::observe::Process;

/// The PCIe TLP processing hints (TPH) of a [`DmaHandle`]. All are optional.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct DmaHandleOptions {
    /// The CPU whose cache the data should go to.
    pub cpu: Option<u32>,
    /// The processing hint: 0 bidirectional, 1 requester, 2 target, 3 target with priority.
    pub hint: Option<u8>,
    /// Whether the memory behind the regions is persistent, for the steering tag.
    pub persistent_memory: Option<bool>,
}

setters!(DmaHandleOptions { cpu: Option<u32>, hint: Option<u8>, persistent_memory: Option<bool> });

/// A DMA handle of a device, for [`MemoryRegionBuilder::dma_handle`]. Clones share one `ibv_dmah`; it is freed
/// after the last clone and the last region registered with it.
///
/// It needs rdma-core 59, Linux 6.17 and a device with processing hints.
///
/// Source: `libibverbs/verbs.h` of rdma-core, `drivers/infiniband/core/uverbs_std_types_dmah.c` of the kernel.
///
/// [`MemoryRegionBuilder::dma_handle`]: crate::mr::MemoryRegionBuilder::dma_handle
#[derive(Clone)]
#[doc(alias = "ibv_dmah")]
pub struct DmaHandle {
    inner: Arc<Inner>,
}

struct Inner {
    raw: NonNull<ibv_dmah>,
    free: DeallocDmahFn,
    creator: Process,
    // Last, so that it is dropped after the handle is freed.
    context: Context,
}

// SAFETY: the handle is only passed to calls that lock what they write.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.creator.is_current() {
            return;
        }
        // SAFETY: the handle is ours. The regions registered with it held this object, so they are gone.
        let errno = unsafe { (self.free)(self.raw.as_ptr()) };
        if errno != 0 {
            let error = io::Error::from_raw_os_error(errno);
            tracing::warn!(device = self.context.device_name(), %error, "cannot free a DMA handle");
        }
    }
}

impl fmt::Debug for DmaHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DmaHandle").field(&self.inner.context.device_name()).finish()
    }
}

impl DmaHandle {
    const OPERATION: &str = "ibv_alloc_dmah";
    const NEEDS: &str = "rdma-core 59 or later, Linux 6.17 or later, and a provider and device with TLP processing hints (mlx5)";

    /// Allocates a handle.
    ///
    /// # Errors
    /// - [`Error::Unavailable`]: libibverbs lacks the function, or the kernel or the device has no DMA handles
    ///   (`EOPNOTSUPP`, `EPROTONOSUPPORT`).
    /// - [`Error::Device`]: `EINVAL` for an unknown CPU or hint, `ENOMEM`.
    #[doc(alias = "ibv_alloc_dmah")]
    pub fn new(context: &Context, options: DmaHandleOptions) -> Result<Self> {
        let symbols = symbols::ibv_alloc_dmah().and_then(|alloc| Ok((alloc, symbols::ibv_dealloc_dmah()?)));
        match symbols {
            Ok((alloc, free)) => Self::allocate(alloc, free, context, options),
            Err(missing) => Err(unavailable(context, missing.into())),
        }
    }

    pub(crate) fn allocate(
        alloc: AllocDmahFn,
        free: DeallocDmahFn,
        context: &Context,
        options: DmaHandleOptions,
    ) -> Result<Self> {
        let DmaHandleOptions { cpu, hint, persistent_memory } = options;
        let mut attr = ibv_dmah_init_attr { comp_mask: 0, cpu_id: 0, ph: 0, tph_mem_type: 0 };
        if let Some(cpu) = cpu {
            attr.comp_mask |= symbols::IBV_DMAH_INIT_ATTR_MASK_CPU_ID;
            attr.cpu_id = cpu;
        }
        if let Some(hint) = hint {
            attr.comp_mask |= symbols::IBV_DMAH_INIT_ATTR_MASK_PH;
            attr.ph = hint;
        }
        if let Some(persistent) = persistent_memory {
            attr.comp_mask |= symbols::IBV_DMAH_INIT_ATTR_MASK_TPH_MEM_TYPE;
            attr.tph_mem_type =
                if persistent { symbols::IBV_TPH_MEM_TYPE_PM } else { symbols::IBV_TPH_MEM_TYPE_VM };
        }
        // SAFETY: the context is open. The call reads the attributes and does not keep them.
        let raw = unsafe { alloc(context.as_raw().as_ptr(), &mut attr) };
        if let Some(raw) = NonNull::new(raw) {
            let (context, creator) = (context.clone(), Process::current());
            return Ok(Self { inner: Arc::new(Inner { raw, free, creator, context }) });
        }
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => Err(unavailable(context, source.into())),
            _ => Err(context.failed("allocate a DMA handle")(source)),
        }
    }

    pub(crate) fn as_raw(&self) -> NonNull<ibv_dmah> {
        self.inner.raw
    }

    /// Checks that the handle belongs to this context. The kernel would look up its number in another one.
    pub(crate) fn check(&self, context: &Context) -> Result<()> {
        if self.inner.context.as_raw() == context.as_raw() {
            return Ok(());
        }
        let device = context.device_name().into();
        Err(Error::ContextMismatch {
            object: "DMA handle",
            user: "protection domain",
            parent: "context",
            device,
        })
    }
}

fn unavailable(context: &Context, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    let device = context.device_name().into();
    let (operation, needs) = (DmaHandle::OPERATION, DmaHandle::NEEDS);
    Error::Unavailable { device, operation, needs, source: Some(source) }
}
