//! Level Zero: dma-bufs of Intel GPU memory, through libze_loader.
//!
//! Level Zero knows the pointers of SYCL's `malloc_device`.
//!
//! `unsafe` is here for the functions in `api.rs` that require something of their caller.
//!
//! Source: `ze_api.h`, "External Memory Import and Export" of the Level Zero specification.

mod api;

use std::sync::Arc;

use dma_sg::page_size;
use dma_sg::pci::PciAddress;
use rdma_sys_ext::level_zero as sys;

use super::device_memory::{DeviceMemory, Heap};
use super::library::{Named, duplicate, out_of_descriptors};
use super::runtime::{
    ExportFound, ExportOptions, ExportedRange, MemoryKind, PointerInfo, Runtime, allocation_in, not_null,
};
use super::{Allocation, Error, Exporter, PointerError, Result, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::observe::Process;
use api::{Api, Handle, Refused};

const LIBRARY: Named = Named {
    runtime: "Level Zero",
    library: "libze_loader.so.1",
    remedy: "install the loader and Intel's driver (Debian: libze1, libze-intel-gpu1)",
};
const NODES: &[&str] = &["/dev/dri/renderD128", "/dev/dri/renderD129"];
const FORBIDDEN: &str = "join the group that owns it (render), or pass it to the container";
const NO_DEVICE: &str =
    "ZE_ENABLE_LOADER_DEBUG_TRACE=1 shows which drivers the loader tried; ZE_AFFINITY_MASK may hide GPUs";
const UNSUPPORTED: &str =
    "most drivers export only device memory that was allocated with ze_external_memory_export_desc_t";

/// The first Level Zero driver that has a device, and a context of it.
#[derive(Debug, Clone)]
pub struct LevelZero {
    driver: Arc<Driver>,
    device: usize,
}

#[derive(Debug)]
struct Driver {
    api: Api,
    context: Handle,
    /// The process that created the context; `None` for a context of the caller's.
    creator: Option<Process>,
    devices: Vec<Device>,
}

#[derive(Debug)]
struct Device {
    handle: Handle,
    address: Option<PciAddress>,
}

// SAFETY: any thread may use the handles. The specification makes the functions called here thread-safe,
// except those on a command list, and each command list has one user.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

impl Drop for Driver {
    fn drop(&mut self) {
        if !self.creator.is_some_and(Process::is_current) {
            return;
        }
        // SAFETY: this made the context, and memory that is allocated in it holds a reference to this.
        if let Err(refused) = unsafe { self.api.destroy_context(self.context) } {
            tracing::warn!(error = %self.api.error(refused), "cannot destroy a Level Zero context");
        }
    }
}

impl LevelZero {
    /// Loads and initializes the library and creates a context. [`allocate`](Exporter::allocate) takes memory of
    /// the first device.
    ///
    /// Most drivers find a pointer whatever context it was allocated in. For one that does not, use
    /// [`from_raw_context`](Self::from_raw_context).
    ///
    /// # Errors
    /// - [`PointerError::RuntimeMissing`], [`PointerError::RuntimeTooOld`]: the library.
    /// - [`PointerError::NoDevice`]: no driver has a device.
    /// - [`PointerError::OutOfDescriptors`] (`EMFILE`, `ENFILE`).
    /// - [`Error::NotPermitted`]: this user may not open the render node.
    /// - [`PointerError::RuntimeCall`]: the driver failed otherwise.
    #[doc(alias = "zeInit")]
    pub fn load() -> Result<Self> {
        Self::new(None)
    }

    /// As [`load`](Self::load), with the caller's context, which this never destroys.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    ///
    /// # Safety
    /// `context` is a `ze_context_handle_t` of the first driver that has a device. It outlives the returned
    /// object, its clones and the [`DeviceMemory`] allocated from them.
    pub unsafe fn from_raw_context(context: *mut std::ffi::c_void) -> Result<Self> {
        Self::new(Some(context))
    }

    fn new(context: Option<Handle>) -> Result<Self> {
        let api = Api::load()?;
        let error = |refused: Refused| {
            LIBRARY.not_started(NODES, FORBIDDEN, || match refused.code {
                sys::ERROR_UNINITIALIZED => no_device(),
                _ => api.error(refused),
            })
        };
        api.init().map_err(error)?;
        for driver in api.drivers().map_err(error)? {
            // SAFETY: the loader has just returned the driver's handle.
            let handles = unsafe { api.devices(driver) }.map_err(error)?;
            if handles.is_empty() {
                continue;
            }
            let devices: Vec<_> =
                handles.into_iter().map(|handle| Device { handle, address: address(&api, handle) }).collect();
            // SAFETY: as above.
            let made = || unsafe { api.create_context(driver) };
            let creator = context.is_none().then(Process::current);
            let context = context.map_or_else(made, Ok).map_err(error)?;
            let driver = Driver { api, context, creator, devices };
            return Ok(Self { driver: Arc::new(driver), device: 0 });
        }
        Err(out_of_descriptors(LIBRARY.runtime).unwrap_or_else(no_device).into())
    }

    /// As [`load`](Self::load), but only if this process has already loaded the library.
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

    /// Selects the device that [`allocate`](Exporter::allocate) takes memory of, by its index in
    /// [`devices`](Self::devices).
    ///
    /// # Errors
    /// [`PointerError::NoDevice`]: no device has that index.
    pub fn with_device(self, index: usize) -> Result<Self> {
        if index >= self.driver.devices.len() {
            return Err(no_device().into());
        }
        Ok(Self { device: index, ..self })
    }

    /// Allocates at least `size` bytes of device memory for export, rounded up to whole pages.
    ///
    /// # Errors
    /// - [`Error::Range`]: a size of 0. [`Error::SizeTooLarge`].
    /// - [`Error::OutOfMemory`]: more than the device has free, or more than it allocates at once.
    /// - [`PointerError::RuntimeCall`].
    #[doc(alias = "zeMemAllocDevice")]
    pub fn device_memory(&self, size: u64) -> Result<DeviceMemory> {
        let size = whole_pages(size, page_size())?;
        let heap = DeviceHeap { driver: Arc::clone(&self.driver), device: self.device };
        let (driver, device) = (&self.driver, heap.handle());
        // SAFETY: context and device belong to one driver, which keeps both alive.
        match unsafe { driver.api.allocate(driver.context, device, size, page_size()) } {
            Ok(address) => Ok(DeviceMemory::new(address, size, Arc::new(heap))),
            Err(Refused { code: sys::ERROR_OUT_OF_DEVICE_MEMORY | sys::ERROR_UNSUPPORTED_SIZE, .. }) => {
                let exporter = Exporter::name(self);
                Err(Error::OutOfMemory { exporter, requested: size, available: None, limit: None })
            }
            Err(refused) => Err(driver.api.error(refused).into()),
        }
    }

    fn refused(&self, refused: Refused) -> PointerError {
        self.driver.api.error(refused)
    }
}

impl Runtime for LevelZero {
    fn name(&self) -> &'static str {
        LIBRARY.runtime
    }

    #[doc(alias = "zeMemGetAllocProperties")]
    fn find(&self, address: u64) -> Result<Option<PointerInfo>, PointerError> {
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
        Ok(Some(PointerInfo {
            runtime: LIBRARY.runtime,
            address,
            base,
            size,
            kind,
            // A driver that numbers nothing leaves 0.
            id: Some(properties.id).filter(|id| *id != 0),
            device: owner.filter(|_| kind != MemoryKind::Host).and_then(|owner| owner.address),
        }))
    }

    /// Exports one range, of the dma-buf of the whole allocation.
    ///
    /// # Errors
    /// [`PointerError::NotExportable`]: `ZE_RESULT_ERROR_UNSUPPORTED_FEATURE`.
    #[doc(alias = "ze_external_memory_export_fd_t")]
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
}

impl ExportFound for LevelZero {
    fn export_found(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>, PointerError> {
        let _span = crate::observe::exporting(|| Exporter::name(self), length);
        let driver = &self.driver;
        let refused = |refused: Refused| match refused.code {
            sys::ERROR_UNSUPPORTED_FEATURE | sys::ERROR_UNSUPPORTED_ENUMERATION => {
                PointerError::NotExportable { runtime: LIBRARY.runtime, remedy: UNSUPPORTED }
            }
            _ => out_of_descriptors(LIBRARY.runtime).unwrap_or_else(|| self.refused(refused)),
        };
        // Some drivers know an allocation only by its base.
        // SAFETY: the context lives as long as the driver.
        let fd = unsafe { driver.api.export(driver.context, info.base) }.map_err(refused)?;
        // SAFETY: the allocation was alive a moment ago and keeps its descriptor, if any, open.
        let copy = unsafe { duplicate(fd, LIBRARY.runtime, UNSUPPORTED) }?;
        let offset = info.address - info.base;
        let dmabuf = DmaBuf::from_fd(copy)?.with_device(info.device);
        Ok(vec![allocation_in(info, dmabuf, offset, length, "zeMemGetAllocProperties")?])
    }
}

impl Exporter for LevelZero {
    fn name(&self) -> String {
        format!("Level Zero device {}", self.device)
    }

    /// Allocates device memory, which the device zeroes.
    ///
    /// # Errors
    /// As [`device_memory`](LevelZero::device_memory) and [`export`](Runtime::export).
    fn allocate(&self, size: u64) -> Result<Allocation> {
        self.device_memory(size)?.into_allocation(self)
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
        // SAFETY: `DeviceMemory`, the only owner of this allocation, calls this once.
        if let Err(refused) = unsafe { driver.api.free(driver.context, address) } {
            tracing::warn!(error = %driver.api.error(refused), "cannot free GPU memory");
        }
    }

    fn fill(&self, address: u64, word: u32, count: usize) -> Result<(), PointerError> {
        let driver = &self.driver;
        // SAFETY: `DeviceMemory` owns the words and checked the range.
        let filled = unsafe { driver.api.fill(driver.context, self.handle(), address, word, count) };
        filled.map_err(|refused| driver.api.error(refused))
    }
}

/// The PCI address of a device, if its driver reports it.
fn address(api: &Api, device: Handle) -> Option<PciAddress> {
    // SAFETY: the driver has just returned the device's handle.
    let place = unsafe { api.pci(device) }.ok()?.address;
    Some(PciAddress {
        domain: place.domain,
        bus: u8::try_from(place.bus).ok()?,
        device: u8::try_from(place.device).ok()?,
        function: u8::try_from(place.function).ok()?,
    })
}

fn no_device() -> PointerError {
    PointerError::NoDevice { runtime: LIBRARY.runtime, remedy: NO_DEVICE }
}
