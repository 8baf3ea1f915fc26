//! From pointers to bytes on the wire, with stub libraries in place of CUDA, ROCm and Level Zero.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use dmabuf_rdma::exporter::{Cuda, Error, Hsa, LevelZero, MemoryKind, PointerError, Runtime, Runtimes};
use gpu_stubs::Stub;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::assert_refused;
use crate::common::census::{Census, fds};
use crate::common::drm::card;
use crate::common::gpu::{self, Gpu};
use crate::common::system::{vivid, with_forbidden_node};

mod bad_input;
mod cached;
mod flush;
mod kinds;
mod mapped;
mod places;
mod report;

static CUDA: LazyLock<Stub> = LazyLock::new(|| Stub::load("libcuda.so.1"));
static HSA: LazyLock<Stub> = LazyLock::new(|| Stub::load("libhsa-runtime64.so.1"));
static ZE: LazyLock<Stub> = LazyLock::new(|| Stub::load("libze_loader.so.1"));

/// Runs a test on the three runtimes. Each stub must have been called correctly and have everything back.
#[track_caller]
fn each(test: impl Fn(&dyn Gpu, &Stub)) {
    for (stub, load) in [
        (&*CUDA, (|| Box::new(Cuda::load().unwrap())) as fn() -> Box<dyn Gpu>),
        (&*HSA, || Box::new(Hsa::load().unwrap())),
        (&*ZE, || Box::new(LevelZero::load().unwrap())),
    ] {
        clean(stub, || test(load().as_ref(), stub));
    }
}

#[track_caller]
fn clean(stub: &Stub, test: impl FnOnce()) {
    let (census, live) = (Census::take(), stub.live());
    test();
    assert_eq!(stub.misuse(), None);
    assert_eq!(stub.live(), live, "given back");
    census.assert_unchanged();
}

/// Memory of another kind, by its number in the stub's source: 0 for host memory, 1 for managed memory.
pub fn other(stub: &Stub, kind: i32) -> u64 {
    // SAFETY: the type in the stub's source.
    unsafe { stub.function::<unsafe extern "C" fn(i32, usize) -> u64>("stub_other")(kind, 1 << 20) }
}

#[test]
fn sub_allocations_come_out_exact() {
    each(|gpu, _| gpu::sub_allocations_come_out_exact(gpu));
}

#[test]
fn a_sub_allocation_crosses_the_wire() {
    each(|gpu, _| gpu::a_sub_allocation_crosses_the_wire(gpu));
}

#[test]
fn wrong_pointers_are_refused() {
    each(|gpu, _| gpu::wrong_pointers_are_refused(gpu));
}

#[test]
fn exports_leave_no_descriptors() {
    each(|gpu, _| gpu::exports_leave_no_descriptors(gpu));
}

#[test]
fn allocates() {
    each(|gpu, _| gpu::allocates(gpu));
}

#[test]
fn devices_have_their_pci_addresses() {
    let texts = |all: &mut dyn Iterator<Item = Option<dma_sg::pci::PciAddress>>| {
        all.map(|address| address.unwrap().to_string()).collect::<Vec<_>>()
    };
    let _ = (&*CUDA, &*HSA, &*ZE);
    let cuda = Cuda::load().unwrap();
    assert_eq!(texts(&mut cuda.devices()), ["0000:3b:00.0", "0001:5e:00.0"]);
    let hsa = Hsa::load().unwrap();
    assert_eq!(texts(&mut hsa.devices()), ["0000:02:05.1", "0001:03:05.1"]);
    let ze = LevelZero::load().unwrap();
    assert_eq!(texts(&mut ze.devices()), ["0000:9a:02.0", "0001:9a:02.0"]);
    let second = cuda.with_device(1).unwrap();
    let memory = second.memory(4096).unwrap();
    let info = second.find(memory.address()).unwrap().unwrap();
    assert_eq!(info.device.unwrap().to_string(), "0001:5e:00.0");
    assert_refused!(second.with_device(2), Error::Pointer(PointerError::NoDevice { .. }));
}

#[test]
fn a_pointer_is_found_by_its_runtime_among_all_that_are_loaded() {
    let (cuda, hsa, ze) = (&*CUDA, &*HSA, &*ZE);
    clean(cuda, || {
        let all = Runtimes::loaded().unwrap();
        assert_eq!(all.names().collect::<Vec<_>>(), ["CUDA", "ROCm", "Level Zero"]);
        let gpus: [Box<dyn Gpu>; 3] = [
            Box::new(Cuda::load().unwrap()),
            Box::new(Hsa::load().unwrap()),
            Box::new(LevelZero::load().unwrap()),
        ];
        for gpu in &gpus {
            let memory = gpu.memory(1 << 20).unwrap();
            let info = all.find(memory.address() + 5).unwrap().unwrap();
            assert_eq!((info.runtime, info.base), (Runtime::name(gpu.as_ref()), memory.address()));
            assert_eq!(all.export_at(memory.address() + 5, 10).unwrap()[0].range(), 5..15);
        }
        let local = 7_u64;
        let address = (&raw const local) as u64;
        assert_eq!(all.find(address).unwrap(), None);
        let message =
            assert_refused!(all.export_at(address, 8), PointerError::WrongKind { runtime: None, .. });
        assert!(message.contains("make a udmabuf of it"), "{message}");
    });
    assert_eq!((hsa.misuse(), ze.misuse()), (None, None));
}

#[test]
fn memory_of_the_wrong_kind_is_refused() {
    let stub = &*CUDA;
    let cuda = Cuda::load().unwrap();
    let (host, managed) = (other(stub, 0), other(stub, 1));
    assert_eq!(cuda.find(host).unwrap().unwrap().kind, MemoryKind::Host);
    assert_eq!(cuda.find(host).unwrap().unwrap().device, None);
    let message = assert_refused!(
        cuda.export_at(host, 1),
        PointerError::WrongKind { runtime: Some("CUDA"), kind: MemoryKind::Host, .. }
    );
    assert!(message.contains("host memory of CUDA"), "{message}");
    let message = assert_refused!(
        cuda.export_at(managed, 1),
        PointerError::WrongKind { runtime: Some("CUDA"), kind: MemoryKind::Managed, .. }
    );
    assert!(message.contains("allocate device memory"), "{message}");

    let (hsa, ze) = (&*HSA, &*ZE);
    let locked = other(hsa, 0);
    assert_refused!(
        Hsa::load().unwrap().export_at(locked, 1),
        PointerError::WrongKind { runtime: Some("ROCm"), kind: MemoryKind::Host, .. }
    );
    let (host, shared) = (other(ze, 0), other(ze, 1));
    let level_zero = LevelZero::load().unwrap();
    assert_refused!(
        level_zero.export_at(host, 1),
        PointerError::WrongKind { runtime: Some("Level Zero"), kind: MemoryKind::Host, .. }
    );
    assert_refused!(
        level_zero.export_at(shared, 1),
        PointerError::WrongKind { runtime: Some("Level Zero"), kind: MemoryKind::Managed, .. }
    );
    // Memory that was not allocated for export.
    // SAFETY: the type in the stub's source.
    let plain = unsafe { ze.function::<unsafe extern "C" fn(usize) -> u64>("stub_plain")(1 << 20) };
    let message = assert_refused!(
        level_zero.export_at(plain, 1),
        PointerError::NotExportable { runtime: "Level Zero", .. }
    );
    assert!(message.contains("ze_external_memory_export_desc_t"), "{message}");
    assert_eq!((stub.misuse(), hsa.misuse(), ze.misuse()), (None, None, None));
}

/// Codes that the runtime returns become errors with their names.
#[test]
fn refusals_become_errors_with_their_names() {
    let refused = |gpu: &dyn Gpu, stub: &Stub, call: &str, code: i64| {
        let memory = gpu.memory(1 << 20).unwrap();
        let before = fds();
        stub.refuse(call, code);
        let refused = gpu.export_at(memory.address(), 4096).unwrap_err();
        assert_eq!(fds(), before);
        refused
    };
    let call = |error: PointerError| match error {
        PointerError::RuntimeCall { call, code, name, .. } => (call, code, name),
        other => panic!("{other:?}"),
    };
    let stub = &*CUDA;
    clean(stub, || {
        let cuda = Cuda::load().unwrap();
        let export = "cuMemGetHandleForAddressRange";
        let unsupported = refused(&cuda, stub, export, 801);
        assert!(matches!(unsupported, PointerError::NotExportable { runtime: "CUDA", .. }));
        for (code, name) in [(201, "CUDA_ERROR_INVALID_CONTEXT"), (999, "CUDA_ERROR_UNKNOWN")] {
            assert_eq!(call(refused(&cuda, stub, export, code)), (export, code, name.into()));
        }
        assert_eq!(call(refused(&cuda, stub, export, 12345)).2, "an unknown error");
        assert_eq!(call(refused(&cuda, stub, "cuCtxPushCurrent", 201)).0, "cuCtxPushCurrent");
        assert_eq!(call(refused(&cuda, stub, "cuPointerGetAttributes", 999)).0, "cuPointerGetAttributes");
        stub.refuse("cuInit", 100);
        let message = assert_refused!(Cuda::load(), Error::Pointer(PointerError::NoDevice { .. }));
        assert!(message.contains("nvidia-smi"), "{message}");
    });
    let stub = &*HSA;
    clean(stub, || {
        let hsa = Hsa::load().unwrap();
        let export = "hsa_amd_portable_export_dmabuf";
        let past = refused(&hsa, stub, export, 0x1003);
        assert!(matches!(past, PointerError::PastAllocation { runtime: "ROCm", .. }));
        let agent = refused(&hsa, stub, export, 0x1004);
        assert!(matches!(agent, PointerError::NotExportable { runtime: "ROCm", .. }));
        let (at, code, name) = call(refused(&hsa, stub, export, 0x1000));
        assert_eq!((at, code), (export, 0x1000));
        assert!(name.starts_with("HSA_STATUS_ERROR:"), "{name}");
        assert_eq!(call(refused(&hsa, stub, "hsa_amd_pointer_info", 0x1000)).0, "hsa_amd_pointer_info");
        stub.refuse("hsa_init", 0x1008);
        let message = assert_refused!(Hsa::load(), Error::Pointer(PointerError::NoDevice { .. }));
        assert!(message.contains("rocminfo"), "{message}");
    });
    let stub = &*ZE;
    clean(stub, || {
        let ze = LevelZero::load().unwrap();
        let (at, code, name) = call(refused(&ze, stub, "zeMemGetAddressRange", 0x7800_0004));
        assert_eq!(
            (at, code, name.as_str()),
            ("zeMemGetAddressRange", 0x7800_0004, "ZE_RESULT_ERROR_INVALID_ARGUMENT")
        );
        stub.refuse("zeInit", 0x7800_0001);
        let message = assert_refused!(LevelZero::load(), Error::Pointer(PointerError::NoDevice { .. }));
        assert!(message.contains("ZE_AFFINITY_MASK"), "{message}");
    });
}

/// If this user may not open a node, the error names it; the runtime only reports that it has no device.
#[test]
fn a_forbidden_device_node_is_named() {
    // Whatever GPUs this machine has: a file of root's serves, because the library only opens it.
    let (cuda, hsa, ze) = (&*CUDA, &*HSA, &*ZE);
    let refused = |node, load: &(dyn Fn() -> Result<(), Error> + Sync)| {
        let refused = with_forbidden_node(node, load);
        assert_refused!(refused, Error::NotPermitted { .. })
    };
    cuda.refuse("cuInit", 100);
    let message = refused("/dev/nvidiactl", &|| Cuda::load().map(drop));
    assert!(message.starts_with("no permission to open /dev/nvidiactl: join the group"), "{message}");
    hsa.refuse("hsa_init", 0x1008);
    let message = refused("/dev/kfd", &|| Hsa::load().map(drop));
    assert!(message.starts_with("no permission to open /dev/kfd: join the group render"), "{message}");
    ze.refuse("zeInit", 0x7800_0001);
    let message = refused("/dev/dri/renderD128", &|| LevelZero::load().map(drop));
    assert!(message.starts_with("no permission to open /dev/dri/renderD128"), "{message}");
}

#[test]
fn running_out_of_descriptors_is_reported() {
    each(|gpu, _| {
        let memory = gpu.memory(1 << 20).unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // The limit is one above the highest open descriptor; the loop below uses up the numbers under it.
        let highest = std::fs::read_dir("/proc/self/fd").unwrap();
        let highest =
            highest.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u64>().ok()).max();
        let mut taken = Vec::new();
        setrlimit(Resource::RLIMIT_NOFILE, highest.unwrap() + 1, hard).unwrap();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            taken.push(file);
        }
        let refused = gpu.export_at(memory.address(), 4096);
        drop(taken);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        let message = assert_refused!(refused, PointerError::OutOfDescriptors { .. });
        assert!(message.contains("ulimit -n"), "{message}");
        assert_eq!(refused.unwrap_err().errno(), Some(libc::EMFILE));
    });
}

#[test]
fn small_allocations_of_cuda_share_a_page_and_come_out_exact() {
    let stub = &*CUDA;
    let cuda = Cuda::load().unwrap();
    // SAFETY: the types of cuda.h and of the stub's source.
    let (context, push, pop, alloc, free) = unsafe {
        (
            stub.function::<unsafe extern "C" fn(i32) -> usize>("stub_context")(1),
            stub.function::<unsafe extern "C" fn(usize) -> i32>("cuCtxPushCurrent_v2"),
            stub.function::<unsafe extern "C" fn(*mut usize) -> i32>("cuCtxPopCurrent_v2"),
            stub.function::<unsafe extern "C" fn(*mut u64, usize) -> i32>("cuMemAlloc_v2"),
            stub.function::<unsafe extern "C" fn(u64) -> i32>("cuMemFree_v2"),
        )
    };
    clean(stub, || {
        let in_context = |run: &dyn Fn()| {
            let mut popped = 0;
            // SAFETY: the context is the stub's.
            unsafe { assert_eq!(push(context), 0) };
            run();
            // SAFETY: as above.
            unsafe { assert_eq!((pop(&raw mut popped), popped), (0, context)) };
        };
        let addresses = std::cell::RefCell::new([0_u64; 3]);
        in_context(&|| {
            for (address, size) in addresses.borrow_mut().iter_mut().zip([700, 5000, 100]) {
                // SAFETY: writes one address.
                unsafe { assert_eq!(alloc(address, size), 0) };
            }
        });
        let [first, second, third] = addresses.into_inner();
        assert_eq!((second - first, third - first), (1024, 6144));
        // No context is current now. The export must make the memory's own one current, which is no primary one.
        let exported = cuda.export_at(second + 10, 4990).unwrap();
        let [part] = exported.as_slice() else { panic!("one allocation, {exported:?}") };
        assert_eq!((part.range(), part.memory(), part.dmabuf.size()), (1034..6024, 1024..6024, 8192));
        assert_refused!(cuda.export_at(second + 10, 4991), PointerError::PastAllocation { size: 5000, .. });
        in_context(&|| {
            for address in [first, second, third] {
                // SAFETY: allocated above.
                unsafe { assert_eq!(free(address), 0) };
            }
        });
    });
}

#[test]
fn level_zero_hands_out_one_descriptor_and_keeps_it() {
    let stub = &*ZE;
    clean(stub, || {
        let ze = LevelZero::load().unwrap();
        let memory = ze.memory(1 << 20).unwrap();
        let one = ze.export_at(memory.address(), 1).unwrap();
        let other = ze.export_at(memory.address() + 4096, 1).unwrap();
        assert_eq!(one[0].dmabuf.id(), other[0].dmabuf.id());
        drop(one);
        assert_eq!(other[0].dmabuf.map().unwrap().len(), 1 << 20, "the other descriptor is open");
    });
}

#[test]
fn a_runtime_that_is_missing_or_too_old_is_named() {
    let program = crate::common::system::example("gpu_send");
    // A file that is no library hides the machine's own.
    let none = std::env::temp_dir().join("no-runtimes");
    std::fs::create_dir_all(&none).unwrap();
    for library in ["libcuda.so.1", "libhsa-runtime64.so.1", "libze_loader.so.1", "libvulkan.so.1"] {
        std::fs::write(none.join(library), "").unwrap();
    }
    let said = |exporter: &str, folder: &Path| {
        let mut command = Command::new(&program);
        let output = command.args(["--exporter", exporter]).env("LD_LIBRARY_PATH", folder).output().unwrap();
        assert!(!output.status.success(), "{exporter} with {folder:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for (exporter, library, symbol, since) in [
        ("cuda", "libcuda.so.1", "cuMemGetHandleForAddressRange", "CUDA 11.7"),
        ("hsa", "libhsa-runtime64.so.1", "hsa_amd_portable_export_dmabuf", "ROCm 5.6"),
        ("level-zero", "libze_loader.so.1", "zeMemGetAddressRange", "version 1.0"),
    ] {
        let missing = said(exporter, &none);
        assert!(missing.contains(&format!("because {library} cannot be loaded: install")), "{missing}");
        assert!(missing.contains("file too short"), "{missing}");
        let old = said(exporter, Path::new(gpu_stubs::OLD_FOLDER));
        assert!(old.contains(&format!("lacks {symbol}, added in {since}")), "{old}");
    }
    let missing = said("vulkan", &none);
    assert!(missing.contains("because libvulkan.so.1 cannot be loaded"), "{missing}");
    std::fs::remove_dir_all(none).unwrap();
}

#[test]
fn gpu_send_sends_memory_of_every_exporter() {
    let program = crate::common::system::example("gpu_send");
    // The stubs, and the Vulkan libraries that `cargo xtask test` installs.
    let mut libraries = OsString::from(gpu_stubs::FOLDER);
    if let Some(others) = std::env::var_os("LD_LIBRARY_PATH") {
        libraries.push(":");
        libraries.push(others);
    }
    drop((card("virtio_gpu"), vivid()));
    for exporter in ["cuda", "hsa", "level-zero", "vulkan", "gbm", "v4l2", "heap", "udmabuf"] {
        let mut command = Command::new(&program);
        command.args(["--exporter", exporter, "--size", "1M"]).env("LD_LIBRARY_PATH", &libraries);
        let output = command.output().unwrap();
        let (text, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains("verified"), "{exporter}: {text}{errors}");
    }
}
