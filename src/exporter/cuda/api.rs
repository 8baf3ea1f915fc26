//! The functions of libcuda, with one method for each call.
//!
//! `unsafe` is here for calling into libcuda. `cudarc` has the types. The functions are declared here for
//! three reasons: a newer driver may return a code that `cudarc`'s enum of results lacks, `cudarc` panics if
//! the driver lacks a function, and it loads a libcuda.so before libcuda.so.1.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::RawFd;

use cudarc::driver::sys;
pub(super) use sys::CUdevice_attribute_enum as DeviceAttribute;
use sys::CUmemAllocationProp as Properties;
use sys::CUmemRangeFlags_enum::CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE;
use sys::CUmemRangeHandleType_enum::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
use sys::CUpointer_attribute_enum as Attribute;
pub(super) use sys::{CUcontext as Context, CUdeviceptr as Address};

use super::LIBRARY;
use crate::exporter::PointerError;
pub(super) use crate::exporter::library::{Answer, Refused};
use crate::exporter::library::{answered, functions};

/// The codes that this module handles.
pub(super) mod code {
    use super::sys::cudaError_enum as C;

    pub(crate) const INVALID_VALUE: u32 = C::CUDA_ERROR_INVALID_VALUE as u32;
    pub(crate) const OUT_OF_MEMORY: u32 = C::CUDA_ERROR_OUT_OF_MEMORY as u32;
    pub(crate) const NOT_INITIALIZED: u32 = C::CUDA_ERROR_NOT_INITIALIZED as u32;
    pub(crate) const DEINITIALIZED: u32 = C::CUDA_ERROR_DEINITIALIZED as u32;
    pub(crate) const CONTEXT_IS_DESTROYED: u32 = C::CUDA_ERROR_CONTEXT_IS_DESTROYED as u32;
    pub(crate) const NO_DEVICE: u32 = C::CUDA_ERROR_NO_DEVICE as u32;
    pub(crate) const INVALID_CONTEXT: u32 = C::CUDA_ERROR_INVALID_CONTEXT as u32;
    pub(crate) const NOT_FOUND: u32 = C::CUDA_ERROR_NOT_FOUND as u32;
    pub(crate) const NOT_SUPPORTED: u32 = C::CUDA_ERROR_NOT_SUPPORTED as u32;
}

functions! {
    init: "cuInit", "CUDA 4", (c_uint);
    device_count: "cuDeviceGetCount", "CUDA 4", (*mut c_int);
    device_get: "cuDeviceGet", "CUDA 4", (*mut c_int, c_int);
    device_attribute: "cuDeviceGetAttribute", "CUDA 4", (*mut c_int, c_uint, c_int);
    pci_bus_id: "cuDeviceGetPCIBusId", "CUDA 4.1", (*mut c_char, c_int, c_int);
    error_name: "cuGetErrorName", "CUDA 6", (c_uint, *mut *const c_char);
    retain: "cuDevicePrimaryCtxRetain", "CUDA 7", (*mut Context, c_int);
    release: "cuDevicePrimaryCtxRelease_v2", "CUDA 11", (c_int);
    push: "cuCtxPushCurrent_v2", "CUDA 4", (Context);
    pop: "cuCtxPopCurrent_v2", "CUDA 4", (*mut Context);
    flags: "cuCtxGetFlags", "CUDA 7", (*mut c_uint);
    attributes: "cuPointerGetAttributes", "CUDA 7",
        (c_uint, *const Attribute, *const *mut c_void, Address);
    set_attribute: "cuPointerSetAttribute", "CUDA 6", (*const c_void, c_uint, Address);
    address_range: "cuMemGetAddressRange_v2", "CUDA 3.2", (*mut Address, *mut usize, Address);
    handle: "cuMemGetHandleForAddressRange", "CUDA 11.7",
        (*mut c_void, Address, usize, c_uint, c_ulonglong);
    retain_handle: "cuMemRetainAllocationHandle", "CUDA 11", (*mut Handle, *mut c_void);
    release_handle: "cuMemRelease", "CUDA 10.2", (Handle);
    handle_properties: "cuMemGetAllocationPropertiesFromHandle", "CUDA 10.2", (*mut Properties, Handle);
    flush: "cuFlushGPUDirectRDMAWrites", "CUDA 11.3", (c_uint, c_uint);
    alloc: "cuMemAlloc_v2", "CUDA 3.2", (*mut Address, usize);
    free: "cuMemFree_v2", "CUDA 3.2", (Address);
    info: "cuMemGetInfo_v2", "CUDA 3.2", (*mut usize, *mut usize);
    set: "cuMemsetD32_v2", "CUDA 3.2", (Address, c_uint, usize);
    synchronize: "cuCtxSynchronize", "CUDA 4", ();
    ? version: "cuDriverGetVersion", (*mut c_int);
    // CUDA 12.1.
    ? set_flags: "cuCtxSetFlags", (c_uint);
}

/// A `CUmemGenericAllocationHandle`: physical memory that `cuMemMap` maps.
pub(super) type Handle = c_ulonglong;

/// What the driver reports about a pointer; all zero for one that it does not know.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Attributes {
    pub(super) context: usize,
    pub(super) memory_type: c_uint,
    pub(super) buffer_id: c_ulonglong,
    pub(super) managed: c_uint,
    /// A `CUmemoryPool`; null for memory of no pool.
    pub(super) pool: usize,
    pub(super) ordinal: c_int,
    pub(super) base: Address,
    pub(super) size: usize,
}

impl Attributes {
    pub(super) const HOST: c_uint = sys::CUmemorytype_enum::CU_MEMORYTYPE_HOST as c_uint;
    pub(super) const DEVICE: c_uint = sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE as c_uint;
}

impl Api {
    pub(super) fn init(&self) -> Answer {
        // SAFETY: takes flags, which must be 0.
        answered("cuInit", unsafe { (self.init)(0) })
    }

    pub(super) fn device_count(&self) -> Answer<c_int> {
        let mut count = 0;
        // SAFETY: writes one int.
        answered("cuDeviceGetCount", unsafe { (self.device_count)(&raw mut count) })?;
        Ok(count)
    }

    /// The device of an ordinal, and its PCI address as text.
    pub(super) fn device(&self, ordinal: c_int) -> Answer<(c_int, String)> {
        let mut device = 0;
        // SAFETY: writes one int.
        answered("cuDeviceGet", unsafe { (self.device_get)(&raw mut device, ordinal) })?;
        let mut text = [0_u8; 32];
        // SAFETY: writes a string of at most the length passed, including its NUL.
        let code = unsafe { (self.pci_bus_id)(text.as_mut_ptr().cast(), text.len() as c_int, device) };
        answered("cuDeviceGetPCIBusId", code)?;
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        Ok((device, String::from_utf8_lossy(&text[..end]).into_owned()))
    }

    pub(super) fn retain(&self, device: c_int) -> Answer<Context> {
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.retain)(&raw mut context, device) };
        answered("cuDevicePrimaryCtxRetain", code)?;
        Ok(context)
    }

    pub(super) fn release(&self, device: c_int) -> Answer {
        // SAFETY: takes a number. The caller retained the context once for each release.
        answered("cuDevicePrimaryCtxRelease", unsafe { (self.release)(device) })
    }

    /// The version of the driver API, as in 12080; `None` if the driver does not tell.
    pub(super) fn version(&self) -> Option<c_int> {
        let mut version = 0;
        // SAFETY: writes one int.
        let code = unsafe { self.version?(&raw mut version) };
        (code == 0).then_some(version)
    }

    /// Whether a device has an attribute that is a flag; `None` if the driver does not know the attribute.
    pub(super) fn has(&self, device: c_int, which: DeviceAttribute) -> Option<bool> {
        let mut value = 0;
        // SAFETY: writes one int.
        let code = unsafe { (self.device_attribute)(&raw mut value, which as c_uint, device) };
        (code == 0).then_some(value != 0)
    }

    /// Whether the host can have the device make remote writes visible, with `flush_writes`.
    pub(super) fn flushes_writes(&self, device: c_int) -> Answer<bool> {
        let mut options = 0;
        let which = DeviceAttribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS as c_uint;
        // SAFETY: writes one int.
        let code = unsafe { (self.device_attribute)(&raw mut options, which, device) };
        answered("cuDeviceGetAttribute", code)?;
        let host = sys::CUflushGPUDirectRDMAWritesOptions_enum::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST;
        Ok(options as c_uint & host as c_uint != 0)
    }

    /// Waits until remote writes are visible to the device of the current context.
    pub(super) fn flush_writes(&self) -> Answer {
        let target =
            sys::CUflushGPUDirectRDMAWritesTarget_enum::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX;
        let scope = sys::CUflushGPUDirectRDMAWritesScope_enum::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER;
        // SAFETY: takes two numbers.
        answered("cuFlushGPUDirectRDMAWrites", unsafe { (self.flush)(target as c_uint, scope as c_uint) })
    }

    /// Makes a context current for this thread until the guard is dropped.
    ///
    /// # Safety
    /// The context is alive until then.
    pub(super) unsafe fn enter(&self, context: Context) -> Answer<Entered<'_>> {
        // SAFETY: the caller's promise.
        answered("cuCtxPushCurrent", unsafe { (self.push)(context) })?;
        Ok(Entered { api: self })
    }

    pub(super) fn attributes(&self, address: Address) -> Answer<Attributes> {
        let mut found = Attributes::default();
        let names = [
            Attribute::CU_POINTER_ATTRIBUTE_CONTEXT,
            Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            Attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID,
            Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
            Attribute::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
            Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
            Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE,
        ];
        let places: [*mut c_void; 8] = [
            (&raw mut found.context).cast(),
            (&raw mut found.memory_type).cast(),
            (&raw mut found.buffer_id).cast(),
            (&raw mut found.managed).cast(),
            (&raw mut found.pool).cast(),
            (&raw mut found.ordinal).cast(),
            (&raw mut found.base).cast(),
            (&raw mut found.size).cast(),
        ];
        // SAFETY: there is one place for each name, zeroed and at least as large as cuda.h says of the
        // attribute. Nothing is read at the address.
        let code =
            unsafe { (self.attributes)(names.len() as c_uint, names.as_ptr(), places.as_ptr(), address) };
        answered("cuPointerGetAttributes", code)?;
        Ok(found)
    }

    /// Base and size of the allocation around an address. A context must be current.
    pub(super) fn address_range(&self, address: Address) -> Answer<(Address, u64)> {
        let (mut base, mut size) = (0, 0);
        // SAFETY: writes the two values; nothing is read at the address.
        let code = unsafe { (self.address_range)(&raw mut base, &raw mut size, address) };
        answered("cuMemGetAddressRange", code)?;
        Ok((base, size as u64))
    }

    /// Makes synchronous memory operations on the allocation at an address always synchronize.
    pub(super) fn sync_memory(&self, address: Address) -> Answer {
        let (yes, which) = (1 as c_uint, Attribute::CU_POINTER_ATTRIBUTE_SYNC_MEMOPS as c_uint);
        // SAFETY: the attribute is one unsigned int. Nothing is read at the address.
        let code = unsafe { (self.set_attribute)((&raw const yes).cast(), which, address) };
        answered("cuPointerSetAttribute", code)
    }

    /// The same for all memory operations of the current context. False if the driver has no such call.
    pub(super) fn sync_context(&self) -> Answer<bool> {
        let Some(set_flags) = self.set_flags else { return Ok(false) };
        let (mut flags, wanted) = (0, sys::CUctx_flags_enum::CU_CTX_SYNC_MEMOPS as c_uint);
        // SAFETY: writes one unsigned int.
        answered("cuCtxGetFlags", unsafe { (self.flags)(&raw mut flags) })?;
        if flags & wanted == 0 {
            // SAFETY: takes flags; those that were set stay set.
            answered("cuCtxSetFlags", unsafe { set_flags(flags | wanted) })?;
        }
        Ok(true)
    }

    /// The physical memory mapped at an address, retained once more: the same handle each time, until the memory is
    /// released by all.
    pub(super) fn retain_handle(&self, address: Address) -> Answer<Handle> {
        let mut handle = 0;
        // SAFETY: writes one handle; nothing is read at the address.
        let code = unsafe { (self.retain_handle)(&raw mut handle, address as *mut c_void) };
        answered("cuMemRetainAllocationHandle", code)?;
        Ok(handle)
    }

    /// Releases what `retain_handle` retained.
    ///
    /// # Safety
    /// `retain_handle` returned the handle, once more than this was called with it.
    pub(super) unsafe fn release_handle(&self, handle: Handle) -> Answer {
        // SAFETY: the caller's promise.
        answered("cuMemRelease", unsafe { (self.release_handle)(handle) })
    }

    /// The ordinal of the device that physical memory is in, and whether it may be a target of a NIC.
    pub(super) fn physical(&self, handle: Handle) -> Answer<(c_int, bool)> {
        let mut found = std::mem::MaybeUninit::<Properties>::zeroed();
        // SAFETY: writes one struct, which is zeroed.
        let (code, found) = unsafe {
            let code = (self.handle_properties)(found.as_mut_ptr(), handle);
            // The first fields are enums: read the numbers instead.
            let words = found.as_ptr().cast::<c_int>();
            let flags = (&raw const (*found.as_ptr()).allocFlags.gpuDirectRDMACapable).read();
            (code, (words.add(3).read(), flags != 0))
        };
        answered("cuMemGetAllocationPropertiesFromHandle", code)?;
        Ok(found)
    }

    /// A dma-buf of whole pages, which the caller owns. The memory's context must be current.
    pub(super) fn export(&self, address: Address, length: u64, pcie: bool) -> Answer<RawFd> {
        let mut fd: c_int = -1;
        let kind = CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD as c_uint;
        let flags = if pcie { CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE as c_ulonglong } else { 0 };
        // SAFETY: a handle of this type is one int. The driver checks address and length.
        let code = unsafe { (self.handle)((&raw mut fd).cast(), address, length as usize, kind, flags) };
        answered("cuMemGetHandleForAddressRange", code)?;
        Ok(fd)
    }

    /// Allocates memory of the current context's device.
    pub(super) fn alloc(&self, size: u64) -> Answer<Address> {
        let mut address = 0;
        // SAFETY: writes one address.
        answered("cuMemAlloc", unsafe { (self.alloc)(&raw mut address, size as usize) })?;
        Ok(address)
    }

    /// # Safety
    /// `alloc` returned the address, and it has not been freed.
    pub(super) unsafe fn free(&self, address: Address) -> Answer {
        // SAFETY: the caller's promise.
        answered("cuMemFree", unsafe { (self.free)(address) })
    }

    /// Free bytes of the current context's device.
    pub(super) fn available(&self) -> Answer<u64> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes the two values.
        answered("cuMemGetInfo", unsafe { (self.info)(&raw mut free, &raw mut total) })?;
        Ok(free as u64)
    }

    /// Sets words and waits for the device to finish.
    ///
    /// # Safety
    /// The caller owns the words, which are in an allocation of the current context.
    pub(super) unsafe fn fill(&self, address: Address, word: u32, count: usize) -> Answer {
        // SAFETY: the caller's promise.
        answered("cuMemsetD32", unsafe { (self.set)(address, word, count) })?;
        // SAFETY: takes nothing.
        answered("cuCtxSynchronize", unsafe { (self.synchronize)() })
    }

    /// The error for a code, with the driver's name for it.
    pub(super) fn error(&self, refused: Refused) -> PointerError {
        let mut name = std::ptr::null();
        // SAFETY: writes a pointer to a static string, or null for an unknown code.
        let known = unsafe { (self.error_name)(refused.code, &raw mut name) } == 0 && !name.is_null();
        let name = match known {
            // SAFETY: a static, NUL-terminated string according to cuda.h.
            true => unsafe { std::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned(),
            false => "an unknown error".into(),
        };
        let (call, code) = (refused.call, i64::from(refused.code));
        PointerError::RuntimeCall { runtime: LIBRARY.runtime, call, code, name }
    }
}

/// Keeps a context current; dropping this restores the previous one.
#[derive(Debug)]
pub(super) struct Entered<'a> {
    api: &'a Api,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what `enter` pushed on this thread; guards nest, because each borrows the `Api`.
        if let Err(refused) = answered("cuCtxPopCurrent", unsafe { (self.api.pop)(&raw mut popped) }) {
            tracing::warn!(error = %self.api.error(refused), "cannot leave a CUDA context");
        }
    }
}
