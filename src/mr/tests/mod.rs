//! The newer verbs against a library that has them: `stub.c`, compiled here, which records its arguments.
//!
//! `unsafe` is here for that library's functions, and for a device that exists in memory only.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, MutexGuard};

use ibverbs_sys as ffi;
use rdma_sys_ext::symbols::{AllocDmahFn, DeallocDmahFn, Mlx5dvRegDmabufMrFn, RegMrExFn};

use super::path::{self, Request};
use super::{Access, DmaHandle, DmaHandleOptions, TphMemory};
use crate::error::RegistrationError;
use crate::umem::Iova;
use crate::verbs::ProtectionDomain;
use crate::{Error, Result};

struct Stub {
    register: RegMrExFn,
    allocate: AllocDmahFn,
    free: DeallocDmahFn,
    data_direct: Mlx5dvRegDmabufMrFn,
    call: *const [u64; 16],
    errno: *mut c_int,
}

// SAFETY: the pointers are to variables of a library that stays, and are used under the lock of `stub`.
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
        let name = std::ffi::CString::new(library.to_str().unwrap()).unwrap();
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
        // SAFETY: these are the types of the functions in the stub, which are those of the real ones.
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

    /// What the last call was, and its arguments.
    fn last(&self) -> [u64; 16] {
        // SAFETY: the stub's own array, which it writes during calls only.
        unsafe { self.call.read_volatile() }
    }

    /// Has the next calls fail.
    fn fail(&self, errno: c_int) {
        // SAFETY: the stub's own variable, which it reads during calls only.
        unsafe { self.errno.write_volatile(errno) }
    }
}

fn stub() -> MutexGuard<'static, Stub> {
    static STUB: LazyLock<Mutex<Stub>> = LazyLock::new(|| Mutex::new(Stub::load()));
    let stub = STUB.lock().unwrap_or_else(|poison| poison.into_inner());
    stub.fail(0);
    stub
}

/// A domain of a device named "stub0", that libibverbs never sees.
fn domain() -> ProtectionDomain {
    let mut device = ffi::ibv_device::default();
    for (into, byte) in device.name.iter_mut().zip(b"stub0\0") {
        *into = *byte as c_char;
    }
    let device = Box::into_raw(Box::new(device));
    let context = Box::into_raw(Box::new(ffi::ibv_context { device, ..Default::default() }));
    let pd = Box::leak(Box::new(ffi::ibv_pd { context, ..Default::default() }));
    // SAFETY: all three live for ever; nothing is called on them but the stub.
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
    let options = DmaHandleOptions { cpu: Some(5), hint: Some(2), memory: Some(TphMemory::Persistent) };
    let handle = DmaHandle::allocate(stub.allocate, stub.free, domain.context(), options).unwrap();
    let context = address(domain.context().as_raw());
    assert_eq!(stub.last()[..6], [2, context, 0b111, 5, 2, 1]);

    handle.check(domain.context()).unwrap();
    let foreign = handle.check(self::domain().context());
    assert!(matches!(
        foreign,
        Err(Error::Registration(RegistrationError::ForeignDmaHandle { device })) if device == "stub0"
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
fn only_what_was_asked_of_a_dma_handle_is_set() {
    let (stub, domain) = (stub(), domain());
    for (options, expected) in [
        (DmaHandleOptions::default(), [0, 0, 0, 0]),
        (DmaHandleOptions { cpu: Some(9), ..Default::default() }, [1, 9, 0, 0]),
        (DmaHandleOptions { hint: Some(3), ..Default::default() }, [2, 0, 3, 0]),
        (DmaHandleOptions { memory: Some(TphMemory::Volatile), ..Default::default() }, [4, 0, 0, 0]),
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
    let allocate = || -> Result<DmaHandle> {
        DmaHandle::allocate(stub.allocate, stub.free, domain.context(), DmaHandleOptions::default())
    };
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
        let Error::Registration(error) = error else { panic!("{error:?}") };
        match (errno, &error) {
            (libc::EINVAL, RegistrationError::DmaHandle { device, .. }) => assert_eq!(device, "stub0"),
            (_, RegistrationError::Unavailable { operation: "ibv_alloc_dmah", needs, .. }) => {
                assert!(needs.starts_with("rdma-core 59 or later, Linux 6.17"), "{needs}");
            }
            _ => panic!("{error:?}"),
        }
    }
}
