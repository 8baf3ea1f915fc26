//! The functions of libze_loader, with one method for each call.
//!
//! `unsafe` is here for calling into the library. No maintained bindings exist; the layouts are those of
//! `ze_api.h`, and a test compares them where this header is installed.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use rdma_sys_ext::level_zero::{self as sys, AllocDesc, ContextDesc, ExportDesc, ExportFd, QueueDesc};
pub(super) use rdma_sys_ext::level_zero::{AllocProperties, Handle, PciProperties, Status};

use super::LIBRARY;
use crate::exporter::PointerError;
pub(super) use crate::exporter::library::{Answer, Refused};
use crate::exporter::library::{answered, functions};

functions! {
    init: "zeInit", "version 1.0", (u32);
    drivers: "zeDriverGet", "version 1.0", (*mut u32, *mut Handle);
    devices: "zeDeviceGet", "version 1.0", (Handle, *mut u32, *mut Handle);
    pci: "zeDevicePciGetPropertiesExt", "version 1.3", (Handle, *mut PciProperties);
    create_context: "zeContextCreate", "version 1.0", (Handle, *const ContextDesc, *mut Handle);
    destroy_context: "zeContextDestroy", "version 1.0", (Handle);
    allocate: "zeMemAllocDevice", "version 1.0",
        (Handle, *const AllocDesc, usize, usize, Handle, *mut *mut c_void);
    free: "zeMemFree", "version 1.0", (Handle, *mut c_void);
    properties: "zeMemGetAllocProperties", "version 1.0",
        (Handle, *const c_void, *mut AllocProperties, *mut Handle);
    range: "zeMemGetAddressRange", "version 1.0", (Handle, *const c_void, *mut *mut c_void, *mut usize);
    create_list: "zeCommandListCreateImmediate", "version 1.0",
        (Handle, Handle, *const QueueDesc, *mut Handle);
    append_fill: "zeCommandListAppendMemoryFill", "version 1.0",
        (Handle, *mut c_void, *const c_void, usize, usize, Handle, u32, *mut Handle);
    destroy_list: "zeCommandListDestroy", "version 1.0", (Handle);
}

impl Api {
    pub(super) fn init(&self) -> Answer {
        // SAFETY: takes flags; 0 means all kinds of devices.
        answered("zeInit", unsafe { (self.init)(0) })
    }

    pub(super) fn drivers(&self) -> Answer<Vec<Handle>> {
        // SAFETY: the list has as many handles as the count says.
        listed("zeDriverGet", |count, list| unsafe { (self.drivers)(count, list) })
    }

    /// # Safety
    /// The handle is a driver's.
    pub(super) unsafe fn devices(&self, driver: Handle) -> Answer<Vec<Handle>> {
        // SAFETY: the list has as many handles as the count says; the driver is the caller's promise.
        listed("zeDeviceGet", |count, list| unsafe { (self.devices)(driver, count, list) })
    }

    /// # Safety
    /// The handle is a device's.
    pub(super) unsafe fn pci(&self, device: Handle) -> Answer<PciProperties> {
        let address = sys::PciPlace { domain: 0, bus: 0, device: 0, function: 0 };
        let max_speed = sys::PciSpeed { generation: 0, width: 0, max_bandwidth: 0 };
        let stype = sys::STYPE_PCI_PROPERTIES;
        let mut found = PciProperties { stype, next: null_mut(), address, max_speed };
        // SAFETY: the struct carries its type; the device is the caller's promise.
        answered("zeDevicePciGetPropertiesExt", unsafe { (self.pci)(device, &raw mut found) })?;
        Ok(found)
    }

    /// # Safety
    /// The handle is a driver's.
    pub(super) unsafe fn create_context(&self, driver: Handle) -> Answer<Handle> {
        let desc = ContextDesc { stype: sys::STYPE_CONTEXT_DESC, next: null(), flags: 0 };
        let mut context = null_mut();
        // SAFETY: the struct carries its type; the driver is the caller's promise.
        let code = unsafe { (self.create_context)(driver, &raw const desc, &raw mut context) };
        answered("zeContextCreate", code)?;
        Ok(context)
    }

    /// # Safety
    /// `create_context` returned the context, and nothing is allocated in it.
    pub(super) unsafe fn destroy_context(&self, context: Handle) -> Answer {
        // SAFETY: the caller's promise.
        answered("zeContextDestroy", unsafe { (self.destroy_context)(context) })
    }

    /// Allocates memory that can be exported.
    ///
    /// # Safety
    /// Context and device are alive and of one driver.
    pub(super) unsafe fn allocate(
        &self,
        context: Handle,
        device: Handle,
        size: u64,
        alignment: u64,
    ) -> Answer<u64> {
        let export = ExportDesc { stype: sys::STYPE_EXPORT_DESC, next: null(), flags: sys::EXTERNAL_DMA_BUF };
        let next = (&raw const export).cast();
        let desc = AllocDesc { stype: sys::STYPE_ALLOC_DESC, next, flags: 0, ordinal: 0 };
        let mut address = null_mut();
        // SAFETY: the structs carry their types and outlive the call; the handles are the caller's promise.
        let code = unsafe {
            let (size, alignment) = (size as usize, alignment as usize);
            (self.allocate)(context, &raw const desc, size, alignment, device, &raw mut address)
        };
        answered("zeMemAllocDevice", code)?;
        Ok(address as u64)
    }

    /// # Safety
    /// `allocate` returned the address for this context, and it has not been freed.
    pub(super) unsafe fn free(&self, context: Handle, address: u64) -> Answer {
        // SAFETY: the caller's promise.
        answered("zeMemFree", unsafe { (self.free)(context, address as *mut c_void) })
    }

    /// The kind of memory at an address, and the device that it belongs to.
    ///
    /// # Safety
    /// The context is alive.
    pub(super) unsafe fn properties(
        &self,
        context: Handle,
        address: u64,
    ) -> Answer<(AllocProperties, Handle)> {
        let mut found = properties(null_mut());
        let mut device = null_mut();
        // SAFETY: the struct carries its type. Nothing is read at the address.
        let code =
            unsafe { (self.properties)(context, address as *const c_void, &raw mut found, &raw mut device) };
        answered("zeMemGetAllocProperties", code)?;
        Ok((found, device))
    }

    /// A descriptor of the allocation's dma-buf. The runtime keeps it: each call returns the same one, and
    /// freeing the allocation closes it.
    ///
    /// # Safety
    /// The context is alive.
    pub(super) unsafe fn export(&self, context: Handle, address: u64) -> Answer<i32> {
        let mut export =
            ExportFd { stype: sys::STYPE_EXPORT_FD, next: null(), flags: sys::EXTERNAL_DMA_BUF, fd: -1 };
        let mut found = properties((&raw mut export).cast());
        // SAFETY: the structs carry their types and outlive the call. No device is requested.
        let code =
            unsafe { (self.properties)(context, address as *const c_void, &raw mut found, null_mut()) };
        answered("zeMemGetAllocProperties", code)?;
        Ok(export.fd)
    }

    /// Base and size of the allocation around an address.
    ///
    /// # Safety
    /// The context is alive.
    pub(super) unsafe fn range(&self, context: Handle, address: u64) -> Answer<(u64, u64)> {
        let (mut base, mut size) = (null_mut(), 0);
        // SAFETY: writes the two values; nothing is read at the address.
        let code = unsafe { (self.range)(context, address as *const c_void, &raw mut base, &raw mut size) };
        answered("zeMemGetAddressRange", code)?;
        Ok((base as u64, size as u64))
    }

    /// Sets words and waits for the device to finish.
    ///
    /// # Safety
    /// Context and device are alive. The caller owns the words, which are in an allocation of theirs.
    pub(super) unsafe fn fill(
        &self,
        context: Handle,
        device: Handle,
        address: u64,
        word: u32,
        count: usize,
    ) -> Answer {
        let desc = QueueDesc {
            stype: sys::STYPE_QUEUE_DESC,
            next: null(),
            ordinal: 0,
            index: 0,
            flags: 0,
            mode: sys::QUEUE_SYNCHRONOUS,
            priority: 0,
        };
        let mut list = null_mut();
        // SAFETY: the struct carries its type; the handles are the caller's promise.
        let code = unsafe { (self.create_list)(context, device, &raw const desc, &raw mut list) };
        answered("zeCommandListCreateImmediate", code)?;
        // SAFETY: the pattern is one word, which outlives the call; the memory is the caller's promise.
        let filled = answered("zeCommandListAppendMemoryFill", unsafe {
            let (pattern, size) = ((&raw const word).cast(), size_of::<u32>());
            let address = address as *mut c_void;
            (self.append_fill)(list, address, pattern, size, 4 * count, null_mut(), 0, null_mut())
        });
        // SAFETY: the list was made above, and its commands are done, because it is synchronous.
        let destroyed = answered("zeCommandListDestroy", unsafe { (self.destroy_list)(list) });
        filled.and(destroyed)
    }

    /// The error for a code. Level Zero has no function that names it.
    pub(super) fn error(&self, refused: Refused) -> PointerError {
        let name = match refused.code {
            sys::ERROR_OUT_OF_HOST_MEMORY => "ZE_RESULT_ERROR_OUT_OF_HOST_MEMORY",
            sys::ERROR_OUT_OF_DEVICE_MEMORY => "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
            sys::ERROR_UNINITIALIZED => "ZE_RESULT_ERROR_UNINITIALIZED",
            sys::ERROR_UNSUPPORTED_FEATURE => "ZE_RESULT_ERROR_UNSUPPORTED_FEATURE",
            sys::ERROR_INVALID_ARGUMENT => "ZE_RESULT_ERROR_INVALID_ARGUMENT",
            0x7000_0001 => "ZE_RESULT_ERROR_DEVICE_LOST",
            0x7800_0005 => "ZE_RESULT_ERROR_INVALID_NULL_HANDLE",
            0x7800_0007 => "ZE_RESULT_ERROR_INVALID_NULL_POINTER",
            _ => "a code of ze_result_t in ze_api.h",
        };
        let (call, code) = (refused.call, i64::from(refused.code));
        PointerError::RuntimeCall { runtime: LIBRARY.runtime, call, code, name: name.into() }
    }
}

fn properties(next: *mut c_void) -> AllocProperties {
    AllocProperties {
        stype: sys::STYPE_ALLOC_PROPERTIES,
        next,
        memory_type: sys::MEMORY_UNKNOWN,
        id: 0,
        page_size: 0,
    }
}

/// Most drivers or devices that are asked for, so that a wrong number takes no memory.
const MOST: u32 = 1024;

/// Gets the number of handles, then the handles.
fn listed(call: &'static str, get: impl Fn(*mut u32, *mut Handle) -> Status) -> Answer<Vec<Handle>> {
    let mut count = 0;
    answered(call, get(&raw mut count, null_mut()))?;
    // The runtime returns as many as there is room for.
    count = count.min(MOST);
    let mut list = vec![null_mut(); count as usize];
    answered(call, get(&raw mut count, list.as_mut_ptr()))?;
    list.truncate(count as usize);
    Ok(list)
}
