//! The types and constants of ROCm's `hsa/hsa.h` and `hsa/hsa_ext_amd.h` that exporting memory needs.
//!
//! There are no functions here: the user of this module loads the library at run time.

use std::ffi::c_void;

/// Result of every function.
#[doc(alias = "hsa_status_t")]
pub type Status = u32;

/// Success.
#[doc(alias = "HSA_STATUS_SUCCESS")]
pub const SUCCESS: Status = 0;
/// An argument is null or not permitted.
#[doc(alias = "HSA_STATUS_ERROR_INVALID_ARGUMENT")]
pub const ERROR_INVALID_ARGUMENT: Status = 0x1001;
/// No allocation contains the range, or the size cannot be allocated.
#[doc(alias = "HSA_STATUS_ERROR_INVALID_ALLOCATION")]
pub const ERROR_INVALID_ALLOCATION: Status = 0x1003;
/// The agent does not support the operation.
#[doc(alias = "HSA_STATUS_ERROR_INVALID_AGENT")]
pub const ERROR_INVALID_AGENT: Status = 0x1004;
/// Out of memory or descriptors, or no device.
#[doc(alias = "HSA_STATUS_ERROR_OUT_OF_RESOURCES")]
pub const ERROR_OUT_OF_RESOURCES: Status = 0x1008;
/// `hsa_init` was not called.
#[doc(alias = "HSA_STATUS_ERROR_NOT_INITIALIZED")]
pub const ERROR_NOT_INITIALIZED: Status = 0x100b;

/// A CPU or a GPU.
#[doc(alias = "hsa_agent_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agent {
    /// Opaque.
    pub handle: u64,
}

/// A memory pool.
#[doc(alias = "hsa_amd_memory_pool_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Opaque.
    pub handle: u64,
}

/// Result of `hsa_amd_pointer_info`.
#[doc(alias = "hsa_amd_pointer_info_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PointerInfo {
    /// In: size of this struct. Out: bytes of it that the library filled in.
    pub size: u32,
    /// One of the `POINTER_TYPE_` constants.
    pub pointer_type: u32,
    /// Address of the allocation for agents other than the CPU.
    pub agent_base_address: *mut c_void,
    /// Address of the allocation for the CPU.
    pub host_base_address: *mut c_void,
    /// Bytes of the allocation.
    pub size_in_bytes: usize,
    /// For the application's use.
    pub user_data: *mut c_void,
    /// The agent that owns the memory.
    pub agent_owner: Agent,
    /// Flags of the pool.
    pub global_flags: u32,
}

/// The runtime did not allocate this memory.
#[doc(alias = "HSA_EXT_POINTER_TYPE_UNKNOWN")]
pub const POINTER_TYPE_UNKNOWN: u32 = 0;
/// Allocated from a pool.
#[doc(alias = "HSA_EXT_POINTER_TYPE_HSA")]
pub const POINTER_TYPE_HSA: u32 = 1;
/// Host memory that the application locked.
#[doc(alias = "HSA_EXT_POINTER_TYPE_LOCKED")]
pub const POINTER_TYPE_LOCKED: u32 = 2;

/// Memory of a graphics component.
#[doc(alias = "HSA_EXT_POINTER_TYPE_GRAPHICS")]
pub const POINTER_TYPE_GRAPHICS: u32 = 3;
/// Allocated by another process, and opened here.
#[doc(alias = "HSA_EXT_POINTER_TYPE_IPC")]
pub const POINTER_TYPE_IPC: u32 = 4;
/// Reserved addresses without memory.
#[doc(alias = "HSA_EXT_POINTER_TYPE_RESERVED_ADDR")]
pub const POINTER_TYPE_RESERVED: u32 = 5;
/// Memory mapped into reserved addresses.
#[doc(alias = "HSA_EXT_POINTER_TYPE_HSA_VMEM")]
pub const POINTER_TYPE_VMEM: u32 = 6;

/// Type of the agent: [`DEVICE_TYPE_CPU`] or [`DEVICE_TYPE_GPU`]. `uint32_t`.
#[doc(alias = "HSA_AGENT_INFO_DEVICE")]
pub const AGENT_INFO_DEVICE: u32 = 17;
/// PCI address: bus << 8 | device << 3 | function. `uint32_t`.
#[doc(alias = "HSA_AMD_AGENT_INFO_BDFID")]
pub const AGENT_INFO_BDFID: u32 = 0xa006;
/// PCI domain. `uint32_t`.
#[doc(alias = "HSA_AMD_AGENT_INFO_DOMAIN")]
pub const AGENT_INFO_DOMAIN: u32 = 0xa00f;

/// Addresses of the registers that flush writes of other devices to a GPU's memory: [`HdpFlush`].
#[doc(alias = "HSA_AMD_AGENT_INFO_HDP_FLUSH")]
pub const AGENT_INFO_HDP_FLUSH: u32 = 0xa00e;

/// Registers of the host data path, null on a GPU without them.
#[doc(alias = "hsa_amd_hdp_flush_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct HdpFlush {
    /// Writing 1 flushes memory.
    pub memory: *mut u32,
    /// Writing 1 flushes registers.
    pub registers: *mut u32,
}

/// A CPU.
#[doc(alias = "HSA_DEVICE_TYPE_CPU")]
pub const DEVICE_TYPE_CPU: u32 = 0;
/// A GPU.
#[doc(alias = "HSA_DEVICE_TYPE_GPU")]
pub const DEVICE_TYPE_GPU: u32 = 1;

/// Segment of the pool: [`SEGMENT_GLOBAL`] or another. `uint32_t`.
#[doc(alias = "HSA_AMD_MEMORY_POOL_INFO_SEGMENT")]
pub const POOL_INFO_SEGMENT: u32 = 0;
/// Flags of a global pool. `uint32_t`.
#[doc(alias = "HSA_AMD_MEMORY_POOL_INFO_GLOBAL_FLAGS")]
pub const POOL_INFO_GLOBAL_FLAGS: u32 = 1;
/// Bytes of the pool. `size_t`.
#[doc(alias = "HSA_AMD_MEMORY_POOL_INFO_SIZE")]
pub const POOL_INFO_SIZE: u32 = 2;
/// Whether the pool allows allocations. `bool`.
#[doc(alias = "HSA_AMD_MEMORY_POOL_INFO_RUNTIME_ALLOC_ALLOWED")]
pub const POOL_INFO_ALLOC_ALLOWED: u32 = 5;
/// Memory that all agents can address.
#[doc(alias = "HSA_AMD_SEGMENT_GLOBAL")]
pub const SEGMENT_GLOBAL: u32 = 0;
/// Memory of the GPU, coherent at kernel boundaries.
#[doc(alias = "HSA_AMD_MEMORY_POOL_GLOBAL_FLAG_COARSE_GRAINED")]
pub const POOL_FLAG_COARSE_GRAINED: u32 = 4;
