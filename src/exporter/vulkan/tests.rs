//! A driver that exists only here, for what a real one does not do on request.
//!
//! `unsafe` is here to define the driver's functions and to pass them on.

use std::cell::Cell;
use std::ffi::{CStr, c_char};
use std::os::fd::{BorrowedFd, RawFd};

use ash::vk::Handle;
use dma_sg::RangeError;

use super::*;

thread_local! {
    /// What vkBindBufferMemory returns.
    static BIND: Cell<vk::Result> = const { Cell::new(vk::Result::SUCCESS) };
    /// The descriptor that the driver imported and still owns.
    static OWNED: Cell<RawFd> = const { Cell::new(-1) };
    /// Buffers and allocations that were not destroyed.
    static LIVE: Cell<i32> = const { Cell::new(0) };
}

type Callbacks<'a> = *const vk::AllocationCallbacks<'a>;

fn made(count: i32) {
    LIVE.set(LIVE.get() + count);
}

unsafe extern "system" fn create_buffer(
    _: vk::Device,
    _: *const vk::BufferCreateInfo<'_>,
    _: Callbacks<'_>,
    buffer: *mut vk::Buffer,
) -> vk::Result {
    made(1);
    // SAFETY: the library passes a place for the handle.
    unsafe { buffer.write(vk::Buffer::from_raw(7)) };
    vk::Result::SUCCESS
}

unsafe extern "system" fn destroy_buffer(_: vk::Device, _: vk::Buffer, _: Callbacks<'_>) {
    made(-1);
}

unsafe extern "system" fn buffer_requirements(
    _: vk::Device,
    _: vk::Buffer,
    needed: *mut vk::MemoryRequirements,
) {
    // SAFETY: the library passes a place for the struct.
    unsafe { needed.write(vk::MemoryRequirements { size: 4096, alignment: 4096, memory_type_bits: 1 }) };
}

unsafe extern "system" fn fd_properties(
    _: vk::Device,
    _: vk::ExternalMemoryHandleTypeFlags,
    _: RawFd,
    found: *mut vk::MemoryFdPropertiesKHR<'_>,
) -> vk::Result {
    // SAFETY: the library passes a struct.
    unsafe { (*found).memory_type_bits = 1 };
    vk::Result::SUCCESS
}

unsafe extern "system" fn allocate_memory(
    _: vk::Device,
    info: *const vk::MemoryAllocateInfo<'_>,
    _: Callbacks<'_>,
    memory: *mut vk::DeviceMemory,
) -> vk::Result {
    // SAFETY: the library passes a chain of structs, each with its type, and a place for the handle.
    unsafe {
        let mut next = (*info).p_next.cast::<vk::BaseInStructure<'_>>();
        while !next.is_null() {
            if (*next).s_type == vk::StructureType::IMPORT_MEMORY_FD_INFO_KHR {
                OWNED.set((*next.cast::<vk::ImportMemoryFdInfoKHR<'_>>()).fd);
            }
            next = (*next).p_next;
        }
        memory.write(vk::DeviceMemory::from_raw(8));
    }
    made(1);
    vk::Result::SUCCESS
}

unsafe extern "system" fn free_memory(_: vk::Device, memory: vk::DeviceMemory, _: Callbacks<'_>) {
    made(-i32::from(!memory.is_null()));
}

unsafe extern "system" fn bind_memory(
    _: vk::Device,
    _: vk::Buffer,
    _: vk::DeviceMemory,
    _: u64,
) -> vk::Result {
    BIND.get()
}

/// Success without a descriptor.
unsafe extern "system" fn memory_fd(
    _: vk::Device,
    _: *const vk::MemoryGetFdInfoKHR<'_>,
    fd: *mut RawFd,
) -> vk::Result {
    // SAFETY: the library passes a place for the number.
    unsafe { fd.write(-1) };
    vk::Result::SUCCESS
}

unsafe extern "system" fn destroy_pool(_: vk::Device, _: vk::CommandPool, _: Callbacks<'_>) {}
unsafe extern "system" fn destroy_device(_: vk::Device, _: Callbacks<'_>) {}
unsafe extern "system" fn destroy_instance(_: vk::Instance, _: Callbacks<'_>) {}

unsafe extern "system" fn device_function(_: vk::Device, name: *const c_char) -> vk::PFN_vkVoidFunction {
    // SAFETY: ash passes the handle and the name on.
    unsafe { function(vk::Instance::null(), name) }
}

/// A function that the driver has; ash panics at a call of any other.
unsafe extern "system" fn function(_: vk::Instance, name: *const c_char) -> vk::PFN_vkVoidFunction {
    // SAFETY: ash passes a name that ends in NUL.
    let address = match unsafe { CStr::from_ptr(name) }.to_bytes() {
        b"vkGetDeviceProcAddr" => device_function as *const (),
        b"vkCreateBuffer" => create_buffer as *const (),
        b"vkDestroyBuffer" => destroy_buffer as *const (),
        b"vkGetBufferMemoryRequirements" => buffer_requirements as *const (),
        b"vkGetMemoryFdPropertiesKHR" => fd_properties as *const (),
        b"vkAllocateMemory" => allocate_memory as *const (),
        b"vkFreeMemory" => free_memory as *const (),
        b"vkBindBufferMemory" => bind_memory as *const (),
        b"vkGetMemoryFdKHR" => memory_fd as *const (),
        b"vkDestroyCommandPool" => destroy_pool as *const (),
        b"vkDestroyDevice" => destroy_device as *const (),
        b"vkDestroyInstance" => destroy_instance as *const (),
        _ => return None,
    };
    // SAFETY: ash calls it with the type that the specification gives this name, and so do the functions above.
    Some(unsafe { std::mem::transmute::<*const (), unsafe extern "system" fn()>(address) })
}

/// A device with one type of memory.
fn vulkan() -> Vulkan {
    let functions = ash::StaticFn { get_instance_proc_addr: function };
    // SAFETY: the functions above do nothing with the handles.
    let (entry, instance, device) = unsafe {
        let instance = ash::Instance::load(&functions, vk::Instance::from_raw(1));
        let device = ash::Device::load(instance.fp_v1_0(), vk::Device::from_raw(2));
        (ash::Entry::from_static_fn(functions), instance, device)
    };
    let memory = vk::PhysicalDeviceMemoryProperties { memory_type_count: 1, ..Default::default() };
    let device = Device {
        fd: ash::khr::external_memory_fd::Device::new(&instance, &device),
        device,
        queue: Mutex::new((vk::Queue::null(), vk::CommandPool::null())),
        memory,
        name: "fake".into(),
        address: None,
        importable: true,
        creator: Process::current(),
        instance,
        _entry: entry,
    };
    Vulkan { device: Arc::new(device), host_visible: false }
}

/// The driver owns the descriptor once the import succeeded.
#[test]
fn a_failed_bind_after_an_import_leaves_the_descriptor_to_the_driver() {
    let (vulkan, dmabuf) = (vulkan(), DmaBuf::fake(1, 4096));
    BIND.set(vk::Result::ERROR_OUT_OF_DEVICE_MEMORY);
    let refused = vulkan.import(&dmabuf);
    BIND.set(vk::Result::SUCCESS);
    assert_error!(refused, Error::Pointer(PointerError::RuntimeCall { call: "vkBindBufferMemory", .. }));
    assert_eq!(LIVE.get(), 0);
    // SAFETY: asked only whether it is open.
    let open = fcntl(unsafe { BorrowedFd::borrow_raw(OWNED.get()) }, FcntlArg::F_GETFD);
    assert!(open.is_ok(), "the library closed it");
    // SAFETY: the driver would close it when it frees the memory; this one leaves that to the test.
    drop(unsafe { OwnedFd::from_raw_fd(OWNED.get()) });
}

#[test]
fn copies_from_another_device_or_from_itself_are_refused() {
    let (one, other) = (vulkan(), vulkan());
    let (target, foreign) = (one.buffer(8192).unwrap(), other.buffer(8192).unwrap());
    let reason = |refused: Result<()>| match refused {
        Err(Error::Pointer(PointerError::CopySource { reason })) => reason,
        other => panic!("{other:?}"),
    };
    assert!(reason(target.copy_from(&foreign)).contains("another device"));
    assert!(reason(target.copy_from(&target)).contains("itself"));
    let larger = one.clone().buffer(16384).unwrap();
    assert_error!(target.copy_from(&larger), Error::Range(RangeError::OutOfRange { size: 8192, .. }));
}

#[test]
fn fills_without_a_word_are_refused() {
    let buffer = vulkan().buffer(4096).unwrap();
    for (start, end) in [(0, 3), (5, 7), (1, 4), (4093, 4096)] {
        assert_error!(buffer.fill(start..end, 1), Error::Range(RangeError::NoWord { .. }));
    }
    assert_error!(buffer.fill(4096.., 1), Error::Range(RangeError::Empty { .. }));
    assert_error!(
        buffer.fill_each([(0..4, 1), (4..6, 2)]),
        Error::Range(RangeError::NoWord { start: 4, .. })
    );
}

#[test]
fn success_without_a_descriptor_is_refused() {
    let refused = vulkan().buffer(4096).unwrap().export();
    assert_error!(refused, Error::Pointer(PointerError::NotExportable { .. }));
}
