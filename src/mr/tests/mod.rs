//! The newer verbs against `stub.c`, a library compiled here that records its arguments; and fake registrations.
//!
//! `unsafe` is here to call that library, and for a device that exists only in memory.

mod cache_bench;
#[cfg(feature = "cuda")]
mod pointer_bench;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, MutexGuard};

use ibverbs_sys as ffi;
use rdma_sys_ext::symbols::{AllocDmahFn, DeallocDmahFn, Mlx5dvRegDmabufMrFn, RegMrExFn};

use super::path::{self, Request};
use dma_sg::Iova;

use super::Access;
use crate::verbs::{self, DmaHandle, DmaHandleOptions, Lkey, ProtectionDomain, Rkey};

struct Stub {
    register: RegMrExFn,
    allocate: AllocDmahFn,
    free: DeallocDmahFn,
    data_direct: Mlx5dvRegDmabufMrFn,
    call: *const [u64; 16],
    errno: *mut c_int,
}

// SAFETY: the pointers lead to variables of a library that stays loaded, and are used under the lock of `stub`.
unsafe impl Send for Stub {}

impl Stub {
    fn load() -> Self {
        let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/mr/tests");
        let library = std::env::temp_dir().join(format!("dmabuf-rdma-stub-{}.so", std::process::id()));
        let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
        compiler.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&library);
        compiler.arg(sources.join("stub.c"));
        let map = format!("-Wl,--version-script={}", sources.join("stub.map").display());
        assert!(compiler.arg(map).status().expect("a C compiler").success());
        let name = std::ffi::CString::new(library.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: the library has no constructors.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "the stub loads");
        std::fs::remove_file(library).unwrap();
        let find = |name: &CStr, version: &CStr| -> *mut c_void {
            // SAFETY: the library is loaded, and both names end in NUL.
            let address = unsafe { libc::dlvsym(handle, name.as_ptr(), version.as_ptr()) };
            assert!(!address.is_null(), "{name:?}@{version:?}");
            address
        };
        let (v15, v25) = (c"IBVERBS_1.15", c"MLX5_1.25");
        // SAFETY: the functions of the stub have these types, as the real ones do.
        unsafe {
            Self {
                register: std::mem::transmute::<*mut c_void, RegMrExFn>(find(c"ibv_reg_mr_ex", v15)),
                allocate: std::mem::transmute::<*mut c_void, AllocDmahFn>(find(c"ibv_alloc_dmah", v15)),
                free: std::mem::transmute::<*mut c_void, DeallocDmahFn>(find(c"ibv_dealloc_dmah", v15)),
                data_direct: std::mem::transmute::<*mut c_void, Mlx5dvRegDmabufMrFn>(find(
                    c"mlx5dv_reg_dmabuf_mr",
                    v25,
                )),
                call: find(c"stub_call", c"STUB").cast(),
                errno: find(c"stub_errno", c"STUB").cast(),
            }
        }
    }

    /// The last call and its arguments.
    fn last(&self) -> [u64; 16] {
        // SAFETY: the stub's own array, which it writes only during calls.
        unsafe { self.call.read_volatile() }
    }

    /// Makes the next calls fail.
    fn fail(&self, errno: c_int) {
        // SAFETY: the stub's own variable, which it reads only during calls.
        unsafe { self.errno.write_volatile(errno) }
    }
}

fn stub() -> MutexGuard<'static, Stub> {
    static STUB: LazyLock<Mutex<Stub>> = LazyLock::new(|| Mutex::new(Stub::load()));
    let stub = STUB.lock().unwrap_or_else(|poison| poison.into_inner());
    stub.fail(0);
    stub
}

/// Registrations that exist only in this process, for tests that need regions but no device.
pub(crate) mod fake {
    use std::ops::Range;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::dmabuf::BufferId;
    use crate::mr::path::Registered;
    use crate::mr::region::Kept;
    use crate::mr::{MemoryRegion, Path, Umem};

    /// A region of `length` bytes from iova 0, in a domain that all of them share.
    pub(crate) fn region(length: u64, access: Access) -> MemoryRegion {
        static DOMAIN: LazyLock<ProtectionDomain> = LazyLock::new(domain);
        region_of(&DOMAIN, BufferId::UNKNOWN, 0..length, access)
    }

    pub(crate) fn region_of(
        domain: &ProtectionDomain,
        buffer: BufferId,
        range: Range<u64>,
        access: Access,
    ) -> MemoryRegion {
        static KEYS: AtomicU32 = AtomicU32::new(1);
        let key = KEYS.fetch_add(1, Ordering::Relaxed);
        let (registered, umem) = (Registered::fake(Lkey(key), Rkey(key)), Umem::fake(buffer, range));
        MemoryRegion::new(registered, Path::DataDirect, access, umem, domain.clone(), Kept::Nothing)
    }
}

/// A domain of a device named "stub0". libibverbs never sees it.
pub(crate) fn domain() -> ProtectionDomain {
    let mut device = ffi::ibv_device::default();
    for (into, byte) in device.name.iter_mut().zip(b"stub0\0") {
        *into = *byte as c_char;
    }
    let device = Box::into_raw(Box::new(device));
    let context = Box::into_raw(Box::new(ffi::ibv_context { device, ..Default::default() }));
    let pd = Box::leak(Box::new(ffi::ibv_pd { context, ..Default::default() }));
    // SAFETY: all three are leaked. Only the stub is called with them.
    unsafe { ProtectionDomain::from_raw(NonNull::from(pd)) }
}

const REQUEST: Request = Request {
    offset: 0x3000,
    length: 5 << 32,
    iova: Iova(0x7_0000_3000),
    access: Access::LOCAL_WRITE.union(Access::REMOTE_READ),
};

fn address<T>(pointer: NonNull<T>) -> u64 {
    pointer.as_ptr().addr() as u64
}

#[test]
fn reg_mr_ex_gets_the_descriptor_its_range_and_the_iova() {
    let (stub, domain) = (stub(), domain());
    let registered = path::register_extended(stub.register, &domain, 77, &REQUEST, None).unwrap();
    assert_eq!((registered.lkey.0, registered.rkey.0), (0xaaaa, 0xbbbb));
    let (pd, masks) = (address(domain.as_raw()), 1 | 1 << 2 | 1 << 3);
    let expected = [1, pd, 5 << 32, 1 | 1 << 2, masks, 0x7_0000_3000, 0, 77, 0x3000, 0, 0];
    assert_eq!(stub.last()[..11], expected);
}

#[test]
fn a_dma_handle_is_allocated_named_and_freed() {
    let (stub, domain) = (stub(), domain());
    let options = DmaHandleOptions::default().cpu(Some(5)).hint(Some(2)).persistent_memory(Some(true));
    let handle = DmaHandle::allocate(stub.allocate, stub.free, domain.context(), options).unwrap();
    let context = address(domain.context().as_raw());
    assert_eq!(stub.last()[..6], [2, context, 0b111, 5, 2, 1]);

    handle.check(domain.context()).unwrap();
    let foreign = handle.check(self::domain().context());
    assert!(matches!(
        foreign,
        Err(verbs::Error::ContextMismatch { object: "DMA handle", device, .. }) if device == "stub0"
    ));

    let raw = handle.as_raw();
    path::register_extended(stub.register, &domain, 3, &REQUEST, Some(raw)).unwrap();
    let call = stub.last();
    assert_eq!((call[4], call[9]), (1 | 1 << 2 | 1 << 3 | 1 << 4, address(raw)));

    let clone = handle.clone();
    drop(handle);
    assert_eq!(stub.last()[0], 1, "a clone holds it");
    drop(clone);
    assert_eq!(stub.last()[..2], [3, address(raw)]);
}

#[test]
fn a_child_of_fork_leaves_its_parents_dma_handle() {
    let (stub, domain) = (stub(), domain());
    let options = DmaHandleOptions::default();
    let mut handle = Some(DmaHandle::allocate(stub.allocate, stub.free, domain.context(), options).unwrap());
    assert!(crate::observe::in_a_child(|| {
        handle = None;
        stub.last()[0] == 2
    }));
    drop(handle.take());
    assert_eq!(stub.last()[0], 3);
}

#[test]
fn only_the_given_options_of_a_dma_handle_are_set() {
    let (stub, domain) = (stub(), domain());
    for (options, expected) in [
        (DmaHandleOptions::default(), [0, 0, 0, 0]),
        (DmaHandleOptions { cpu: Some(9), ..Default::default() }, [1, 9, 0, 0]),
        (DmaHandleOptions { hint: Some(3), ..Default::default() }, [2, 0, 3, 0]),
        (DmaHandleOptions { persistent_memory: Some(false), ..Default::default() }, [4, 0, 0, 0]),
    ] {
        let handle = DmaHandle::allocate(stub.allocate, stub.free, domain.context(), options).unwrap();
        assert_eq!(stub.last()[2..6], expected, "{options:?}");
        drop(handle);
    }
}

#[test]
fn data_direct_sets_its_flag() {
    let (stub, domain) = (stub(), domain());
    path::register_data_direct(stub.data_direct, &domain, 12, &REQUEST).unwrap();
    let expected = [4, address(domain.as_raw()), 0x3000, 5 << 32, 0x7_0000_3000, 12, 5, 1];
    assert_eq!(stub.last()[..8], expected);
}

#[test]
fn refusals_keep_their_errno() {
    let (stub, domain) = (stub(), domain());
    let allocate =
        || DmaHandle::allocate(stub.allocate, stub.free, domain.context(), DmaHandleOptions::default());
    for errno in [libc::EOPNOTSUPP, libc::EPROTONOSUPPORT, libc::EINVAL] {
        stub.fail(errno);
        let answers = [
            path::register_extended(stub.register, &domain, 3, &REQUEST, None).map(drop),
            path::register_data_direct(stub.data_direct, &domain, 3, &REQUEST).map(drop),
        ];
        for answer in answers {
            assert_eq!(answer.unwrap_err().raw_os_error(), Some(errno));
        }
        let error = allocate().unwrap_err();
        assert_eq!(error.errno(), Some(errno));
        match (errno, &error) {
            (libc::EINVAL, verbs::Error::Device { device, .. }) => assert_eq!(device, "stub0"),
            (_, verbs::Error::Unavailable { operation: "ibv_alloc_dmah", needs, .. }) => {
                assert!(needs.starts_with("rdma-core 59 or later, Linux 6.17"), "{needs}");
            }
            _ => panic!("{error:?}"),
        }
    }
}
