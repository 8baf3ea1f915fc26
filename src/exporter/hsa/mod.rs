//! ROCm: dma-bufs of the memory of AMD GPUs, through libhsa-runtime64.
//!
//! A pointer of hipMalloc is one of HSA's. HIP has an export of its own, which does not tell where in
//! the buffer the pointer is; HSA's does.
//!
//! `unsafe` is here for what the calls in `api.rs` ask of their callers.
//!
//! Source: `hsa.h` and `hsa_ext_amd.h` of ROCR-Runtime.

mod api;

use std::sync::Arc;

use rdma_sys_ext::hsa as sys;

use super::device_memory::{DeviceMemory, Heap};
use super::library::{Named, duplicate, forbidden_node, out_of_descriptors};
use super::runtime::{Exported, Found, MemoryKind, Piece, Route, Runtime, foreign, not_null};
use super::{Allocation, Exporter, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::error::ExporterError;
use crate::pci::PciAddress;
use crate::umem::page_size;
use crate::{Error, Result};
use api::{Agent, Answer, Api, PointerInfo, Pool, Refused};

const LIBRARY: Named = Named {
    runtime: "ROCm",
    library: "libhsa-runtime64.so.1",
    remedy: "install ROCm's runtime (Debian: libhsa-runtime64-1) and add its folder to LD_LIBRARY_PATH or ld.so.conf",
};
const NODES: &[&str] = &["/dev/kfd"];
const FORBIDDEN: &str = "join the group render (and video), or pass the node to the container";
const NO_DEVICE: &str = "rocminfo lists those that the driver sees; ROCR_VISIBLE_DEVICES may hide them, and /dev/kfd has to be there";
const UNSUPPORTED: &str =
    "only memory of a GPU's own pool is exported, by a kernel from 6.2 on (CONFIG_HSA_AMD_P2P for NICs)";

/// The HSA runtime, with the GPUs that it shows this process.
#[derive(Debug, Clone)]
pub struct Hsa {
    runtime: Arc<Initialised>,
    gpu: usize,
}

#[derive(Debug)]
struct Initialised {
    api: Api,
    gpus: Vec<Gpu>,
}

#[derive(Debug)]
struct Gpu {
    agent: Agent,
    address: Option<PciAddress>,
    /// Its own memory, and how much of it there is.
    pool: Option<(Pool, u64)>,
}

impl Drop for Initialised {
    fn drop(&mut self) {
        if let Err(refused) = self.api.shut_down() {
            tracing::warn!(error = %self.api.error(refused), "cannot shut HSA down");
        }
    }
}

impl Initialised {
    fn refused(&self, refused: Refused) -> Error {
        self.api.error(refused).into()
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
            // The flags are of global pools only.
            if global
                && is(sys::POOL_INFO_ALLOC_ALLOWED)? != 0
                && is(sys::POOL_INFO_GLOBAL_FLAGS)? & u64::from(sys::POOL_FLAG_COARSE_GRAINED) != 0
            {
                pool = Some((candidate, is(sys::POOL_INFO_SIZE)?));
                break;
            }
        }
        Ok(Some(Gpu { agent, address: Some(address), pool }))
    }
}

impl Hsa {
    /// Loads the runtime and initialises it. [`allocate`](Exporter::allocate) takes memory of the first GPU.
    ///
    /// # Errors
    /// - [`ExporterError::RuntimeMissing`], [`ExporterError::RuntimeTooOld`]: the library.
    /// - [`ExporterError::NoDevice`]: no GPU, or none that is visible.
    /// - [`Error::ExporterNotPermitted`]: `/dev/kfd` is not for this user.
    /// - [`ExporterError::RuntimeCall`]: the runtime failed otherwise.
    #[doc(alias = "hsa_init")]
    pub fn load() -> Result<Self> {
        let api = Api::load()?;
        api.init().map_err(|refused| {
            let forbidden = forbidden_node(NODES, FORBIDDEN);
            forbidden.unwrap_or_else(|| match refused.code {
                // What it answers without /dev/kfd.
                sys::ERROR_OUT_OF_RESOURCES => no_device(),
                _ => api.error(refused).into(),
            })
        })?;
        // From here on dropping it shuts HSA down again.
        let mut runtime = Initialised { api, gpus: Vec::new() };
        let gpus: Answer<Vec<_>> =
            runtime.api.agents().and_then(|all| all.into_iter().map(|agent| runtime.gpu(agent)).collect());
        runtime.gpus = gpus.map_err(|refused| runtime.refused(refused))?.into_iter().flatten().collect();
        if runtime.gpus.is_empty() {
            return Err(no_device());
        }
        Ok(Self { runtime: Arc::new(runtime), gpu: 0 })
    }

    /// The runtime if this process has loaded it already.
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

    /// Takes memory of another GPU, by its place in [`devices`](Self::devices).
    ///
    /// # Errors
    /// [`ExporterError::NoDevice`]: there is none.
    pub fn with_device(self, number: usize) -> Result<Self> {
        if number >= self.runtime.gpus.len() {
            return Err(no_device());
        }
        Ok(Self { gpu: number, ..self })
    }

    /// Allocates at least `size` bytes of the GPU's own memory, in whole pages.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::SizeTooLarge`].
    /// - [`Error::OutOfMemory`]: more than its pool gives.
    /// - [`ExporterError::NoDevice`]: the GPU has no pool of its own.
    /// - [`ExporterError::RuntimeCall`].
    #[doc(alias = "hsa_amd_memory_pool_allocate")]
    pub fn device_memory(&self, size: u64) -> Result<DeviceMemory> {
        let size = whole_pages(size, page_size())?;
        let (pool, available) = self.runtime.gpus[self.gpu].pool.ok_or_else(no_device)?;
        let heap: Arc<Initialised> = Arc::clone(&self.runtime);
        match self.runtime.api.allocate(pool, size) {
            Ok(address) => Ok(DeviceMemory::new(address, size, heap)),
            // Either, for what is larger than the pool.
            Err(Refused { code: sys::ERROR_OUT_OF_RESOURCES | sys::ERROR_INVALID_ALLOCATION, .. }) => {
                Err(Error::OutOfMemory { exporter: Exporter::name(self), requested: size, available })
            }
            Err(refused) => Err(self.runtime.refused(refused)),
        }
    }

    /// Exports what was found a moment ago.
    fn export_found(&self, found: &Found, length: u64) -> Result<Exported> {
        let _span = crate::observe::exporting(|| Exporter::name(self), length);
        let runtime = &self.runtime;
        let (fd, offset) =
            runtime.api.export(found.address, length).map_err(|refused| match refused.code {
                sys::ERROR_INVALID_ALLOCATION => found.past(length, found.base, found.size),
                sys::ERROR_INVALID_AGENT => {
                    ExporterError::NotExportable { runtime: LIBRARY.runtime, remedy: UNSUPPORTED }.into()
                }
                _ => {
                    out_of_descriptors(LIBRARY.runtime).map_or_else(|| runtime.refused(refused), Error::from)
                }
            })?;
        // Ours is close-on-exec and closed by close(2); the runtime gets back its own at once.
        let guard = Guard { runtime, fd };
        // SAFETY: open until the guard is dropped.
        let ours = unsafe { duplicate(fd) }
            .map_err(|source| ExporterError::OutOfDescriptors { exporter: LIBRARY.runtime, source })?;
        drop(guard);
        let piece = Piece::new(DmaBuf::from_fd(ours)?, offset, length, Route::Default)?;
        Ok(Exported::new(found, vec![piece]))
    }

    fn describe(&self, address: u64, info: &PointerInfo) -> Found {
        let owner = self.runtime.gpus.iter().find(|gpu| gpu.agent == info.agent_owner);
        // What belongs to no GPU is a processor's.
        let kind = match owner {
            Some(_) if info.pointer_type != sys::POINTER_TYPE_LOCKED => MemoryKind::Device,
            _ => MemoryKind::Host,
        };
        let base = match kind {
            MemoryKind::Device => info.agent_base_address,
            // A locked buffer may have an address of its own in the GPU; the caller may have asked for either.
            _ if address.wrapping_sub(info.host_base_address as u64) < info.size_in_bytes as u64 => {
                info.host_base_address
            }
            _ => info.agent_base_address,
        };
        Found {
            runtime: LIBRARY.runtime,
            address,
            base: base as u64,
            size: info.size_in_bytes as u64,
            kind,
            id: None,
            device: owner.filter(|_| kind == MemoryKind::Device).and_then(|gpu| gpu.address),
        }
    }
}

impl Runtime for Hsa {
    fn name(&self) -> &'static str {
        LIBRARY.runtime
    }

    #[doc(alias = "hsa_amd_pointer_info")]
    fn find(&self, address: u64) -> Result<Option<Found>> {
        not_null(address)?;
        let info = self.runtime.api.pointer_info(address).map_err(|refused| self.runtime.refused(refused))?;
        let known = info.pointer_type != sys::POINTER_TYPE_UNKNOWN;
        Ok(known.then(|| self.describe(address, &info)))
    }

    /// One piece: HSA exports ranges of one allocation.
    #[doc(alias = "hsa_amd_portable_export_dmabuf")]
    fn export(&self, found: &Found, length: u64) -> Result<Exported> {
        found.check(length)?;
        found.check_alive(self.find(found.address)?)?;
        self.export_found(found, length)
    }

    fn export_at(&self, address: u64, length: u64) -> Result<Exported> {
        let found = self.find(address)?.ok_or_else(|| foreign(LIBRARY.runtime, address))?;
        found.check(length)?;
        self.export_found(&found, length)
    }
}

impl Exporter for Hsa {
    fn name(&self) -> String {
        format!("ROCm device {}", self.gpu)
    }

    /// Memory of the GPU, zeroed by it.
    ///
    /// # Errors
    /// As [`device_memory`](Hsa::device_memory) and [`export`](Runtime::export).
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let memory = self.device_memory(size)?;
        memory.fill(0, memory.size(), 0)?;
        // The dma-buf holds the memory when the pointer goes.
        self.export_at(memory.address(), memory.size())?.into_allocation()
    }
}

impl Heap for Initialised {
    fn free(&self, address: u64) {
        // SAFETY: called once, by the one owner of the memory that `device_memory` took.
        if let Err(refused) = unsafe { self.api.free(address) } {
            tracing::warn!(error = %self.api.error(refused), "cannot free memory of a GPU");
        }
    }

    fn fill(&self, address: u64, word: u32, count: usize) -> Result<()> {
        // SAFETY: inside of the memory that its owner holds; it checked the range.
        unsafe { self.api.fill(address, word, count) }.map_err(|refused| self.refused(refused))
    }
}

/// A descriptor that goes back to the runtime.
struct Guard<'a> {
    runtime: &'a Initialised,
    fd: i32,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: from `export`, and closed here only.
        if let Err(refused) = unsafe { self.runtime.api.close(self.fd) } {
            tracing::warn!(error = %self.runtime.api.error(refused), "cannot close a dma-buf of HSA");
        }
    }
}

fn no_device() -> Error {
    ExporterError::NoDevice { runtime: LIBRARY.runtime, remedy: NO_DEVICE }.into()
}
