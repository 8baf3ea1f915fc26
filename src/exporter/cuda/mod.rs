//! CUDA: dma-bufs of the memory of NVIDIA GPUs, through the driver API.
//!
//! libcuda is found at run time; nothing of CUDA is needed to build. The kernel modules have to be
//! the open ones, and the driver of CUDA 11.7 or later.
//!
//! `unsafe` is here for what the calls in `api.rs` ask of their callers.
//!
//! Source: cuda.h, "Virtual Memory Management" and "Unified Addressing" of the driver API's manual.

mod api;

use std::sync::Arc;

use super::device_memory::{DeviceMemory, Heap};
use super::library::{Named, forbidden_node, out_of_descriptors};
use super::runtime::{
    Exported, Found, MemoryKind, Piece, Route, Runtime, foreign, host_pages_around, not_null,
};
use super::{Allocation, Exporter, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::error::ExporterError;
use crate::pci::PciAddress;
use crate::{Error, Result};
use api::{Answer, Api, Attributes, Context, Refused, code};

const LIBRARY: Named = Named {
    runtime: "CUDA",
    library: "libcuda.so.1",
    remedy: "install NVIDIA's driver (Debian: libcuda1); in a container, have it passed in",
};
const NODES: &[&str] = &["/dev/nvidiactl", "/dev/nvidia0"];
const FORBIDDEN: &str =
    "join the group that owns it (video under Debian's udev), or pass it to the container";
const NO_DEVICE: &str = "nvidia-smi lists those that the driver sees; CUDA_VISIBLE_DEVICES may hide them";
const UNSUPPORTED: &str = "it takes the open kernel modules of NVIDIA's driver, a GPU of Turing or later, and memory of cuMemAlloc or cuMemCreate; Tegra and WSL have none";

/// Allocations begin at multiples of this from this size on, so that they share no page with others.
const GRANULE: u64 = 2 << 20;

/// When to ask for the mapping through the GPU's BAR, where there is a nearer way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PcieMapping {
    /// Never: as the driver chooses. Right on any machine whose GPUs hang on PCIe.
    #[default]
    Never,
    /// Ask for it, and take the default where the driver refuses it. [`Piece::route`] says which it was.
    /// For a GPU that is linked to the processor beside PCIe (GB200), and a NIC that reaches it by PCIe.
    Prefer,
    /// Ask for it, and fail where the driver refuses it.
    Require,
}

/// The CUDA driver, with the GPUs that it shows this process.
///
/// Any thread may use it: the context of the memory is made current for a call and the one before is
/// put back.
#[derive(Debug, Clone)]
pub struct Cuda {
    driver: Arc<Driver>,
    device: usize,
    pcie: PcieMapping,
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
    /// Loads the driver and initialises it. [`allocate`](Exporter::allocate) takes memory of the first GPU.
    ///
    /// # Errors
    /// - [`ExporterError::RuntimeMissing`], [`ExporterError::RuntimeTooOld`]: the library.
    /// - [`ExporterError::NoDevice`]: no GPU, or none that is visible.
    /// - [`Error::ExporterNotPermitted`]: the GPU's node is not for this user.
    /// - [`ExporterError::RuntimeCall`]: the driver failed otherwise.
    #[doc(alias = "cuInit")]
    pub fn load() -> Result<Self> {
        let api = Api::load()?;
        let error = |refused: Refused| {
            forbidden_node(NODES, FORBIDDEN).unwrap_or_else(|| match refused.code {
                code::NO_DEVICE => no_device(),
                _ => api.error(refused).into(),
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
            return Err(no_device());
        }
        Ok(Self { driver: Arc::new(Driver { api, devices }), device: 0, pcie: PcieMapping::default() })
    }

    /// The driver if this process has loaded it already.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn if_loaded() -> Result<Option<Self>> {
        LIBRARY.is_loaded().then(Self::load).transpose()
    }

    /// PCI addresses of the GPUs, by CUDA's ordinals.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = Option<PciAddress>> {
        self.driver.devices.iter().map(|device| device.address)
    }

    /// Whether exports ask for the mapping through the BAR.
    #[must_use]
    pub fn with_pcie_mapping(self, pcie: PcieMapping) -> Self {
        Self { pcie, ..self }
    }

    /// Takes memory of the GPU of that ordinal.
    ///
    /// # Errors
    /// [`ExporterError::NoDevice`]: there is none.
    pub fn with_device(self, ordinal: usize) -> Result<Self> {
        if ordinal >= self.driver.devices.len() {
            return Err(no_device());
        }
        Ok(Self { device: ordinal, ..self })
    }

    /// Allocates at least `size` bytes of the GPU's memory, in whole 2 MiB.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::SizeTooLarge`].
    /// - [`Error::OutOfMemory`]: more than the GPU has free.
    /// - [`ExporterError::RuntimeCall`].
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
                Err(Error::OutOfMemory { exporter: Exporter::name(self), requested: size, available })
            }
        }
    }

    fn attributes(&self, address: u64) -> Result<Option<Attributes>> {
        not_null(address)?;
        match self.driver.api.attributes(address) {
            Ok(found) if matches!(found.memory_type, Attributes::HOST | Attributes::DEVICE) => {
                Ok(Some(found))
            }
            Ok(_) => Ok(None),
            // Some drivers say so of a pointer that they do not know.
            Err(Refused { code: code::INVALID_VALUE | code::INVALID_CONTEXT, .. }) => Ok(None),
            // Before cuInit and at the end of the process there is no memory.
            Err(Refused { code: code::NOT_INITIALIZED | code::DEINITIALIZED, .. }) => Ok(None),
            Err(refused) => Err(self.driver.api.error(refused).into()),
        }
    }

    fn describe(&self, address: u64, attributes: &Attributes) -> Found {
        let device = usize::try_from(attributes.ordinal).ok();
        let kind = match attributes.memory_type {
            _ if attributes.managed != 0 => MemoryKind::Managed,
            Attributes::DEVICE => MemoryKind::Device,
            _ => MemoryKind::Host,
        };
        let device = device.and_then(|ordinal| self.driver.devices.get(ordinal)?.address);
        Found {
            runtime: LIBRARY.runtime,
            address,
            base: attributes.base,
            size: attributes.size as u64,
            kind,
            id: Some(attributes.buffer_id),
            device: device.filter(|_| kind != MemoryKind::Host),
        }
    }

    /// Exports what is there, with its context or the primary one current.
    fn export_found(&self, found: &Found, attributes: &Attributes, length: u64) -> Result<Exported> {
        let _span = crate::observe::exporting(|| Exporter::name(self), length);
        let context = attributes.context as Context;
        let pieces = if context.is_null() {
            // Memory of cuMemCreate belongs to a device and to no context.
            let ordinal = usize::try_from(attributes.ordinal).map_err(|_| no_device())?;
            Primary::retain(&self.driver, ordinal)?.inside(|| Ok(self.pieces(found, length)))??
        } else {
            let api = &self.driver.api;
            // SAFETY: the memory was there a moment ago, so its context was; who frees the two while
            // they are exported breaks the contract of whoever allocated, and the driver checks the handle.
            let _entered =
                unsafe { api.enter(context) }.map_err(|refused| Error::from(api.error(refused)))?;
            self.pieces(found, length)?
        };
        Ok(Exported::new(found, pieces))
    }

    /// The allocations that the range is in, one after the other.
    fn pieces(&self, found: &Found, length: u64) -> Result<Vec<Piece>> {
        let end = found.address + length;
        let mut at = found.address;
        let mut pieces = Vec::with_capacity(1);
        while at < end {
            let (base, size) = match self.driver.api.address_range(at) {
                Ok((base, size)) if base <= at && at - base < size => (base, size),
                // A hole between what is mapped into one reservation.
                Ok(_) | Err(Refused { code: code::NOT_FOUND | code::INVALID_VALUE, .. }) => {
                    return Err(found.past(length, found.base, at - found.base));
                }
                Err(refused) => return Err(self.driver.api.error(refused).into()),
            };
            let (start, pages) =
                host_pages_around(base, size).ok_or_else(|| found.past(length, base, size))?;
            let (dmabuf, route) = self.dmabuf(start, pages)?;
            let until = end.min(base + size);
            pieces.push(Piece::new(dmabuf, at - start, until - at, route)?);
            at = until;
        }
        Ok(pieces)
    }

    fn dmabuf(&self, start: u64, length: u64) -> Result<(DmaBuf, Route)> {
        let api = &self.driver.api;
        let exported = match self.pcie {
            PcieMapping::Never => api.export(start, length, false).map(|fd| (fd, Route::Default)),
            PcieMapping::Require => api.export(start, length, true).map(|fd| (fd, Route::Pcie)),
            PcieMapping::Prefer => match api.export(start, length, true) {
                // An older driver does not know the flag; a GPU without a second way refuses it.
                Err(Refused { code: code::NOT_SUPPORTED | code::INVALID_VALUE, .. }) => {
                    api.export(start, length, false).map(|fd| (fd, Route::Default))
                }
                answer => answer.map(|fd| (fd, Route::Pcie)),
            },
        };
        let (fd, route) = exported.map_err(|refused| match refused.code {
            code::NOT_SUPPORTED => {
                ExporterError::NotExportable { runtime: LIBRARY.runtime, remedy: UNSUPPORTED }
            }
            _ => out_of_descriptors(LIBRARY.runtime).unwrap_or_else(|| api.error(refused)),
        })?;
        Ok((DmaBuf::from_fd(fd)?, route))
    }
}

impl Runtime for Cuda {
    fn name(&self) -> &'static str {
        LIBRARY.runtime
    }

    #[doc(alias = "cuPointerGetAttributes")]
    fn find(&self, address: u64) -> Result<Option<Found>> {
        Ok(self.attributes(address)?.map(|attributes| self.describe(address, &attributes)))
    }

    /// # Errors
    /// [`ExporterError::NotExportable`]: `CUDA_ERROR_NOT_SUPPORTED` (801).
    #[doc(alias = "cuMemGetHandleForAddressRange")]
    fn export(&self, found: &Found, length: u64) -> Result<Exported> {
        found.check(length)?;
        let now = self.attributes(found.address)?;
        found.check_alive(now.map(|now| self.describe(found.address, &now)))?;
        self.export_found(found, &now.unwrap_or_default(), length)
    }

    fn export_at(&self, address: u64, length: u64) -> Result<Exported> {
        let attributes = self.attributes(address)?.ok_or_else(|| foreign(LIBRARY.runtime, address))?;
        let found = self.describe(address, &attributes);
        found.check(length)?;
        self.export_found(&found, &attributes, length)
    }
}

impl Exporter for Cuda {
    fn name(&self) -> String {
        format!("CUDA device {}", self.device)
    }

    /// Memory of the GPU, zeroed by it.
    ///
    /// # Errors
    /// As [`device_memory`](Cuda::device_memory) and [`export`](Runtime::export).
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let memory = self.device_memory(size)?;
        memory.fill(0, memory.size(), 0)?;
        // The dma-buf holds the memory when the pointer goes.
        self.export_at(memory.address(), memory.size())?.into_allocation()
    }
}

/// The primary context of a GPU, retained: its memory goes with the last who retains it.
#[derive(Debug)]
struct Primary {
    driver: Arc<Driver>,
    device: i32,
    /// A `CUcontext`, as a number that any thread may hold.
    context: usize,
}

impl Primary {
    fn retain(driver: &Arc<Driver>, ordinal: usize) -> Result<Self> {
        let device = driver.devices.get(ordinal).ok_or_else(no_device)?.handle;
        let context = driver.api.retain(device).map_err(|refused| driver.api.error(refused))?;
        Ok(Self { driver: Arc::clone(driver), device, context: context as usize })
    }

    /// Runs something with the context current.
    fn inside<T>(&self, run: impl FnOnce() -> Answer<T>) -> Result<T> {
        let api = &self.driver.api;
        let error = |refused| Error::from(api.error(refused));
        // SAFETY: retained until this is dropped, which the guard does not outlive.
        let _entered = unsafe { api.enter(self.context as Context) }.map_err(error)?;
        run().map_err(error)
    }
}

impl Heap for Primary {
    fn free(&self, address: u64) {
        // SAFETY: called once, by the one owner of the memory that `device_memory` took.
        if let Err(error) = self.inside(|| unsafe { self.driver.api.free(address) }) {
            tracing::warn!(%error, "cannot free memory of a GPU");
        }
    }

    fn fill(&self, address: u64, word: u32, count: usize) -> Result<()> {
        // SAFETY: inside of the memory that its owner holds; it checked the range.
        self.inside(|| unsafe { self.driver.api.fill(address, word, count) })
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        if let Err(refused) = self.driver.api.release(self.device) {
            tracing::warn!(error = %self.driver.api.error(refused), "cannot release a CUDA context");
        }
    }
}

fn no_device() -> Error {
    ExporterError::NoDevice { runtime: LIBRARY.runtime, remedy: NO_DEVICE }.into()
}
