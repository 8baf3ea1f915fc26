//! CUDA: dma-bufs of NVIDIA GPU memory, through the driver API.
//!
//! libcuda is loaded at run time, so building needs nothing of CUDA. The export takes NVIDIA's open kernel
//! modules and the driver of CUDA 11.7 or later.
//!
//! `export.rs` exports, `mappings.rs` knows which memory is mapped where, `context.rs` enters contexts, `api.rs` has
//! a method for each call. All of it was run with a stub of the driver only; `docs/exporters.md` has the list.
//!
//! Source: cuda.h, "Virtual Memory Management" and "Unified Addressing" of the driver API's manual.

mod api;
mod context;
mod export;
mod mappings;

use std::sync::Arc;

use dma_sg::pci::PciAddress;

use super::device_memory::{DeviceMemory, Heap};
use super::library::{Named, out_of_descriptors};
use super::runtime::{ExportOptions, ExportedRange, MemoryKind, PointerInfo, Runtime, not_null};
use super::{Allocation, Error, Exporter, PointerError, Result, whole_pages};
use api::{Answer, Api, Attributes, DeviceAttribute, Refused, code};
use context::Primary;

const LIBRARY: Named = Named {
    runtime: "CUDA",
    library: "libcuda.so.1",
    remedy: "install NVIDIA's driver (Debian: libcuda1); pass it into a container",
};
const NODES: &[&str] = &["/dev/nvidiactl", "/dev/nvidia0"];
const FORBIDDEN: &str =
    "join the group that owns it (video under Debian's udev), or pass it to the container";
const NO_DEVICE: &str = "nvidia-smi lists the GPUs that the driver sees; CUDA_VISIBLE_DEVICES may hide some";
const UNSUPPORTED: &str = "this needs the open kernel modules of NVIDIA's driver, a GPU of Turing or later, and memory of cuMemAlloc or cuMemCreate; Tegra and WSL do not export";
const POOLED: &str = "the memory is of a pool (cudaMallocAsync, a memory node of a graph), which this driver does not export, or not this part of it: use cudaMalloc, or cuMemCreate with allocFlags.gpuDirectRDMACapable";
const NOT_CAPABLE: &str = "cuMemCreate made it without allocFlags.gpuDirectRDMACapable, and a NIC could not use it: set the flag, or use cudaMalloc (PyTorch: without expandable_segments)";
const REFUSED: &str = "the driver takes neither the range nor the allocation (CUDA_ERROR_INVALID_VALUE), as for memory that another process allocated: export it there, and send the descriptor over a Unix socket";

/// From this size on, allocations begin at multiples of it, so they share no page with others.
const GRANULE: u64 = 2 << 20;

/// The CUDA driver, with the GPUs that this process may see.
///
/// Any thread may use it. A call makes the memory's context current and then restores the previous one.
#[derive(Debug, Clone)]
pub struct Cuda {
    driver: Arc<Driver>,
    device: usize,
}

#[derive(Debug)]
struct Driver {
    api: Api,
    devices: Vec<Device>,
}

#[derive(Debug)]
struct Device {
    handle: i32,
    address: Option<PciAddress>,
    /// Whether the host can have it make remote writes visible.
    flushes_writes: bool,
}

impl Cuda {
    /// Loads and initializes the driver. [`allocate`](Exporter::allocate) takes memory of the first GPU.
    ///
    /// # Errors
    /// - [`PointerError::RuntimeMissing`], [`PointerError::RuntimeTooOld`]: the library.
    /// - [`PointerError::NoDevice`]: there is no GPU, or none is visible.
    /// - [`PointerError::OutOfDescriptors`] (`EMFILE`, `ENFILE`).
    /// - [`Error::NotPermitted`]: this user may not open the GPU's node.
    /// - [`PointerError::RuntimeCall`]: the driver failed otherwise.
    #[doc(alias = "cuInit")]
    pub fn load() -> Result<Self> {
        let api = Api::load()?;
        let error = |refused: Refused| {
            LIBRARY.not_started(NODES, FORBIDDEN, || match refused.code {
                code::NO_DEVICE => no_device(),
                _ => api.error(refused),
            })
        };
        api.init().map_err(error)?;
        let count = api.device_count().map_err(error)?;
        let devices: Answer<Vec<_>> = (0..count)
            .map(|ordinal| {
                let (handle, text) = api.device(ordinal)?;
                let flushes_writes = api.flushes_writes(handle)?;
                Ok(Device { handle, address: text.to_lowercase().parse().ok(), flushes_writes })
            })
            .collect();
        let devices = devices.map_err(error)?;
        if devices.is_empty() {
            return Err(out_of_descriptors(LIBRARY.runtime).unwrap_or_else(no_device).into());
        }
        Ok(Self { driver: Arc::new(Driver { api, devices }), device: 0 })
    }

    /// As [`load`](Self::load), but only if this process has already loaded the library.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn if_loaded() -> Result<Option<Self>> {
        LIBRARY.is_loaded().then(Self::load).transpose()
    }

    /// PCI addresses of the GPUs, in the order of CUDA's ordinals.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = Option<PciAddress>> {
        self.driver.devices.iter().map(|device| device.address)
    }

    /// The version of CUDA that the driver supports, major and minor; `None` if it does not tell.
    #[doc(alias = "cuDriverGetVersion")]
    pub fn version(&self) -> Option<(u32, u32)> {
        let version = u32::try_from(self.driver.api.version()?).ok()?;
        Some((version / 1000, version % 1000 / 10))
    }

    /// Whether the driver says that the selected GPU exports dma-bufs; `None` if it does not tell.
    #[doc(alias = "CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED")]
    pub fn exports_dmabufs(&self) -> Option<bool> {
        self.has(DeviceAttribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)
    }

    /// Whether the driver says that the selected GPU does GPUDirect RDMA, which is independent of dma-bufs; `None` if
    /// it does not tell.
    #[doc(alias = "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED")]
    pub fn does_gpu_direct(&self) -> Option<bool> {
        self.has(DeviceAttribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED)
    }

    fn has(&self, attribute: DeviceAttribute) -> Option<bool> {
        self.driver.api.has(self.driver.devices.get(self.device)?.handle, attribute)
    }

    /// Selects the GPU that [`allocate`](Exporter::allocate) takes memory of, by CUDA's ordinal.
    ///
    /// # Errors
    /// [`PointerError::NoDevice`]: no GPU has that ordinal.
    pub fn with_device(self, ordinal: usize) -> Result<Self> {
        if ordinal >= self.driver.devices.len() {
            return Err(no_device().into());
        }
        Ok(Self { device: ordinal, ..self })
    }

    /// Allocates at least `size` bytes of GPU memory, rounded up to 2 MiB.
    ///
    /// # Errors
    /// - [`Error::Range`]: a size of 0. [`Error::SizeTooLarge`].
    /// - [`Error::OutOfMemory`]: more than the GPU has free.
    /// - [`PointerError::RuntimeCall`].
    #[doc(alias = "cuMemAlloc")]
    pub fn device_memory(&self, size: u64) -> Result<DeviceMemory> {
        let size = whole_pages(size, GRANULE)?;
        let primary = Primary::retain(&self.driver, self.device)?;
        let api = &self.driver.api;
        let allocated = primary.inside(|| match api.alloc(size) {
            Err(refused) if refused.code == code::OUT_OF_MEMORY => Ok(Err(api.available()?)),
            answer => answer.map(Ok),
        })?;
        match allocated {
            Ok(address) => Ok(DeviceMemory::new(address, size, Arc::new(primary))),
            Err(available) => {
                let (exporter, available) = (Exporter::name(self), Some(available));
                Err(Error::OutOfMemory { exporter, requested: size, available, limit: None })
            }
        }
    }

    fn attributes(&self, address: u64) -> Result<Option<Attributes>, PointerError> {
        not_null(address)?;
        match self.driver.api.attributes(address) {
            Ok(found) if matches!(found.memory_type, Attributes::HOST | Attributes::DEVICE) => {
                Ok(Some(found))
            }
            Ok(_) => Ok(None),
            // Some drivers return this for a pointer that they do not know.
            Err(Refused { code: code::INVALID_VALUE | code::INVALID_CONTEXT, .. }) => Ok(None),
            // Before cuInit, and while the process exits, there is no memory.
            Err(Refused { code: code::NOT_INITIALIZED | code::DEINITIALIZED, .. }) => Ok(None),
            Err(refused) => Err(self.driver.api.error(refused)),
        }
    }

    fn describe(&self, address: u64, attributes: &Attributes) -> PointerInfo {
        let device = usize::try_from(attributes.ordinal).ok();
        let kind = match attributes.memory_type {
            _ if attributes.managed != 0 => MemoryKind::Managed,
            Attributes::DEVICE if attributes.pool != 0 => MemoryKind::Pool,
            // Memory of cuMemCreate belongs to a device but to no context.
            Attributes::DEVICE if attributes.context == 0 => MemoryKind::Virtual,
            Attributes::DEVICE => MemoryKind::Device,
            _ => MemoryKind::Host,
        };
        let device = device.and_then(|ordinal| self.driver.devices.get(ordinal)?.address);
        PointerInfo {
            runtime: LIBRARY.runtime,
            address,
            base: attributes.base,
            size: attributes.size as u64,
            kind,
            // A driver that numbers nothing leaves 0. Handles identify what is mapped into reserved addresses.
            id: Some(attributes.buffer_id).filter(|id| *id != 0 || kind == MemoryKind::Virtual),
            device: device.filter(|_| kind != MemoryKind::Host),
        }
    }
}

impl Runtime for Cuda {
    fn name(&self) -> &'static str {
        LIBRARY.runtime
    }

    #[doc(alias = "cuPointerGetAttributes")]
    fn find(&self, address: u64) -> Result<Option<PointerInfo>, PointerError> {
        Ok(self.attributes(address)?.map(|attributes| self.describe(address, &attributes)))
    }

    /// # Errors
    /// [`PointerError::NotExportable`]: `CUDA_ERROR_NOT_SUPPORTED` (801).
    #[doc(alias = "cuMemGetHandleForAddressRange")]
    fn export(
        &self,
        info: &PointerInfo,
        length: u64,
        options: ExportOptions,
    ) -> Result<Vec<ExportedRange>, PointerError> {
        info.check(length)?;
        let now = self.attributes(info.address)?;
        info.check_alive(now.map(|now| self.describe(info.address, &now)))?;
        self.export_found(info, &now.unwrap_or_default(), length, options)
    }

    fn export_at(&self, address: u64, length: u64) -> Result<Vec<ExportedRange>, PointerError> {
        let foreign = || PointerError::ForeignPointer { runtime: LIBRARY.runtime, address };
        let attributes = self.attributes(address)?.ok_or_else(foreign)?;
        let info = self.describe(address, &attributes);
        info.check(length)?;
        self.export_found(&info, &attributes, length, ExportOptions::default())
    }

    /// The driver's call makes visible what was written before it, if the device has
    /// `CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST`. Not tried on hardware.
    #[doc(alias = "cuFlushGPUDirectRDMAWrites")]
    fn flush(&self, info: &PointerInfo) -> Result<bool, PointerError> {
        let now = self.attributes(info.address)?;
        info.check_alive(now.map(|now| self.describe(info.address, &now)))?;
        let ordinal = now.and_then(|now| usize::try_from(now.ordinal).ok()).ok_or_else(no_device)?;
        if !self.driver.devices.get(ordinal).ok_or_else(no_device)?.flushes_writes {
            return Ok(false);
        }
        Primary::retain(&self.driver, ordinal)?.inside(|| self.driver.api.flush_writes())?;
        Ok(true)
    }
}

impl Exporter for Cuda {
    fn name(&self) -> String {
        format!("CUDA device {}", self.device)
    }

    /// Allocates GPU memory, which the GPU zeroes.
    ///
    /// # Errors
    /// As [`device_memory`](Cuda::device_memory) and [`export`](Runtime::export).
    fn allocate(&self, size: u64) -> Result<Allocation> {
        self.device_memory(size)?.into_allocation(self)
    }
}

fn no_device() -> PointerError {
    PointerError::NoDevice { runtime: LIBRARY.runtime, remedy: NO_DEVICE }
}

fn not_exportable(remedy: &'static str) -> PointerError {
    PointerError::NotExportable { runtime: LIBRARY.runtime, remedy }
}
