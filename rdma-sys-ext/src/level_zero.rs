//! The types and constants of oneAPI's `level_zero/ze_api.h` that exporting memory needs.
//!
//! There are no functions here: the user of this module loads the loader at run time. Handles are opaque
//! pointers.

use std::ffi::{c_int, c_void};

/// Result of every function.
#[doc(alias = "ze_result_t")]
pub type Status = u32;
/// An opaque handle of a driver, a device, a context or a command list.
pub type Handle = *mut c_void;

/// Success.
#[doc(alias = "ZE_RESULT_SUCCESS")]
pub const SUCCESS: Status = 0;
/// Out of host memory or descriptors.
#[doc(alias = "ZE_RESULT_ERROR_OUT_OF_HOST_MEMORY")]
pub const ERROR_OUT_OF_HOST_MEMORY: Status = 0x7000_0002;
/// Out of device memory.
#[doc(alias = "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY")]
pub const ERROR_OUT_OF_DEVICE_MEMORY: Status = 0x7000_0003;
/// The driver is not initialized, or there is none.
#[doc(alias = "ZE_RESULT_ERROR_UNINITIALIZED")]
pub const ERROR_UNINITIALIZED: Status = 0x7800_0001;
/// The driver or device does not support the feature.
#[doc(alias = "ZE_RESULT_ERROR_UNSUPPORTED_FEATURE")]
pub const ERROR_UNSUPPORTED_FEATURE: Status = 0x7800_0003;
/// An argument is not permitted.
#[doc(alias = "ZE_RESULT_ERROR_INVALID_ARGUMENT")]
pub const ERROR_INVALID_ARGUMENT: Status = 0x7800_0004;
/// More bytes than the device supports in one allocation.
#[doc(alias = "ZE_RESULT_ERROR_UNSUPPORTED_SIZE")]
pub const ERROR_UNSUPPORTED_SIZE: Status = 0x7800_0009;
/// The device does not support this enumerator or type of handle.
#[doc(alias = "ZE_RESULT_ERROR_UNSUPPORTED_ENUMERATION")]
pub const ERROR_UNSUPPORTED_ENUMERATION: Status = 0x7800_000d;

/// [`ContextDesc::stype`].
#[doc(alias = "ZE_STRUCTURE_TYPE_CONTEXT_DESC")]
pub const STYPE_CONTEXT_DESC: u32 = 0xd;
/// [`QueueDesc::stype`].
#[doc(alias = "ZE_STRUCTURE_TYPE_COMMAND_QUEUE_DESC")]
pub const STYPE_QUEUE_DESC: u32 = 0xe;
/// [`AllocDesc::stype`].
#[doc(alias = "ZE_STRUCTURE_TYPE_DEVICE_MEM_ALLOC_DESC")]
pub const STYPE_ALLOC_DESC: u32 = 0x15;
/// [`AllocProperties::stype`].
#[doc(alias = "ZE_STRUCTURE_TYPE_MEMORY_ALLOCATION_PROPERTIES")]
pub const STYPE_ALLOC_PROPERTIES: u32 = 0x17;
/// [`ExportDesc::stype`].
#[doc(alias = "ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_EXPORT_DESC")]
pub const STYPE_EXPORT_DESC: u32 = 0x18;
/// [`ExportFd::stype`].
#[doc(alias = "ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_EXPORT_FD")]
pub const STYPE_EXPORT_FD: u32 = 0x1a;
/// [`PciProperties::stype`].
#[doc(alias = "ZE_STRUCTURE_TYPE_PCI_EXT_PROPERTIES")]
pub const STYPE_PCI_PROPERTIES: u32 = 0x10008;

/// A Linux dma-buf descriptor.
#[doc(alias = "ZE_EXTERNAL_MEMORY_TYPE_FLAG_DMA_BUF")]
pub const EXTERNAL_DMA_BUF: u32 = 2;
/// The context did not allocate this memory.
#[doc(alias = "ZE_MEMORY_TYPE_UNKNOWN")]
pub const MEMORY_UNKNOWN: u32 = 0;
/// Host memory.
#[doc(alias = "ZE_MEMORY_TYPE_HOST")]
pub const MEMORY_HOST: u32 = 1;
/// Device memory.
#[doc(alias = "ZE_MEMORY_TYPE_DEVICE")]
pub const MEMORY_DEVICE: u32 = 2;
/// Migrates between host and device.
#[doc(alias = "ZE_MEMORY_TYPE_SHARED")]
pub const MEMORY_SHARED: u32 = 3;
/// A command is complete when its call returns.
#[doc(alias = "ZE_COMMAND_QUEUE_MODE_SYNCHRONOUS")]
pub const QUEUE_SYNCHRONOUS: u32 = 1;

/// Argument of `zeContextCreate`.
#[doc(alias = "ze_context_desc_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ContextDesc {
    /// [`STYPE_CONTEXT_DESC`].
    pub stype: u32,
    /// Null.
    pub next: *const c_void,
    /// 0.
    pub flags: u32,
}

/// Argument of `zeCommandListCreateImmediate`.
#[doc(alias = "ze_command_queue_desc_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct QueueDesc {
    /// [`STYPE_QUEUE_DESC`].
    pub stype: u32,
    /// Null.
    pub next: *const c_void,
    /// Queue group.
    pub ordinal: u32,
    /// Queue in the group.
    pub index: u32,
    /// 0.
    pub flags: u32,
    /// [`QUEUE_SYNCHRONOUS`].
    pub mode: u32,
    /// 0: normal.
    pub priority: u32,
}

/// Argument of `zeMemAllocDevice`.
#[doc(alias = "ze_device_mem_alloc_desc_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AllocDesc {
    /// [`STYPE_ALLOC_DESC`].
    pub stype: u32,
    /// An [`ExportDesc`] for exportable memory.
    pub next: *const c_void,
    /// 0.
    pub flags: u32,
    /// Index of the memory within the device.
    pub ordinal: u32,
}

/// Makes an allocation exportable.
#[doc(alias = "ze_external_memory_export_desc_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ExportDesc {
    /// [`STYPE_EXPORT_DESC`].
    pub stype: u32,
    /// Null.
    pub next: *const c_void,
    /// [`EXTERNAL_DMA_BUF`].
    pub flags: u32,
}

/// Result of `zeMemGetAllocProperties`.
#[doc(alias = "ze_memory_allocation_properties_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AllocProperties {
    /// [`STYPE_ALLOC_PROPERTIES`].
    pub stype: u32,
    /// An [`ExportFd`] to get a descriptor, or null.
    pub next: *mut c_void,
    /// One of the `MEMORY_` constants.
    pub memory_type: u32,
    /// Id of the allocation.
    pub id: u64,
    /// Page size in bytes.
    pub page_size: u64,
}

/// Requests a descriptor from `zeMemGetAllocProperties`.
#[doc(alias = "ze_external_memory_export_fd_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ExportFd {
    /// [`STYPE_EXPORT_FD`].
    pub stype: u32,
    /// Null.
    pub next: *const c_void,
    /// [`EXTERNAL_DMA_BUF`].
    pub flags: u32,
    /// Out: the descriptor, which the runtime keeps owning.
    pub fd: c_int,
}

/// Result of `zeDevicePciGetPropertiesExt`.
#[doc(alias = "ze_pci_ext_properties_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PciProperties {
    /// [`STYPE_PCI_PROPERTIES`].
    pub stype: u32,
    /// Null.
    pub next: *mut c_void,
    /// PCI address of the device.
    pub address: PciPlace,
    /// Maximum speed of its link.
    pub max_speed: PciSpeed,
}

/// A PCI address.
#[doc(alias = "ze_pci_address_ext_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PciPlace {
    /// Domain.
    pub domain: u32,
    /// Bus.
    pub bus: u32,
    /// Device.
    pub device: u32,
    /// Function.
    pub function: u32,
}

/// The speed of a link.
#[doc(alias = "ze_pci_speed_ext_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PciSpeed {
    /// PCI Express generation.
    pub generation: i32,
    /// Lanes.
    pub width: i32,
    /// Bytes per second.
    pub max_bandwidth: i64,
}
