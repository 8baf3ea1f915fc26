//! CUDA: dma-bufs of NVIDIA GPU memory, through the driver API.
//!
//! libcuda is loaded at run time, so building needs nothing of CUDA. The export takes NVIDIA's open kernel
//! modules and the driver of CUDA 11.7 or later.
//!
//! `unsafe` is here for the functions in `api.rs` that require something of their caller.
//!
//! Source: cuda.h, "Virtual Memory Management" and "Unified Addressing" of the driver API's manual.

mod api;

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use dma_sg::page_size;
use dma_sg::pci::PciAddress;

use super::device_memory::{DeviceMemory, Heap};
use super::library::{Named, check_descriptor, out_of_descriptors};
use super::runtime::{ExportedRange, MemoryKind, PointerInfo, Runtime, foreign, not_null, pages_around};
use super::{Allocation, Error, Exporter, PointerError, Result, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::observe::Process;
use api::{Answer, Api, Attributes, Context, Refused, code};

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

/// From this size on, allocations begin at multiples of it, so they share no page with others.
const GRANULE: u64 = 2 << 20;

/// The CUDA driver, with the GPUs that this process may see.
///
/// Any thread may use it. A call makes the memory's context current and then restores the previous one.
#[derive(Debug, Clone)]
pub struct Cuda {
    driver: Arc<Driver>,
    device: usize,
    /// Whether exports request the mapping through the PCIe BAR.
    pcie: bool,
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
                Ok(Device { handle, address: text.to_lowercase().parse().ok() })
            })
            .collect();
        let devices = devices.map_err(error)?;
        if devices.is_empty() {
            return Err(out_of_descriptors(LIBRARY.runtime).unwrap_or_else(no_device).into());
        }
        Ok(Self { driver: Arc::new(Driver { api, devices }), device: 0, pcie: false })
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

    /// Sets whether exports request the mapping through the GPU's PCIe BAR; by default, the driver chooses.
    ///
    /// Request it for a GPU that NVLink also connects to the CPU (GB200) and a NIC that accesses it over PCIe. If
    /// the driver refuses, the export has the driver's own mapping; [`ExportedRange::pcie`] says which.
    #[must_use]
    #[doc(alias = "CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE")]
    pub fn with_pcie_mapping(self, pcie: bool) -> Self {
        Self { pcie, ..self }
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
            id: Some(attributes.buffer_id),
            device: device.filter(|_| kind != MemoryKind::Host),
        }
    }

    /// Exports memory that was looked up, with its own context or the primary one current.
    fn export_found(
        &self,
        info: &PointerInfo,
        attributes: &Attributes,
        length: u64,
    ) -> Result<Vec<ExportedRange>, PointerError> {
        let _span = crate::observe::exporting(|| Exporter::name(self), length);
        let context = attributes.context as Context;
        if context.is_null() {
            // Memory of cuMemCreate belongs to a device but to no context.
            let ordinal = usize::try_from(attributes.ordinal).map_err(|_| no_device())?;
            return Primary::retain(&self.driver, ordinal)?.inside(|| Ok(self.ranges(info, length)))?;
        }
        let api = &self.driver.api;
        // SAFETY: the memory was alive a moment ago, and so was its context. The owner must not free either
        // during the export, and the driver checks the handle.
        let _entered = unsafe { api.enter(context) }.map_err(|refused| api.error(refused))?;
        self.ranges(info, length)
    }

    /// Exports the allocations that the range lies in, one after the other.
    fn ranges(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>, PointerError> {
        let end = info.address + length;
        let mut at = info.address;
        let mut ranges = Vec::with_capacity(1);
        while at < end {
            let (base, size) = match self.driver.api.address_range(at) {
                Ok((base, size)) if base <= at && at - base < size => (base, size),
                // A hole between the mappings of one reserved range.
                Ok(_) | Err(Refused { code: code::NOT_FOUND | code::INVALID_VALUE, .. }) => {
                    return Err(info.past(length, info.base, at - info.base));
                }
                Err(refused) => return Err(self.driver.api.error(refused)),
            };
            let (start, pages) =
                pages_around(base, size, page_size()).ok_or_else(|| info.past(length, base, size))?;
            let (dmabuf, pcie) = self.dmabuf(start, pages)?;
            let until = end.min(base + size);
            let mut range = ExportedRange::new(dmabuf, at - start..until - start)?;
            range.pcie = pcie;
            ranges.push(range);
            at = until;
        }
        Ok(ranges)
    }

    /// A dma-buf of whole pages, and whether it is mapped through the PCIe BAR.
    fn dmabuf(&self, start: u64, length: u64) -> Result<(DmaBuf, bool), PointerError> {
        let api = &self.driver.api;
        let export = |pcie| api.export(start, length, pcie).map(|fd| (fd, pcie));
        let exported = match export(self.pcie) {
            // An older driver does not know the flag, and a GPU with PCIe as its only path refuses it.
            Err(Refused { code: code::NOT_SUPPORTED | code::INVALID_VALUE, .. }) if self.pcie => {
                export(false)
            }
            answer => answer,
        };
        let (fd, pcie) = exported.map_err(|refused| match refused.code {
            code::NOT_SUPPORTED => {
                PointerError::NotExportable { runtime: LIBRARY.runtime, remedy: UNSUPPORTED }
            }
            _ => out_of_descriptors(LIBRARY.runtime).unwrap_or_else(|| api.error(refused)),
        })?;
        check_descriptor(fd, LIBRARY.runtime, UNSUPPORTED)?;
        // SAFETY: the driver has just made this descriptor for the caller.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok((DmaBuf::from_fd(fd)?, pcie))
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
    fn export(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>, PointerError> {
        info.check(length)?;
        let now = self.attributes(info.address)?;
        info.check_alive(now.map(|now| self.describe(info.address, &now)))?;
        self.export_found(info, &now.unwrap_or_default(), length)
    }

    fn export_at(&self, address: u64, length: u64) -> Result<Vec<ExportedRange>, PointerError> {
        let attributes = self.attributes(address)?.ok_or_else(|| foreign(LIBRARY.runtime, address))?;
        let info = self.describe(address, &attributes);
        info.check(length)?;
        self.export_found(&info, &attributes, length)
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

/// A retained primary context of a GPU. CUDA frees the context's memory when its last user releases it.
#[derive(Debug)]
struct Primary {
    driver: Arc<Driver>,
    device: i32,
    /// A `CUcontext` as an integer, which is `Send`.
    context: usize,
    creator: Process,
}

impl Primary {
    fn retain(driver: &Arc<Driver>, ordinal: usize) -> Result<Self, PointerError> {
        let device = driver.devices.get(ordinal).ok_or_else(no_device)?.handle;
        let context = driver.api.retain(device).map_err(|refused| driver.api.error(refused))?;
        let (context, creator) = (context as usize, Process::current());
        Ok(Self { driver: Arc::clone(driver), device, context, creator })
    }

    /// Runs a closure with the context current.
    fn inside<T>(&self, run: impl FnOnce() -> Answer<T>) -> Result<T, PointerError> {
        let api = &self.driver.api;
        let error = |refused| api.error(refused);
        // SAFETY: `self` retains the context and outlives the guard.
        let _entered = unsafe { api.enter(self.context as Context) }.map_err(error)?;
        run().map_err(error)
    }
}

impl Heap for Primary {
    fn free(&self, address: u64) {
        // SAFETY: `DeviceMemory`, the only owner of this allocation, calls this once.
        if let Err(error) = self.inside(|| unsafe { self.driver.api.free(address) }) {
            tracing::warn!(%error, "cannot free GPU memory");
        }
    }

    fn fill(&self, address: u64, word: u32, count: usize) -> Result<(), PointerError> {
        // SAFETY: `DeviceMemory` owns the words and checked the range.
        self.inside(|| unsafe { self.driver.api.fill(address, word, count) })
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        if !self.creator.is_current() {
            return;
        }
        if let Err(refused) = self.driver.api.release(self.device) {
            tracing::warn!(error = %self.driver.api.error(refused), "cannot release a CUDA context");
        }
    }
}

fn no_device() -> PointerError {
    PointerError::NoDevice { runtime: LIBRARY.runtime, remedy: NO_DEVICE }
}
