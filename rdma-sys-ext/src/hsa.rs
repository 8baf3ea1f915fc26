//! The types and constants of ROCm's `hsa/hsa.h` and `hsa/hsa_ext_amd.h` that exporting memory takes.
//!
//! No functions: the library is found at run time, by whoever uses these.

use std::ffi::c_void;

/// What every function returns.
#[doc(alias = "hsa_status_t")]
pub type Status = u32;

/// It worked.
#[doc(alias = "HSA_STATUS_SUCCESS")]
pub const SUCCESS: Status = 0;
/// An argument is null or not permitted.
#[doc(alias = "HSA_STATUS_ERROR_INVALID_ARGUMENT")]
pub const ERROR_INVALID_ARGUMENT: Status = 0x1001;
/// The range is in no allocation, or the size cannot be allocated.
#[doc(alias = "HSA_STATUS_ERROR_INVALID_ALLOCATION")]
pub const ERROR_INVALID_ALLOCATION: Status = 0x1003;
/// The agent cannot do that.
#[doc(alias = "HSA_STATUS_ERROR_INVALID_AGENT")]
pub const ERROR_INVALID_AGENT: Status = 0x1004;
/// Memory, descriptors or a device are missing.
#[doc(alias = "HSA_STATUS_ERROR_OUT_OF_RESOURCES")]
pub const ERROR_OUT_OF_RESOURCES: Status = 0x1008;
/// `hsa_init` was not called.
#[doc(alias = "HSA_STATUS_ERROR_NOT_INITIALIZED")]
pub const ERROR_NOT_INITIALIZED: Status = 0x100b;

/// A processor or GPU.
#[doc(alias = "hsa_agent_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agent {
    /// Opaque.
    pub handle: u64,
}

/// A pool that memory is allocated from.
#[doc(alias = "hsa_amd_memory_pool_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Opaque.
    pub handle: u64,
}

/// What `hsa_amd_pointer_info` tells.
#[doc(alias = "hsa_amd_pointer_info_t")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PointerInfo {
    /// In: size of this struct. Out: how much of it the library knows.
    pub size: u32,
    /// [`POINTER_TYPE_UNKNOWN`] and its like.
    pub pointer_type: u32,
    /// First byte, as agents other than the processor see it.
    pub agent_base_address: *mut c_void,
    /// First byte, as the processor sees it.
    pub host_base_address: *mut c_void,
    /// Bytes of the allocation.
    pub size_in_bytes: usize,
    /// The application's own.
    pub user_data: *mut c_void,
    /// An agent whose memory it is.
    pub agent_owner: Agent,
    /// Flags of the pool.
    pub global_flags: u32,
}

/// No allocation of the runtime.
#[doc(alias = "HSA_EXT_POINTER_TYPE_UNKNOWN")]
pub const POINTER_TYPE_UNKNOWN: u32 = 0;
/// An allocation of a pool.
#[doc(alias = "HSA_EXT_POINTER_TYPE_HSA")]
pub const POINTER_TYPE_HSA: u32 = 1;
/// Host memory that was locked.
#[doc(alias = "HSA_EXT_POINTER_TYPE_LOCKED")]
pub const POINTER_TYPE_LOCKED: u32 = 2;

/// An agent's kind: [`DEVICE_TYPE_CPU`], [`DEVICE_TYPE_GPU`]. `uint32_t`.
#[doc(alias = "HSA_AGENT_INFO_DEVICE")]
pub const AGENT_INFO_DEVICE: u32 = 17;
/// Bus, device and function: bus << 8 | device << 3 | function. `uint32_t`.
#[doc(alias = "HSA_AMD_AGENT_INFO_BDFID")]
pub const AGENT_INFO_BDFID: u32 = 0xa006;
/// PCI domain. `uint32_t`.
#[doc(alias = "HSA_AMD_AGENT_INFO_DOMAIN")]
pub const AGENT_INFO_DOMAIN: u32 = 0xa00f;

/// A processor.
#[doc(alias = "HSA_DEVICE_TYPE_CPU")]
pub const DEVICE_TYPE_CPU: u32 = 0;
/// A GPU.
#[doc(alias = "HSA_DEVICE_TYPE_GPU")]
pub const DEVICE_TYPE_GPU: u32 = 1;

/// A pool's segment: [`SEGMENT_GLOBAL`] or another. `uint32_t`.
#[doc(alias = "HSA_AMD_MEMORY_POOL_INFO_SEGMENT")]
pub const POOL_INFO_SEGMENT: u32 = 0;
/// Flags of a global pool. `uint32_t`.
#[doc(alias = "HSA_AMD_MEMORY_POOL_INFO_GLOBAL_FLAGS")]
pub const POOL_INFO_GLOBAL_FLAGS: u32 = 1;
/// Bytes of it. `size_t`.
#[doc(alias = "HSA_AMD_MEMORY_POOL_INFO_SIZE")]
pub const POOL_INFO_SIZE: u32 = 2;
/// Whether it can be allocated from. `bool`.
#[doc(alias = "HSA_AMD_MEMORY_POOL_INFO_RUNTIME_ALLOC_ALLOWED")]
pub const POOL_INFO_ALLOC_ALLOWED: u32 = 5;
/// Memory that all can address.
#[doc(alias = "HSA_AMD_SEGMENT_GLOBAL")]
pub const SEGMENT_GLOBAL: u32 = 0;
/// The GPU's own memory, coherent at kernels' ends.
#[doc(alias = "HSA_AMD_MEMORY_POOL_GLOBAL_FLAG_COARSE_GRAINED")]
pub const POOL_FLAG_COARSE_GRAINED: u32 = 4;
