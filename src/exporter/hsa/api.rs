//! The functions of libhsa-runtime64, with one method for each call.
//!
//! `unsafe` is here for calling into the library. No maintained bindings exist; the layouts are those of
//! `hsa.h` and `hsa_ext_amd.h`, and a test compares them where these headers are installed.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;

use rdma_sys_ext::hsa::{self as sys};
pub(super) use rdma_sys_ext::hsa::{Agent, PointerInfo as HsaPointerInfo, Pool, Status};

use super::LIBRARY;
use crate::exporter::PointerError;
pub(super) use crate::exporter::library::{Answer, Refused};
use crate::exporter::library::{answered, functions};

/// A function that HSA calls with the address when the memory there is freed.
pub(super) type Released = extern "C" fn(*mut c_void, *mut c_void);

type Visit<T> = extern "C" fn(T, *mut c_void) -> Status;

functions! {
    init: "hsa_init", "ROCm 1", ();
    shut_down: "hsa_shut_down", "ROCm 1", ();
    status_string: "hsa_status_string", "ROCm 1", (Status, *mut *const c_char);
    iterate_agents: "hsa_iterate_agents", "ROCm 1", (Visit<Agent>, *mut c_void);
    agent_info: "hsa_agent_get_info", "ROCm 1", (Agent, u32, *mut c_void);
    iterate_pools: "hsa_amd_agent_iterate_memory_pools", "ROCm 1", (Agent, Visit<Pool>, *mut c_void);
    pool_info: "hsa_amd_memory_pool_get_info", "ROCm 1", (Pool, u32, *mut c_void);
    allocate: "hsa_amd_memory_pool_allocate", "ROCm 1", (Pool, usize, u32, *mut *mut c_void);
    free: "hsa_amd_memory_pool_free", "ROCm 1", (*mut c_void);
    fill: "hsa_amd_memory_fill", "ROCm 1", (*mut c_void, u32, usize);
    pointer_info: "hsa_amd_pointer_info", "ROCm 1.8",
        (*const c_void, *mut HsaPointerInfo, *mut c_void, *mut u32, *mut *mut Agent);
    export: "hsa_amd_portable_export_dmabuf", "ROCm 5.6", (*const c_void, usize, *mut c_int, *mut u64);
    close: "hsa_amd_portable_close_dmabuf", "ROCm 5.6", (c_int);
    ? register_release: "hsa_amd_register_deallocation_callback", (*mut c_void, Released, *mut c_void);
}

/// A callback that appends its value to the vector behind `list`.
extern "C" fn collect<T>(value: T, list: *mut c_void) -> Status {
    // SAFETY: the caller passes a vector of this type, which nothing else accesses during the call.
    unsafe { &mut *list.cast::<Vec<T>>() }.push(value);
    sys::SUCCESS
}

impl Api {
    pub(super) fn init(&self) -> Answer {
        // SAFETY: takes nothing; the library counts the calls.
        answered("hsa_init", unsafe { (self.init)() })
    }

    pub(super) fn shut_down(&self) -> Answer {
        // SAFETY: the caller calls this once for each `init`.
        answered("hsa_shut_down", unsafe { (self.shut_down)() })
    }

    pub(super) fn agents(&self) -> Answer<Vec<Agent>> {
        let mut list = Vec::new();
        // SAFETY: the callback appends to this vector and is not called after the return.
        let code = unsafe { (self.iterate_agents)(collect, (&raw mut list).cast()) };
        answered("hsa_iterate_agents", code)?;
        Ok(list)
    }

    pub(super) fn pools(&self, agent: Agent) -> Answer<Vec<Pool>> {
        let mut list = Vec::new();
        // SAFETY: as in `agents`.
        let code = unsafe { (self.iterate_pools)(agent, collect, (&raw mut list).cast()) };
        answered("hsa_amd_agent_iterate_memory_pools", code)?;
        Ok(list)
    }

    /// An attribute of an agent that is a `uint32_t`.
    pub(super) fn agent_info(&self, agent: Agent, attribute: u32) -> Answer<u32> {
        let mut value = 0_u32;
        // SAFETY: every attribute that this crate reads is of this type.
        let code = unsafe { (self.agent_info)(agent, attribute, (&raw mut value).cast()) };
        answered("hsa_agent_get_info", code)?;
        Ok(value)
    }

    /// The register that flushes writes of other devices to the GPU's memory; null without one.
    pub(super) fn hdp_flush(&self, agent: Agent) -> Answer<*mut u32> {
        let none = std::ptr::null_mut();
        let mut found = sys::HdpFlush { memory: none, registers: none };
        // SAFETY: the attribute is this struct.
        let code = unsafe { (self.agent_info)(agent, sys::AGENT_INFO_HDP_FLUSH, (&raw mut found).cast()) };
        answered("hsa_agent_get_info", code)?;
        Ok(found.memory)
    }

    /// Has the library call a function when the allocation at an address is freed. False if it cannot.
    pub(super) fn on_release(&self, address: u64, released: Released) -> bool {
        let Some(register) = self.register_release else { return false };
        // SAFETY: the function is static and does not use its second argument.
        let code = unsafe { register(address as *mut c_void, released, std::ptr::null_mut()) };
        code == sys::SUCCESS
    }

    /// An attribute of a pool: a `uint32_t`, a `size_t` or a bool, in a zeroed word.
    pub(super) fn pool_info(&self, pool: Pool, attribute: u32) -> Answer<u64> {
        let mut value = [0_u8; 8];
        // SAFETY: no attribute that this crate reads is larger.
        let code = unsafe { (self.pool_info)(pool, attribute, value.as_mut_ptr().cast()) };
        answered("hsa_amd_memory_pool_get_info", code)?;
        Ok(u64::from_le_bytes(value))
    }

    pub(super) fn allocate(&self, pool: Pool, size: u64) -> Answer<u64> {
        let mut address = std::ptr::null_mut();
        // SAFETY: writes one address; the flags are 0.
        let code = unsafe { (self.allocate)(pool, size as usize, 0, &raw mut address) };
        answered("hsa_amd_memory_pool_allocate", code)?;
        Ok(address as u64)
    }

    /// # Safety
    /// `allocate` returned the address, and it has not been freed.
    pub(super) unsafe fn free(&self, address: u64) -> Answer {
        // SAFETY: the caller's promise.
        answered("hsa_amd_memory_pool_free", unsafe { (self.free)(address as *mut c_void) })
    }

    /// Sets words and waits for the device to finish.
    ///
    /// # Safety
    /// The caller owns the words.
    pub(super) unsafe fn fill(&self, address: u64, word: u32, count: usize) -> Answer {
        // SAFETY: the caller's promise. The function returns when the words are set.
        answered("hsa_amd_memory_fill", unsafe { (self.fill)(address as *mut c_void, word, count) })
    }

    pub(super) fn pointer_info(&self, address: u64) -> Answer<HsaPointerInfo> {
        let mut info = MaybeUninit::<HsaPointerInfo>::zeroed();
        let (size, none) = (size_of::<HsaPointerInfo>() as u32, std::ptr::null_mut());
        // SAFETY: the struct is zeroed, and the library writes at most as much as its first word says.
        // Without an allocator it returns no list. Nothing is read at the address.
        let (code, info) = unsafe {
            (*info.as_mut_ptr()).size = size;
            let code = (self.pointer_info)(
                address as *const c_void,
                info.as_mut_ptr(),
                none,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            );
            (code, info.assume_init())
        };
        answered("hsa_amd_pointer_info", code)?;
        Ok(info)
    }

    /// A dma-buf of the allocation, and the address's offset in it. `close` must take the descriptor back.
    pub(super) fn export(&self, address: u64, length: u64) -> Answer<(c_int, u64)> {
        let (mut fd, mut offset) = (-1, 0);
        // SAFETY: writes the two values; the library checks the range.
        let code =
            unsafe { (self.export)(address as *const c_void, length as usize, &raw mut fd, &raw mut offset) };
        answered("hsa_amd_portable_export_dmabuf", code)?;
        Ok((fd, offset))
    }

    /// # Safety
    /// `export` returned the descriptor, and it has not been closed.
    pub(super) unsafe fn close(&self, fd: c_int) -> Answer {
        // SAFETY: the caller's promise.
        answered("hsa_amd_portable_close_dmabuf", unsafe { (self.close)(fd) })
    }

    /// The error for a code, with the runtime's text for it.
    pub(super) fn error(&self, refused: Refused) -> PointerError {
        let mut text = std::ptr::null();
        // SAFETY: writes a pointer to a static string, or nothing for an unknown code.
        let known = unsafe { (self.status_string)(refused.code, &raw mut text) } == sys::SUCCESS;
        let name = if known && !text.is_null() {
            // SAFETY: a static, NUL-terminated string according to hsa.h.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        } else {
            "an unknown status".into()
        };
        let (call, code) = (refused.call, i64::from(refused.code));
        PointerError::RuntimeCall { runtime: LIBRARY.runtime, call, code, name }
    }
}
