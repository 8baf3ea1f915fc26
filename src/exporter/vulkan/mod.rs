//! Vulkan: device memory as dma-bufs (VK_EXT_external_memory_dma_buf), and dma-bufs as device memory.
//!
//! The loader is loaded at run time. A driver may list the extension and still export nothing; Mesa's
//! lavapipe does so without access to /dev/udmabuf. So this module asks the device whether it exports
//! buffers.
//!
//! `unsafe` is here and in `buffer.rs` for calling into the driver.
//!
//! Source: "External Memory Handle Types" of the Vulkan specification.

mod buffer;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use ash::vk;
use dma_sg::pci::PciAddress;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::library::{Named, check_descriptor, forbidden_node, out_of_descriptors};
use super::{Allocation, Error, Exporter, PointerError, Result};
use crate::dmabuf::{self, DmaBuf};
use crate::observe::Process;

/// The crate whose types [`export_raw`] takes.
pub use ash;
pub use buffer::VulkanBuffer;

const RUNTIME: &str = LIBRARY.runtime;
const LIBRARY: Named = Named {
    runtime: "Vulkan",
    library: "libvulkan.so.1",
    remedy: "install the Vulkan loader and a driver (Debian: libvulkan1, mesa-vulkan-drivers)",
};
const NO_DEVICE: &str = "vulkaninfo --summary lists the devices that the loader sees; check VK_DRIVER_FILES and the permissions of /dev/dri/renderD*";
const UNSUPPORTED: &str = "its driver lacks VK_EXT_external_memory_dma_buf, or does not export buffers; Mesa's lavapipe needs version 25 and /dev/udmabuf";
const FORBIDDEN: &str =
    "lavapipe allocates from it, so join the group that owns it (kvm under Debian's udev)";
const EXTENSIONS: [&CStr; 2] = [ash::khr::external_memory_fd::NAME, ash::ext::external_memory_dma_buf::NAME];

/// The handle type of a dma-buf.
const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::TRANSFER_DST.as_raw()
        | vk::BufferUsageFlags::STORAGE_BUFFER.as_raw(),
);

/// A Vulkan device, made by this library, that exports and imports dma-bufs.
///
/// For memory of your own device see [`export_raw`].
#[derive(Debug, Clone)]
pub struct Vulkan {
    device: Arc<Device>,
    host_visible: bool,
}

/// The device, and the objects that it depends on.
struct Device {
    device: ash::Device,
    fd: ash::khr::external_memory_fd::Device,
    /// One thread at a time may record and submit commands.
    queue: Mutex<(vk::Queue, vk::CommandPool)>,
    memory: vk::PhysicalDeviceMemoryProperties,
    name: String,
    address: Option<PciAddress>,
    importable: bool,
    creator: Process,
    instance: ash::Instance,
    // Unloaded after everything above is destroyed.
    _entry: ash::Entry,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).field("address", &self.address).finish()
    }
}

/// An instance, destroyed on drop unless a device takes it.
struct Instance(Option<(ash::Instance, ash::Entry)>);

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some((instance, _entry)) = &self.0 {
            // SAFETY: this owns the instance, and nothing was made from it.
            unsafe { instance.destroy_instance(None) };
        }
    }
}

/// A physical device that exports buffers.
struct Candidate {
    physical: vk::PhysicalDevice,
    family: u32,
    name: String,
    address: Option<PciAddress>,
    importable: bool,
}

impl Vulkan {
    /// Opens the first device that exports buffers as dma-bufs.
    ///
    /// # Errors
    /// - [`PointerError::RuntimeMissing`]: no loader. [`PointerError::RuntimeTooOld`]: one before Vulkan 1.1.
    /// - [`PointerError::NoDevice`]: no driver or no device.
    /// - [`PointerError::NotExportable`]: no device exports dma-bufs.
    /// - [`PointerError::OutOfDescriptors`] (`EMFILE`, `ENFILE`).
    /// - [`Error::NotPermitted`]: the device is lavapipe, and this user may not open /dev/udmabuf.
    /// - [`PointerError::RuntimeCall`]: the driver failed otherwise.
    pub fn load() -> Result<Self> {
        Self::choose(None)
    }

    /// Opens the first device whose name contains `name`, such as `llvmpipe`.
    ///
    /// # Errors
    /// As [`load`](Self::load); [`PointerError::NoDevice`] if no name matches.
    pub fn by_name(name: &str) -> Result<Self> {
        Self::choose(Some(name))
    }

    fn choose(name: Option<&str>) -> Result<Self> {
        // SAFETY: loads a library, whose constructors run as in any program linked with it.
        let entry =
            unsafe { ash::Entry::load_from(LIBRARY.library) }.map_err(|error| LIBRARY.not_loaded(&error))?;
        let mut instance = Instance(Some(instance(entry)?));
        let held = instance.0.as_ref().map(|(instance, _)| instance).expect("made above");
        let found = candidate(held, name)?;
        let (instance, entry) = instance.0.take().expect("made above");
        Ok(Self { device: Arc::new(Device::new(instance, entry, found)?), host_visible: false })
    }

    /// The device's name.
    pub fn device_name(&self) -> &str {
        &self.device.name
    }

    /// The device's PCI address, if it is on PCI and the driver reports it.
    pub fn device(&self) -> Option<PciAddress> {
        self.device.address
    }

    /// Prefers memory that the CPU can map too (`HOST_VISIBLE`) for new buffers. The default prefers memory
    /// of the device (`DEVICE_LOCAL`). If the device has no memory of the preferred type, it uses another.
    #[must_use]
    pub fn with_host_visible_memory(self) -> Self {
        Self { host_visible: true, ..self }
    }

    /// Allocates a buffer of at least `size` bytes that can be exported.
    ///
    /// # Errors
    /// - [`Error::Range`]: a size of 0. [`Error::SizeTooLarge`].
    /// - [`Error::OutOfMemory`]: more than the device has free.
    /// - [`PointerError::OutOfDescriptors`], [`PointerError::RuntimeCall`].
    #[doc(alias = "VkExportMemoryAllocateInfo")]
    pub fn buffer(&self, size: u64) -> Result<VulkanBuffer> {
        VulkanBuffer::exportable(&self.device, size, self.host_visible)
    }

    /// Makes a buffer whose memory is a dma-buf, such as one that a NIC wrote.
    ///
    /// # Errors
    /// - [`PointerError::NotExportable`]: the device does not import dma-bufs, or not this one.
    /// - [`PointerError::RuntimeCall`].
    #[doc(alias = "VkImportMemoryFdInfoKHR")]
    pub fn import(&self, dmabuf: &DmaBuf) -> Result<VulkanBuffer> {
        VulkanBuffer::imported(&self.device, dmabuf)
    }
}

impl Exporter for Vulkan {
    fn name(&self) -> String {
        self.device.exporter_name()
    }

    /// Allocates device memory, which the device zeroes.
    ///
    /// # Errors
    /// As [`buffer`](Vulkan::buffer) and [`VulkanBuffer::export`].
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let buffer = self.buffer(size)?;
        buffer.fill(.., 0)?;
        // The dma-buf keeps the memory after the buffer is dropped.
        Ok(Allocation { dmabuf: buffer.export()?, backing: None })
    }
}

/// Exports memory of your own Vulkan device as a dma-buf.
///
/// # Errors
/// - [`PointerError::NotExportable`]: the memory was not allocated for export (`VkExportMemoryAllocateInfo`
///   with `DMA_BUF_EXT`). Some drivers then return success and no descriptor.
/// - [`PointerError::OutOfDescriptors`], [`PointerError::RuntimeCall`].
///
/// # Safety
/// `memory` is alive and belongs to `device`. `device` belongs to `instance` and has
/// VK_KHR_external_memory_fd enabled.
#[doc(alias = "vkGetMemoryFdKHR")]
pub unsafe fn export_raw(
    instance: &ash::Instance,
    device: &ash::Device,
    memory: vk::DeviceMemory,
) -> Result<DmaBuf> {
    let functions = ash::khr::external_memory_fd::Device::new(instance, device);
    // SAFETY: the caller's promise.
    Ok(unsafe { export(&functions, memory) }?)
}

/// # Safety
/// The memory is alive and belongs to the functions' device.
unsafe fn export(
    functions: &ash::khr::external_memory_fd::Device,
    memory: vk::DeviceMemory,
) -> Result<DmaBuf, PointerError> {
    let info = vk::MemoryGetFdInfoKHR::default().memory(memory).handle_type(DMA_BUF);
    // SAFETY: the caller's promise.
    let fd = unsafe { functions.get_memory_fd(&info) }.map_err(|code| refused("vkGetMemoryFdKHR", code))?;
    let remedy = "it was not allocated for export, so chain VkExportMemoryAllocateInfo with DMA_BUF_EXT to the allocation";
    check_descriptor(fd, RUNTIME, remedy)?;
    // SAFETY: the driver has just made this descriptor for the caller.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // Drivers do not make it close-on-exec.
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|error| dmabuf::Error::Inspect { property: "descriptor flags", source: error.into() })?;
    Ok(DmaBuf::from_fd(fd)?)
}

fn refused(call: &'static str, code: vk::Result) -> PointerError {
    out_of_descriptors(RUNTIME).unwrap_or_else(|| {
        let (name, code) = (format!("{code:?}"), i64::from(code.as_raw()));
        PointerError::RuntimeCall { runtime: RUNTIME, call, code, name }
    })
}

fn no_device() -> PointerError {
    PointerError::NoDevice { runtime: RUNTIME, remedy: NO_DEVICE }
}

fn instance(entry: ash::Entry) -> Result<(ash::Instance, ash::Entry), PointerError> {
    // SAFETY: takes nothing.
    let version = unsafe { entry.try_enumerate_instance_version() };
    let version = version.map_err(|code| refused("vkEnumerateInstanceVersion", code))?;
    if version.is_none_or(|version| version < vk::API_VERSION_1_1) {
        let (symbol, since) = ("vkGetPhysicalDeviceExternalBufferProperties", "Vulkan 1.1");
        return Err(LIBRARY.lacks(symbol, since));
    }
    let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
    let info = vk::InstanceCreateInfo::default().application_info(&application);
    // SAFETY: the structs are ash's own and outlive the call.
    match unsafe { entry.create_instance(&info, None) } {
        Ok(instance) => Ok((instance, entry)),
        // The loader returns this if there is no driver, and if it could not open the driver.
        Err(vk::Result::ERROR_INCOMPATIBLE_DRIVER) => {
            Err(out_of_descriptors(RUNTIME).unwrap_or_else(no_device))
        }
        Err(code) => Err(refused("vkCreateInstance", code)),
    }
}

/// The first device that exports buffers, or the reason why none does.
fn candidate(instance: &ash::Instance, name: Option<&str>) -> Result<Candidate> {
    // SAFETY: the instance is alive.
    let devices = unsafe { instance.enumerate_physical_devices() }
        .map_err(|code| refused("vkEnumeratePhysicalDevices", code))?;
    let mut reason = Error::from(no_device());
    for physical in devices {
        // SAFETY: a device of the instance, which is alive.
        let properties = unsafe { instance.get_physical_device_properties(physical) };
        let called = properties.device_name_as_c_str().map(CStr::to_string_lossy).unwrap_or_default();
        if name.is_some_and(|name| !called.contains(name)) {
            continue;
        }
        match examine(instance, physical)? {
            Some((family, address, importable)) => {
                let name = called.into_owned();
                return Ok(Candidate { physical, family, name, address, importable });
            }
            None => {
                reason = PointerError::NotExportable { runtime: RUNTIME, remedy: UNSUPPORTED }.into();
                if properties.device_type == vk::PhysicalDeviceType::CPU
                    && let Some(error) = forbidden_node(&["/dev/udmabuf"], FORBIDDEN)
                {
                    reason = error;
                }
            }
        }
    }
    // A driver that finds no free descriptor shows fewer devices and features.
    Err(out_of_descriptors(RUNTIME).map_or(reason, Error::from))
}

/// Queue family, PCI address and whether it imports too, of a device that exports buffers; otherwise `None`.
fn examine(
    instance: &ash::Instance,
    physical: vk::PhysicalDevice,
) -> Result<Option<(u32, Option<PciAddress>, bool)>, PointerError> {
    // SAFETY: a device of the instance, which is alive, here and below.
    let extensions = unsafe { instance.enumerate_device_extension_properties(physical) }
        .map_err(|code| refused("vkEnumerateDeviceExtensionProperties", code))?;
    let has = |name: &CStr| extensions.iter().any(|found| found.extension_name_as_c_str() == Ok(name));
    if !EXTENSIONS.into_iter().all(has) {
        return Ok(None);
    }
    let asked = vk::PhysicalDeviceExternalBufferInfo::default().usage(USAGE).handle_type(DMA_BUF);
    let mut answer = vk::ExternalBufferProperties::default();
    // SAFETY: as above; the structs are ash's own.
    unsafe { instance.get_physical_device_external_buffer_properties(physical, &asked, &mut answer) };
    let features = answer.external_memory_properties.external_memory_features;
    if !features.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE) {
        return Ok(None);
    }
    // SAFETY: as above.
    let families = unsafe { instance.get_physical_device_queue_family_properties(physical) };
    let moves = vk::QueueFlags::GRAPHICS | vk::QueueFlags::COMPUTE | vk::QueueFlags::TRANSFER;
    let Some(family) = families.iter().position(|family| family.queue_flags.intersects(moves)) else {
        return Ok(None);
    };
    let mut place = vk::PhysicalDevicePCIBusInfoPropertiesEXT::default();
    let address = has(ash::ext::pci_bus_info::NAME).then(|| {
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut place);
        // SAFETY: as above.
        unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
        PciAddress {
            domain: place.pci_domain,
            bus: place.pci_bus as u8,
            device: place.pci_device as u8,
            function: place.pci_function as u8,
        }
    });
    let importable = features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE);
    Ok(Some((family as u32, address, importable)))
}

impl Device {
    fn new(instance: ash::Instance, entry: ash::Entry, found: Candidate) -> Result<Self, PointerError> {
        let destroy = |error| {
            // SAFETY: this owns the instance, and everything made from it is destroyed.
            unsafe { instance.destroy_instance(None) };
            error
        };
        let priorities = [1.0];
        let queues = [vk::DeviceQueueCreateInfo::default()
            .queue_family_index(found.family)
            .queue_priorities(&priorities)];
        let extensions = EXTENSIONS.map(CStr::as_ptr);
        let info =
            vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&extensions);
        // SAFETY: the physical device belongs to the instance and has the extensions and the queue family.
        let device = unsafe { instance.create_device(found.physical, &info, None) }
            .map_err(|code| destroy(refused("vkCreateDevice", code)))?;
        let pool = vk::CommandPoolCreateInfo::default()
            .queue_family_index(found.family)
            .flags(vk::CommandPoolCreateFlags::TRANSIENT);
        // SAFETY: the device is alive and has that family.
        let pool = unsafe { device.create_command_pool(&pool, None) }.map_err(|code| {
            // SAFETY: this owns the device, and nothing was made from it.
            unsafe { device.destroy_device(None) };
            destroy(refused("vkCreateCommandPool", code))
        })?;
        // SAFETY: one queue of that family was requested; the physical device belongs to the instance.
        let (queue, memory) = unsafe {
            let queue = device.get_device_queue(found.family, 0);
            (queue, instance.get_physical_device_memory_properties(found.physical))
        };
        Ok(Self {
            fd: ash::khr::external_memory_fd::Device::new(&instance, &device),
            device,
            queue: Mutex::new((queue, pool)),
            memory,
            name: found.name,
            address: found.address,
            importable: found.importable,
            creator: Process::current(),
            instance,
            _entry: entry,
        })
    }
}

impl Device {
    fn exporter_name(&self) -> String {
        format!("{RUNTIME} {}", self.name)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.creator.is_current() {
            return;
        }
        let (_, pool) = *self.queue.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: buffers hold the device, so none is left, and all commands have ended.
        unsafe {
            self.device.destroy_command_pool(pool, None);
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}
