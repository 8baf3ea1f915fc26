//! A DMA handle: how the device is to hint its transfers to a region's memory.
//!
//! `unsafe` is here for allocating and freeing it.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys_ext::symbols::{self, AllocDmahFn, DeallocDmahFn, ibv_dmah, ibv_dmah_init_attr};

use crate::error::RegistrationError;
use crate::observe;
use crate::verbs::Context;
use crate::{Error, Result};

/// What [`DmaHandle::new`] asks for: PCIe TLP processing hints. All are optional.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DmaHandleOptions {
    /// The CPU whose cache the data should go to.
    pub cpu: Option<u32>,
    /// The processing hint: 0 bidirectional, 1 requester, 2 target, 3 target with priority.
    pub hint: Option<u8>,
    /// The kind of memory behind the regions.
    pub memory: Option<TphMemory>,
}

/// Kind of memory, for the steering tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TphMemory {
    /// Volatile.
    Volatile,
    /// Persistent.
    Persistent,
}

/// A DMA handle of a device, for [`MemoryRegionBuilder::dma_handle`]; clones are the same object, freed
/// with the last of them and of the regions that were made with it.
///
/// It needs rdma-core 59, Linux 6.17 and a device that takes hints; `libibverbs/verbs.h` of rdma-core,
/// `drivers/infiniband/core/uverbs_std_types_dmah.c` of the kernel.
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
    generation: u32,
    // Dropped after the handle was freed.
    context: Context,
}

// SAFETY: the handle is only named in calls that lock what they write.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.generation != observe::generation() {
            return;
        }
        // SAFETY: the handle is ours, and the regions made with it held this object and are gone.
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
    /// - [`RegistrationError::Unavailable`] (`EOPNOTSUPP`, `EPROTONOSUPPORT`, or no such function): the
    ///   library, the kernel or the device has no DMA handles.
    /// - [`RegistrationError::DmaHandle`]: `EINVAL` for a CPU or hint that there is not, `ENOMEM`.
    #[doc(alias = "ibv_alloc_dmah")]
    pub fn new(context: &Context, options: DmaHandleOptions) -> Result<Self> {
        let found = symbols::ibv_alloc_dmah().and_then(|alloc| Ok((alloc, symbols::ibv_dealloc_dmah()?)));
        match found {
            Ok((alloc, free)) => Self::allocate(alloc, free, context, options),
            Err(missing) => Err(unavailable(context, missing.into())),
        }
    }

    pub(super) fn allocate(
        alloc: AllocDmahFn,
        free: DeallocDmahFn,
        context: &Context,
        options: DmaHandleOptions,
    ) -> Result<Self> {
        let DmaHandleOptions { cpu, hint, memory } = options;
        let mut attr = ibv_dmah_init_attr { comp_mask: 0, cpu_id: 0, ph: 0, tph_mem_type: 0 };
        if let Some(cpu) = cpu {
            attr.comp_mask |= symbols::IBV_DMAH_INIT_ATTR_MASK_CPU_ID;
            attr.cpu_id = cpu;
        }
        if let Some(hint) = hint {
            attr.comp_mask |= symbols::IBV_DMAH_INIT_ATTR_MASK_PH;
            attr.ph = hint;
        }
        if let Some(memory) = memory {
            attr.comp_mask |= symbols::IBV_DMAH_INIT_ATTR_MASK_TPH_MEM_TYPE;
            attr.tph_mem_type = match memory {
                TphMemory::Volatile => symbols::IBV_TPH_MEM_TYPE_VM,
                TphMemory::Persistent => symbols::IBV_TPH_MEM_TYPE_PM,
            };
        }
        // SAFETY: the context is open, and the attributes are read during the call only.
        let raw = unsafe { alloc(context.as_raw().as_ptr(), &mut attr) };
        if let Some(raw) = NonNull::new(raw) {
            let (context, generation) = (context.clone(), observe::generation());
            return Ok(Self { inner: Arc::new(Inner { raw, free, generation, context }) });
        }
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => Err(unavailable(context, source.into())),
            _ => Err(RegistrationError::DmaHandle { device: context.device_name().into(), source }.into()),
        }
    }

    pub(super) fn as_raw(&self) -> NonNull<ibv_dmah> {
        self.inner.raw
    }

    /// A handle is an object of one context; the kernel would look its number up in another.
    pub(super) fn check(&self, context: &Context) -> Result<()> {
        if self.inner.context.as_raw() == context.as_raw() {
            return Ok(());
        }
        let device = self.inner.context.device_name().into();
        Err(RegistrationError::ForeignDmaHandle { device }.into())
    }
}

fn unavailable(context: &Context, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    let device = context.device_name().into();
    let (operation, needs) = (DmaHandle::OPERATION, DmaHandle::NEEDS);
    RegistrationError::Unavailable { device, operation, needs, source }.into()
}
