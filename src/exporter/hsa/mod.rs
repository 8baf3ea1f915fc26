//! ROCm: dma-bufs of AMD GPU memory, through libhsa-runtime64.
//!
//! HSA knows the pointers of hipMalloc. It also reports the pointer's offset in the dma-buf, which HIP's own
//! export function does not.
//!
//! `unsafe` is here for the functions in `api.rs` that require something of their caller.
//!
//! Source: `hsa.h` and `hsa_ext_amd.h` of ROCR-Runtime.

mod api;
mod numbers;

use std::sync::Arc;

use dma_sg::page_size;
use dma_sg::pci::PciAddress;
use rdma_sys_ext::hsa as sys;

use super::device_memory::{DeviceMemory, Heap};
use super::library::{Named, duplicate, out_of_descriptors};
use super::runtime::{
    ExportFound, ExportOptions, ExportedRange, MemoryKind, PointerInfo, Runtime, allocation_in, not_null,
};
use super::{Allocation, Error, Exporter, PointerError, Result, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::observe::Process;
use api::{Agent, Answer, Api, HsaPointerInfo, Pool, Refused};

const LIBRARY: Named = Named {
    runtime: "ROCm",
    library: "libhsa-runtime64.so.1",
    remedy: "install ROCm's runtime (Debian: libhsa-runtime64-1) and add its folder to LD_LIBRARY_PATH or ld.so.conf",
};
const NODES: &[&str] = &["/dev/kfd"];
const FORBIDDEN: &str = "join the group render (and video), or pass the node to the container";
const NO_DEVICE: &str = "rocminfo lists the GPUs that the driver sees; ROCR_VISIBLE_DEVICES may hide some, and /dev/kfd must exist";
const UNSUPPORTED: &str =
    "Linux 6.2 and later exports memory of a GPU's own pool only (with CONFIG_HSA_AMD_P2P for NICs)";

/// The HSA runtime, with the GPUs that this process may see.
#[derive(Debug, Clone)]
pub struct Hsa {
    runtime: Arc<Initialised>,
    gpu: usize,
}

#[derive(Debug)]
struct Initialised {
    api: Api,
    gpus: Vec<Gpu>,
    creator: Process,
}

#[derive(Debug)]
struct Gpu {
    agent: Agent,
    address: Option<PciAddress>,
    /// The pool of its own memory, and the pool's size in bytes.
    pool: Option<(Pool, u64)>,
    /// Address of the register that flushes writes of other devices to its memory; 0 without one.
    hdp_flush: usize,
}

impl Drop for Initialised {
    fn drop(&mut self) {
        if !self.creator.is_current() {
            return;
        }
        numbers::forget();
        if let Err(refused) = self.api.shut_down() {
            tracing::warn!(error = %self.api.error(refused), "cannot shut HSA down");
        }
    }
}

impl Initialised {
    fn refused(&self, refused: Refused) -> PointerError {
        self.api.error(refused)
    }

    fn gpu(&self, agent: Agent) -> Answer<Option<Gpu>> {
        if self.api.agent_info(agent, sys::AGENT_INFO_DEVICE)? != sys::DEVICE_TYPE_GPU {
            return Ok(None);
        }
        let place = self.api.agent_info(agent, sys::AGENT_INFO_BDFID)?;
        let domain = self.api.agent_info(agent, sys::AGENT_INFO_DOMAIN)?;
        let address = PciAddress {
            domain,
            bus: (place >> 8) as u8,
            device: (place >> 3 & 0x1f) as u8,
            function: (place & 7) as u8,
        };
        let mut pool = None;
        for candidate in self.api.pools(agent)? {
            let is = |attribute| self.api.pool_info(candidate, attribute);
            let global = is(sys::POOL_INFO_SEGMENT)? == u64::from(sys::SEGMENT_GLOBAL);
            // Only global pools have flags.
            if global
                && is(sys::POOL_INFO_ALLOC_ALLOWED)? != 0
                && is(sys::POOL_INFO_GLOBAL_FLAGS)? & u64::from(sys::POOL_FLAG_COARSE_GRAINED) != 0
            {
                pool = Some((candidate, is(sys::POOL_INFO_SIZE)?));
                break;
            }
        }
        let hdp_flush = self.api.hdp_flush(agent)?.addr();
        Ok(Some(Gpu { agent, address: Some(address), pool, hdp_flush }))
    }
}

impl Hsa {
    /// Loads and initializes the runtime. [`allocate`](Exporter::allocate) takes memory of the first GPU.
    ///
    /// # Errors
    /// - [`PointerError::RuntimeMissing`], [`PointerError::RuntimeTooOld`]: the library.
    /// - [`PointerError::NoDevice`]: there is no GPU, or none is visible.
    /// - [`PointerError::OutOfDescriptors`] (`EMFILE`, `ENFILE`).
    /// - [`Error::NotPermitted`]: this user may not open `/dev/kfd`.
    /// - [`PointerError::RuntimeCall`]: the runtime failed otherwise.
    #[doc(alias = "hsa_init")]
    pub fn load() -> Result<Self> {
        let api = Api::load()?;
        api.init().map_err(|refused| {
            LIBRARY.not_started(NODES, FORBIDDEN, || match refused.code {
                // The status if /dev/kfd does not exist.
                sys::ERROR_OUT_OF_RESOURCES => no_device(),
                _ => api.error(refused),
            })
        })?;
        // From here on, dropping `runtime` shuts HSA down again.
        let mut runtime = Initialised { api, gpus: Vec::new(), creator: Process::current() };
        let gpus: Answer<Vec<_>> =
            runtime.api.agents().and_then(|all| all.into_iter().map(|agent| runtime.gpu(agent)).collect());
        runtime.gpus = gpus.map_err(|refused| runtime.refused(refused))?.into_iter().flatten().collect();
        if runtime.gpus.is_empty() {
            return Err(out_of_descriptors(LIBRARY.runtime).unwrap_or_else(no_device).into());
        }
        Ok(Self { runtime: Arc::new(runtime), gpu: 0 })
    }

    /// As [`load`](Self::load), but only if this process has already loaded the library.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn if_loaded() -> Result<Option<Self>> {
        LIBRARY.is_loaded().then(Self::load).transpose()
    }

    /// PCI addresses of the GPUs, in HSA's order.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = Option<PciAddress>> {
        self.runtime.gpus.iter().map(|gpu| gpu.address)
    }

    /// Selects the GPU that [`allocate`](Exporter::allocate) takes memory of, by its index in
    /// [`devices`](Self::devices).
    ///
    /// # Errors
    /// [`PointerError::NoDevice`]: no GPU has that index.
    pub fn with_device(self, index: usize) -> Result<Self> {
        if index >= self.runtime.gpus.len() {
            return Err(no_device().into());
        }
        Ok(Self { gpu: index, ..self })
    }

    /// Allocates at least `size` bytes of the GPU's own memory, rounded up to whole pages.
    ///
    /// # Errors
    /// - [`Error::Range`]: a size of 0. [`Error::SizeTooLarge`].
    /// - [`Error::OutOfMemory`]: more than the GPU's pool has.
    /// - [`PointerError::NoDevice`]: the GPU has no memory of its own.
    /// - [`PointerError::RuntimeCall`].
    #[doc(alias = "hsa_amd_memory_pool_allocate")]
    pub fn device_memory(&self, size: u64) -> Result<DeviceMemory> {
        let size = whole_pages(size, page_size())?;
        let (pool, available) = self.runtime.gpus[self.gpu].pool.ok_or_else(no_device)?;
        let heap: Arc<Initialised> = Arc::clone(&self.runtime);
        match self.runtime.api.allocate(pool, size) {
            Ok(address) => Ok(DeviceMemory::new(address, size, heap)),
            // HSA returns either for more than the pool has.
            Err(Refused { code: sys::ERROR_OUT_OF_RESOURCES | sys::ERROR_INVALID_ALLOCATION, .. }) => {
                let (exporter, available) = (Exporter::name(self), Some(available));
                Err(Error::OutOfMemory { exporter, requested: size, available, limit: None })
            }
            Err(refused) => Err(self.runtime.refused(refused).into()),
        }
    }

    fn describe(&self, address: u64, info: &HsaPointerInfo) -> PointerInfo {
        let owner = self.owner(info);
        // Memory of no GPU is the host's.
        let kind = match (owner, info.pointer_type) {
            (None, _) | (_, sys::POINTER_TYPE_LOCKED) => MemoryKind::Host,
            (_, sys::POINTER_TYPE_VMEM | sys::POINTER_TYPE_RESERVED) => MemoryKind::Virtual,
            (_, sys::POINTER_TYPE_IPC | sys::POINTER_TYPE_GRAPHICS) => MemoryKind::Imported,
            _ => MemoryKind::Device,
        };
        let base = match kind {
            // A locked buffer has a host address and a GPU address, and the caller may pass either.
            MemoryKind::Host
                if address.wrapping_sub(info.host_base_address as u64) < info.size_in_bytes as u64 =>
            {
                info.host_base_address
            }
            _ => info.agent_base_address,
        };
        let base = base as u64;
        let id = || numbers::number(&self.runtime.api, base);
        PointerInfo {
            runtime: LIBRARY.runtime,
            address,
            base,
            size: info.size_in_bytes as u64,
            kind,
            // HSA reports the end of allocations from its pools only.
            id: if kind == MemoryKind::Device { id() } else { None },
            device: owner.filter(|_| kind != MemoryKind::Host).and_then(|gpu| gpu.address),
        }
    }

    fn owner(&self, info: &HsaPointerInfo) -> Option<&Gpu> {
        self.runtime.gpus.iter().find(|gpu| gpu.agent == info.agent_owner)
    }
}

impl Runtime for Hsa {
    fn name(&self) -> &'static str {
        LIBRARY.runtime
    }

    #[doc(alias = "hsa_amd_pointer_info")]
    fn find(&self, address: u64) -> Result<Option<PointerInfo>, PointerError> {
        not_null(address)?;
        let info = self.runtime.api.pointer_info(address).map_err(|refused| self.runtime.refused(refused))?;
        let known = info.pointer_type != sys::POINTER_TYPE_UNKNOWN;
        Ok(known.then(|| self.describe(address, &info)))
    }

    /// Exports one range: HSA exports ranges of one allocation.
    #[doc(alias = "hsa_amd_portable_export_dmabuf")]
    fn export(
        &self,
        info: &PointerInfo,
        length: u64,
        _options: ExportOptions,
    ) -> Result<Vec<ExportedRange>, PointerError> {
        self.export_checked(info, length)
    }

    fn export_at(&self, address: u64, length: u64) -> Result<Vec<ExportedRange>, PointerError> {
        self.find_and_export(address, length)
    }

    /// Writes the GPU's HDP flush register, as RCCL does, if the GPU has one. Not tried on hardware.
    #[doc(alias = "HDP_MEM_FLUSH_CNTL")]
    fn flush(&self, info: &PointerInfo) -> Result<bool, PointerError> {
        // The kernel does not map the register for a child of `fork`, and other memory may have its address there.
        if !self.runtime.creator.is_current() {
            return Ok(false);
        }
        let found =
            self.runtime.api.pointer_info(info.address).map_err(|refused| self.runtime.refused(refused))?;
        let register = self.owner(&found).map_or(0, |gpu| gpu.hdp_flush) as *mut u32;
        if register.is_null() {
            return Ok(false);
        }
        // SAFETY: HSA mapped the register for this process and keeps it mapped while it is initialized. Any value
        // written flushes and changes nothing else.
        unsafe { register.write_volatile(1) };
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        Ok(true)
    }
}

impl ExportFound for Hsa {
    fn export_found(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>, PointerError> {
        let _span = crate::observe::exporting(|| Exporter::name(self), length);
        let runtime = &self.runtime;
        let exported = runtime.api.export(info.address, length);
        let (fd, offset) = exported.map_err(|refused| match refused.code {
            sys::ERROR_INVALID_ALLOCATION if info.kind != MemoryKind::Device => PointerError::WrongKind {
                runtime: Some(LIBRARY.runtime),
                address: info.address,
                kind: info.kind,
            },
            sys::ERROR_INVALID_ALLOCATION => info.past(length, info.base, info.size),
            sys::ERROR_INVALID_AGENT => {
                PointerError::NotExportable { runtime: LIBRARY.runtime, remedy: UNSUPPORTED }
            }
            _ => out_of_descriptors(LIBRARY.runtime).unwrap_or_else(|| runtime.refused(refused)),
        })?;
        // The copy is close-on-exec and closed by close(2). The runtime takes its own descriptor back.
        let guard = Guard { runtime, fd };
        // SAFETY: open until the guard is dropped, or negative.
        let copy = unsafe { duplicate(fd, LIBRARY.runtime, UNSUPPORTED) }?;
        drop(guard);
        let dmabuf = DmaBuf::from_fd(copy)?.with_device(info.device);
        Ok(vec![allocation_in(info, dmabuf, offset, length, "hsa_amd_portable_export_dmabuf")?])
    }
}

impl Exporter for Hsa {
    fn name(&self) -> String {
        format!("ROCm device {}", self.gpu)
    }

    /// Allocates GPU memory, which the GPU zeroes.
    ///
    /// # Errors
    /// As [`device_memory`](Hsa::device_memory) and [`export`](Runtime::export).
    fn allocate(&self, size: u64) -> Result<Allocation> {
        self.device_memory(size)?.into_allocation(self)
    }
}

impl Heap for Initialised {
    fn free(&self, address: u64) {
        // SAFETY: `DeviceMemory`, the only owner of this allocation, calls this once.
        if let Err(refused) = unsafe { self.api.free(address) } {
            tracing::warn!(error = %self.api.error(refused), "cannot free GPU memory");
        }
    }

    fn fill(&self, address: u64, word: u32, count: usize) -> Result<(), PointerError> {
        // SAFETY: `DeviceMemory` owns the words and checked the range.
        unsafe { self.api.fill(address, word, count) }.map_err(|refused| self.refused(refused))
    }
}

/// Returns a descriptor to the runtime when dropped.
struct Guard<'a> {
    runtime: &'a Initialised,
    fd: i32,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.fd < 0 {
            return;
        }
        // SAFETY: `export` returned the descriptor, and only this closes it.
        if let Err(refused) = unsafe { self.runtime.api.close(self.fd) } {
            tracing::warn!(error = %self.runtime.api.error(refused), "cannot close a dma-buf of HSA");
        }
    }
}

fn no_device() -> PointerError {
    PointerError::NoDevice { runtime: LIBRARY.runtime, remedy: NO_DEVICE }
}
