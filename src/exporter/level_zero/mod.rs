//! Level Zero: dma-bufs of the memory of Intel GPUs, through libze_loader.
//!
//! A pointer of SYCL's `malloc_device` is one of Level Zero's.
//!
//! `unsafe` is here for what the calls in `api.rs` ask of their callers.
//!
//! Source: `ze_api.h`, "External Memory Import and Export" of the Level Zero specification.

mod api;

use std::sync::Arc;

use rdma_sys_ext::level_zero as sys;

use super::device_memory::{DeviceMemory, Heap};
use super::library::{Named, duplicate, forbidden_node, out_of_descriptors};
use super::runtime::{Exported, Found, MemoryKind, Piece, Route, Runtime, foreign, not_null};
use super::{Allocation, Exporter, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::error::ExporterError;
use crate::pci::PciAddress;
use crate::umem::page_size;
use crate::{Error, Result};
use api::{Api, Handle, Refused};

const LIBRARY: Named = Named {
    runtime: "Level Zero",
    library: "libze_loader.so.1",
    remedy: "install the loader and Intel's driver (Debian: libze1, libze-intel-gpu1)",
};
const NODES: &[&str] = &["/dev/dri/renderD128", "/dev/dri/renderD129"];
const FORBIDDEN: &str = "join the group that owns it (render), or pass it to the container";
const NO_DEVICE: &str = "no driver of it found a GPU; ZE_ENABLE_LOADER_DEBUG_TRACE=1 shows which it tried, ZE_AFFINITY_MASK may hide GPUs";
const UNSUPPORTED: &str = "the driver exports device memory, of most drivers only what was allocated with ze_external_memory_export_desc_t";

/// The Level Zero loader with its first driver that has a device, and a context.
#[derive(Debug, Clone)]
pub struct LevelZero {
    driver: Arc<Driver>,
    device: usize,
}

#[derive(Debug)]
struct Driver {
    api: Api,
    context: Handle,
    /// Whether the context is ours to destroy.
    owned: bool,
    devices: Vec<Device>,
}

#[derive(Debug)]
struct Device {
    handle: Handle,
    address: Option<PciAddress>,
}

// SAFETY: handles are names of objects that any thread may use; the functions called here are free-threaded,
// says the specification, apart from those on a command list, each of which has one user.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

impl Drop for Driver {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        // SAFETY: ours, and all memory that was allocated in it held this.
        if let Err(refused) = unsafe { self.api.destroy_context(self.context) } {
            tracing::warn!(error = %self.api.error(refused), "cannot destroy a context of Level Zero");
        }
    }
}

impl LevelZero {
    /// Loads the loader, initialises it and makes a context. [`allocate`](Exporter::allocate) takes memory
    /// of the first device.
    ///
    /// Drivers find a pointer whichever context it was allocated in; one that does not wants
    /// [`with_context`](Self::with_context).
    ///
    /// # Errors
    /// - [`ExporterError::RuntimeMissing`], [`ExporterError::RuntimeTooOld`]: the loader.
    /// - [`ExporterError::NoDevice`]: no driver, or none with a device.
    /// - [`Error::ExporterNotPermitted`]: the render node is not for this user.
    /// - [`ExporterError::RuntimeCall`]: the driver failed otherwise.
    #[doc(alias = "zeInit")]
    pub fn load() -> Result<Self> {
        Self::new(None)
    }

    /// The same with a context of the caller's.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    ///
    /// # Safety
    /// `context` is a `ze_context_handle_t` of the first driver that has a device, and outlives what is
    /// made here.
    pub unsafe fn with_context(context: *mut std::ffi::c_void) -> Result<Self> {
        Self::new(Some(context))
    }

    fn new(context: Option<Handle>) -> Result<Self> {
        let api = Api::load()?;
        let error = |refused: Refused| {
            let forbidden = forbidden_node(NODES, FORBIDDEN);
            forbidden.unwrap_or_else(|| match refused.code {
                sys::ERROR_UNINITIALIZED => no_device(),
                _ => api.error(refused).into(),
            })
        };
        api.init().map_err(error)?;
        for driver in api.drivers().map_err(error)? {
            // SAFETY: the loader has just named the driver.
            let handles = unsafe { api.devices(driver) }.map_err(error)?;
            if handles.is_empty() {
                continue;
            }
            let devices: Vec<_> =
                handles.into_iter().map(|handle| Device { handle, address: address(&api, handle) }).collect();
            // SAFETY: as above.
            let made = || unsafe { api.create_context(driver) };
            let (owned, context) = (context.is_none(), context.map_or_else(made, Ok).map_err(error)?);
            let driver = Driver { api, context, owned, devices };
            return Ok(Self { driver: Arc::new(driver), device: 0 });
        }
        Err(no_device())
    }

    /// The loader if this process has loaded it already.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn if_loaded() -> Result<Option<Self>> {
        LIBRARY.is_loaded().then(Self::load).transpose()
    }

    /// PCI addresses of the devices, in the driver's order.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = Option<PciAddress>> {
        self.driver.devices.iter().map(|device| device.address)
    }

    /// Takes memory of another device, by its place in [`devices`](Self::devices).
    ///
    /// # Errors
    /// [`ExporterError::NoDevice`]: there is none.
    pub fn with_device(self, number: usize) -> Result<Self> {
        if number >= self.driver.devices.len() {
            return Err(no_device());
        }
        Ok(Self { device: number, ..self })
    }

    /// Allocates at least `size` bytes of the device's memory, in whole pages, for export.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::SizeTooLarge`].
    /// - [`ExporterError::TooLarge`]: more than the device has, or allocates at once.
    /// - [`ExporterError::RuntimeCall`].
    #[doc(alias = "zeMemAllocDevice")]
    pub fn device_memory(&self, size: u64) -> Result<DeviceMemory> {
        let size = whole_pages(size, page_size())?;
        let heap = DeviceHeap { driver: Arc::clone(&self.driver), device: self.device };
        let (driver, device) = (&self.driver, heap.handle());
        // SAFETY: the context is of the driver whose devices these are, and both live with it.
        match unsafe { driver.api.allocate(driver.context, device, size, page_size()) } {
            Ok(address) => Ok(DeviceMemory::new(address, size, Arc::new(heap))),
            Err(Refused { code: sys::ERROR_OUT_OF_DEVICE_MEMORY | sys::ERROR_UNSUPPORTED_SIZE, .. }) => {
                Err(ExporterError::TooLarge { runtime: LIBRARY.runtime, size }.into())
            }
            Err(refused) => Err(driver.api.error(refused).into()),
        }
    }

    /// Exports what was found a moment ago.
    fn export_found(&self, found: &Found, length: u64) -> Result<Exported> {
        let _span = crate::observe::exporting(|| Exporter::name(self), length);
        let driver = &self.driver;
        let refused = |refused: Refused| match refused.code {
            sys::ERROR_UNSUPPORTED_FEATURE | sys::ERROR_UNSUPPORTED_ENUMERATION => {
                ExporterError::NotExportable { runtime: LIBRARY.runtime, remedy: UNSUPPORTED }
            }
            _ => out_of_descriptors(LIBRARY.runtime).unwrap_or_else(|| driver.api.error(refused)),
        };
        // The base: some drivers know allocations by it alone.
        // SAFETY: the context lives as long as the driver.
        let fd = unsafe { driver.api.export(driver.context, found.base) }.map_err(refused)?;
        // SAFETY: the allocation was there a moment ago, and keeps its descriptor open.
        let ours = unsafe { duplicate(fd) }
            .map_err(|source| ExporterError::OutOfDescriptors { exporter: LIBRARY.runtime, source })?;
        let offset = found.address - found.base;
        let piece = Piece::new(DmaBuf::from_fd(ours)?, offset, length, Route::Default)?;
        Ok(Exported::new(found, vec![piece]))
    }

    fn refused(&self, refused: Refused) -> Error {
        self.driver.api.error(refused).into()
    }
}

impl Runtime for LevelZero {
    fn name(&self) -> &'static str {
        LIBRARY.runtime
    }

    #[doc(alias = "zeMemGetAllocProperties")]
    fn find(&self, address: u64) -> Result<Option<Found>> {
        not_null(address)?;
        let driver = &self.driver;
        // SAFETY: the context lives as long as the driver.
        let asked = unsafe { driver.api.properties(driver.context, address) };
        let (properties, device) = asked.map_err(|refused| self.refused(refused))?;
        let kind = match properties.memory_type {
            sys::MEMORY_UNKNOWN => return Ok(None),
            sys::MEMORY_DEVICE => MemoryKind::Device,
            sys::MEMORY_SHARED => MemoryKind::Managed,
            _ => MemoryKind::Host,
        };
        // SAFETY: as above.
        let range = unsafe { driver.api.range(driver.context, address) };
        let (base, size) = range.map_err(|refused| self.refused(refused))?;
        let owner = driver.devices.iter().find(|known| known.handle == device);
        Ok(Some(Found {
            runtime: LIBRARY.runtime,
            address,
            base,
            size,
            kind,
            id: Some(properties.id),
            device: owner.filter(|_| kind != MemoryKind::Host).and_then(|owner| owner.address),
        }))
    }

    /// One piece, of the whole allocation.
    ///
    /// # Errors
    /// [`ExporterError::NotExportable`]: `ZE_RESULT_ERROR_UNSUPPORTED_FEATURE`.
    #[doc(alias = "ze_external_memory_export_fd_t")]
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

impl Exporter for LevelZero {
    fn name(&self) -> String {
        format!("Level Zero device {}", self.device)
    }

    /// Memory of the device, zeroed by it.
    ///
    /// # Errors
    /// As [`device_memory`](LevelZero::device_memory) and [`export`](Runtime::export).
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let memory = self.device_memory(size)?;
        memory.fill(0, memory.size(), 0)?;
        // The dma-buf holds the memory when the pointer goes.
        self.export_at(memory.address(), memory.size())?.into_allocation()
    }
}

/// The memory of one device.
#[derive(Debug)]
struct DeviceHeap {
    driver: Arc<Driver>,
    device: usize,
}

impl DeviceHeap {
    fn handle(&self) -> Handle {
        self.driver.devices[self.device].handle
    }
}

impl Heap for DeviceHeap {
    fn free(&self, address: u64) {
        let driver = &self.driver;
        // SAFETY: called once, by the one owner of the memory that `device_memory` took.
        if let Err(refused) = unsafe { driver.api.free(driver.context, address) } {
            tracing::warn!(error = %driver.api.error(refused), "cannot free memory of a GPU");
        }
    }

    fn fill(&self, address: u64, word: u32, count: usize) -> Result<()> {
        let driver = &self.driver;
        // SAFETY: inside of the memory that its owner holds; it checked the range.
        let filled = unsafe { driver.api.fill(driver.context, self.handle(), address, word, count) };
        filled.map_err(|refused| driver.api.error(refused).into())
    }
}

/// Where a device is, if its driver tells.
fn address(api: &Api, device: Handle) -> Option<PciAddress> {
    // SAFETY: the driver has just named the device.
    let place = unsafe { api.pci(device) }.ok()?.address;
    Some(PciAddress {
        domain: place.domain,
        bus: u8::try_from(place.bus).ok()?,
        device: u8::try_from(place.device).ok()?,
        function: u8::try_from(place.function).ok()?,
    })
}

fn no_device() -> Error {
    ExporterError::NoDevice { runtime: LIBRARY.runtime, remedy: NO_DEVICE }.into()
}
