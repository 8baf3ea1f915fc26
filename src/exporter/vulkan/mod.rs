//! Vulkan: device memory as dma-bufs (VK_EXT_external_memory_dma_buf), and dma-bufs as device memory.
//!
//! The loader is found at run time. A driver may list the extension and still export nothing, as
//! Mesa's lavapipe does without access to /dev/udmabuf, so the device is asked what it can do with a
//! buffer of that kind.
//!
//! `unsafe` is here and in `buffer.rs` for calling into the driver.
//!
//! Source: "External Memory Handle Types" of the Vulkan specification.

mod buffer;

use std::ffi::CStr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use ash::vk;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::library::{forbidden_node, out_of_descriptors};
use super::{Allocation, Exporter};
use crate::dmabuf::DmaBuf;
use crate::error::ExporterError;
use crate::pci::PciAddress;
use crate::{Error, Result};

pub use buffer::VulkanBuffer;

const RUNTIME: &str = "Vulkan";
const LIBRARY: &str = "libvulkan.so.1";
const REMEDY: &str = "install the Vulkan loader and a driver (Debian: libvulkan1, mesa-vulkan-drivers)";
const NO_DEVICE: &str = "vulkaninfo --summary lists those that the loader sees; VK_DRIVER_FILES names drivers, and render nodes have to be accessible";
const UNSUPPORTED: &str = "its driver lacks VK_EXT_external_memory_dma_buf, or has it without exporting buffers; Mesa's lavapipe wants version 25 and /dev/udmabuf";
const FORBIDDEN: &str =
    "lavapipe makes its memory of it, so join the group that owns it (kvm under Debian's udev)";
const EXTENSIONS: [&CStr; 2] = [ash::khr::external_memory_fd::NAME, ash::ext::external_memory_dma_buf::NAME];

/// The handle type that all of this is about.
const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::TRANSFER_DST.as_raw()
        | vk::BufferUsageFlags::STORAGE_BUFFER.as_raw(),
);

/// Where exported memory should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemoryChoice {
    /// In the device, where there is such memory; else anywhere.
    #[default]
    Device,
    /// Where the processor sees it too; else in the device.
    HostVisible,
}

/// A Vulkan device of this library's own, that exports and imports dma-bufs.
///
/// For a device of the caller's there is [`export_memory`].
#[derive(Debug, Clone)]
pub struct Vulkan {
    device: Arc<Device>,
    choice: MemoryChoice,
}

/// The device and what it hangs on.
struct Device {
    device: ash::Device,
    fd: ash::khr::external_memory_fd::Device,
    /// Commands are for one thread at a time.
    queue: Mutex<(vk::Queue, vk::CommandPool)>,
    memory: vk::PhysicalDeviceMemoryProperties,
    name: String,
    address: Option<PciAddress>,
    importable: bool,
    instance: ash::Instance,
    // Unloaded after all of the above were destroyed.
    _entry: ash::Entry,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).field("address", &self.address).finish()
    }
}

/// An instance that is destroyed unless it becomes a device's.
struct Instance(Option<(ash::Instance, ash::Entry)>);

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some((instance, _entry)) = &self.0 {
            // SAFETY: ours, and nothing was made of it.
            unsafe { instance.destroy_instance(None) };
        }
    }
}

/// A physical device that will do.
struct Candidate {
    physical: vk::PhysicalDevice,
    family: u32,
    name: String,
    address: Option<PciAddress>,
    importable: bool,
}

impl Vulkan {
    /// Takes the first device that exports buffers as dma-bufs.
    ///
    /// # Errors
    /// - [`ExporterError::RuntimeMissing`]: no loader. [`ExporterError::NoDevice`]: no driver or device.
    /// - [`ExporterError::NotExportable`]: no device exports dma-bufs.
    /// - [`Error::ExporterNotPermitted`]: lavapipe without access to /dev/udmabuf.
    /// - [`ExporterError::RuntimeTooOld`]: a loader before Vulkan 1.1.
    /// - [`ExporterError::RuntimeCall`].
    pub fn load() -> Result<Self> {
        Self::choose(None)
    }

    /// Takes the device whose name has this in it, such as `llvmpipe`.
    ///
    /// # Errors
    /// As [`load`](Self::load); [`ExporterError::NoDevice`] when none is called that.
    pub fn by_name(name: &str) -> Result<Self> {
        Self::choose(Some(name))
    }

    fn choose(name: Option<&str>) -> Result<Self> {
        // SAFETY: loads a library, whose constructors run as for any program.
        let entry = unsafe { ash::Entry::load() }.map_err(|error| {
            tracing::debug!(%error, "cannot load Vulkan");
            ExporterError::RuntimeMissing { runtime: RUNTIME, library: LIBRARY, remedy: REMEDY }
        })?;
        let mut instance = Instance(Some(instance(entry)?));
        let held = instance.0.as_ref().map(|(instance, _)| instance).expect("made above");
        let found = candidate(held, name)?;
        let (instance, entry) = instance.0.take().expect("made above");
        Ok(Self { device: Arc::new(Device::new(instance, entry, found)?), choice: MemoryChoice::default() })
    }

    /// The device's name.
    pub fn device_name(&self) -> &str {
        &self.device.name
    }

    /// Its PCI address, where it is on PCI and the driver tells.
    pub fn device(&self) -> Option<PciAddress> {
        self.device.address
    }

    /// Where the memory of buffers should be.
    #[must_use]
    pub fn with_memory(self, choice: MemoryChoice) -> Self {
        Self { choice, ..self }
    }

    /// Allocates a buffer of at least `size` bytes that can be exported.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::SizeTooLarge`].
    /// - [`ExporterError::TooLarge`]: more than the device has. [`ExporterError::OutOfDescriptors`].
    /// - [`ExporterError::RuntimeCall`].
    #[doc(alias = "VkExportMemoryAllocateInfo")]
    pub fn buffer(&self, size: u64) -> Result<VulkanBuffer> {
        VulkanBuffer::exportable(&self.device, size, self.choice)
    }

    /// A buffer whose memory is a dma-buf, such as one that a NIC wrote.
    ///
    /// # Errors
    /// - [`ExporterError::NotExportable`]: the device imports no dma-bufs, or not this one.
    /// - [`ExporterError::RuntimeCall`].
    #[doc(alias = "VkImportMemoryFdInfoKHR")]
    pub fn import(&self, dmabuf: &DmaBuf) -> Result<VulkanBuffer> {
        VulkanBuffer::imported(&self.device, dmabuf)
    }
}

impl Exporter for Vulkan {
    fn name(&self) -> String {
        format!("Vulkan {}", self.device.name)
    }

    /// Memory of the device, zeroed by it.
    ///
    /// # Errors
    /// As [`buffer`](Vulkan::buffer) and [`VulkanBuffer::export`].
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let buffer = self.buffer(size)?;
        buffer.fill(0, buffer.size(), 0)?;
        // The dma-buf holds the memory when the buffer goes.
        Ok(Allocation { dmabuf: buffer.export()?, backing: None })
    }
}

/// Exports memory of a device of the caller's as a dma-buf.
///
/// # Errors
/// - [`ExporterError::NotExportable`]: it was not allocated for this (`VkExportMemoryAllocateInfo` with
///   `DMA_BUF_EXT`); some drivers then answer with success and no descriptor.
/// - [`ExporterError::OutOfDescriptors`], [`ExporterError::RuntimeCall`].
///
/// # Safety
/// `memory` is alive and `device`'s, which is `instance`'s and has VK_KHR_external_memory_fd enabled.
#[doc(alias = "vkGetMemoryFdKHR")]
pub unsafe fn export_memory(
    instance: &ash::Instance,
    device: &ash::Device,
    memory: vk::DeviceMemory,
) -> Result<DmaBuf> {
    let functions = ash::khr::external_memory_fd::Device::new(instance, device);
    // SAFETY: passed on.
    unsafe { export(&functions, memory) }
}

/// # Safety
/// The memory is alive and of the functions' device.
unsafe fn export(
    functions: &ash::khr::external_memory_fd::Device,
    memory: vk::DeviceMemory,
) -> Result<DmaBuf> {
    let info = vk::MemoryGetFdInfoKHR::default().memory(memory).handle_type(DMA_BUF);
    // SAFETY: says the caller.
    let fd = unsafe { functions.get_memory_fd(&info) }.map_err(|code| refused("vkGetMemoryFdKHR", code))?;
    if fd < 0 {
        let remedy = "it was not allocated for export: chain VkExportMemoryAllocateInfo with DMA_BUF_EXT to the allocation";
        return Err(ExporterError::NotExportable { runtime: RUNTIME, remedy }.into());
    }
    // SAFETY: a descriptor that the driver has just made for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // Drivers make it without.
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|error| Error::Inspect { property: "descriptor flags", source: error.into() })?;
    DmaBuf::from_fd(fd)
}

fn refused(call: &'static str, code: vk::Result) -> Error {
    if let Some(error) = out_of_descriptors(RUNTIME) {
        return error.into();
    }
    let (name, code) = (format!("{code:?}"), i64::from(code.as_raw()));
    ExporterError::RuntimeCall { runtime: RUNTIME, call, code, name }.into()
}

fn no_device() -> Error {
    ExporterError::NoDevice { runtime: RUNTIME, remedy: NO_DEVICE }.into()
}

fn instance(entry: ash::Entry) -> Result<(ash::Instance, ash::Entry)> {
    // SAFETY: takes nothing.
    let version = unsafe { entry.try_enumerate_instance_version() };
    let version = version.map_err(|code| refused("vkEnumerateInstanceVersion", code))?;
    if version.is_none_or(|version| version < vk::API_VERSION_1_1) {
        let symbol = "vkGetPhysicalDeviceExternalBufferProperties";
        return Err(ExporterError::RuntimeTooOld {
            runtime: RUNTIME,
            library: LIBRARY,
            symbol,
            since: "Vulkan 1.1",
        }
        .into());
    }
    let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
    let info = vk::InstanceCreateInfo::default().application_info(&application);
    // SAFETY: the structs are ash's own and outlive the call.
    match unsafe { entry.create_instance(&info, None) } {
        Ok(instance) => Ok((instance, entry)),
        // The loader's word for "no driver".
        Err(vk::Result::ERROR_INCOMPATIBLE_DRIVER) => Err(no_device()),
        Err(code) => Err(refused("vkCreateInstance", code)),
    }
}

/// The first device that will do; else why none does.
fn candidate(instance: &ash::Instance, name: Option<&str>) -> Result<Candidate> {
    // SAFETY: the instance is alive.
    let devices = unsafe { instance.enumerate_physical_devices() }
        .map_err(|code| refused("vkEnumeratePhysicalDevices", code))?;
    let mut reason = no_device();
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
                reason = ExporterError::NotExportable { runtime: RUNTIME, remedy: UNSUPPORTED }.into();
                if properties.device_type == vk::PhysicalDeviceType::CPU
                    && let Some(error) = forbidden_node(&["/dev/udmabuf"], FORBIDDEN)
                {
                    reason = error;
                }
            }
        }
    }
    Err(reason)
}

/// The queue family, address, and whether it imports too, of a device that exports buffers.
fn examine(
    instance: &ash::Instance,
    physical: vk::PhysicalDevice,
) -> Result<Option<(u32, Option<PciAddress>, bool)>> {
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
    fn new(instance: ash::Instance, entry: ash::Entry, found: Candidate) -> Result<Self> {
        let destroy = |error| {
            // SAFETY: ours, and nothing was made of it, or what was is destroyed.
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
        // SAFETY: a device of the instance that has the extensions and the queue family.
        let device = unsafe { instance.create_device(found.physical, &info, None) }
            .map_err(|code| destroy(refused("vkCreateDevice", code)))?;
        let pool = vk::CommandPoolCreateInfo::default()
            .queue_family_index(found.family)
            .flags(vk::CommandPoolCreateFlags::TRANSIENT);
        // SAFETY: the device is alive and has that family.
        let pool = unsafe { device.create_command_pool(&pool, None) }.map_err(|code| {
            // SAFETY: ours, and nothing was made of it.
            unsafe { device.destroy_device(None) };
            destroy(refused("vkCreateCommandPool", code))
        })?;
        // SAFETY: one queue of that family was asked for; the physical device is the instance's.
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
            instance,
            _entry: entry,
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let (_, pool) = *self.queue.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: buffers hold the device, so none is left, and their commands waited for their end.
        unsafe {
            self.device.destroy_command_pool(pool, None);
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}
