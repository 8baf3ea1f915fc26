//! Kinds of memory: each is exported right, or refused with its name and what to use instead.

use dmabuf_rdma::exporter::{
    Cuda, ExportOptions, Hsa, LevelZero, MemoryKind, PointerError, PointerInfo, Runtime,
};
use gpu_stubs::Stub;

use super::{CUDA, HSA, ZE, clean, other};
use crate::assert_refused;
use crate::common::gpu::Gpu;

fn free(stub: &Stub, address: u64) {
    // SAFETY: the type in the stub's source.
    unsafe { stub.function::<unsafe extern "C" fn(u64)>("stub_free")(address) };
}

/// Looks up memory of another kind and exports it.
fn kind(
    stub: &Stub,
    runtime: &dyn Runtime,
    number: i32,
    kind: MemoryKind,
    check: impl Fn(PointerInfo, Result<Vec<dmabuf_rdma::exporter::ExportedRange>, PointerError>),
) {
    let address = other(stub, number);
    let info = runtime.find(address + 8).unwrap().unwrap();
    assert_eq!((info.kind, info.base, info.size), (kind, address, 1 << 20));
    check(info, runtime.export(&info, 64, ExportOptions::default()));
    free(stub, address);
}

#[track_caller]
fn wrong_kind<T: std::fmt::Debug>(answer: Result<T, PointerError>, texts: &[&str]) {
    let message = assert_refused!(answer, PointerError::WrongKind { .. });
    for text in texts {
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn cuda() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        kind(&CUDA, &cuda, 0, MemoryKind::Host, |info, refused| {
            // cudaMallocHost and cudaHostRegister.
            assert_eq!(info.device, None);
            wrong_kind(refused, &["is host memory of CUDA", "make a udmabuf of it"]);
        });
        kind(&CUDA, &cuda, 1, MemoryKind::Managed, |_, refused| {
            wrong_kind(refused, &["is managed memory of CUDA", "allocate device memory and copy"]);
        });
        kind(&CUDA, &cuda, 2, MemoryKind::Pool, |info, refused| {
            // cudaMallocAsync, and memory nodes of graphs.
            assert!(info.device.is_some());
            let message = assert_refused!(refused, PointerError::NotExportable { .. });
            assert!(message.contains("cudaMallocAsync") && message.contains("use cudaMalloc"), "{message}");
        });
        // A driver that exports pools.
        CUDA.set("pools", 1);
        kind(&CUDA, &cuda, 2, MemoryKind::Pool, |_, exported| {
            let exported = exported.unwrap();
            assert_eq!((exported.len(), exported[0].range()), (1, 8..72));
            assert!(exported[0].sync_memops, "the context has the flag, since the memory does not take it");
        });
        CUDA.set("pools", 0);
        // cuIpcOpenMemHandle: the driver does not tell it from its own, and does not export it.
        kind(&CUDA, &cuda, 3, MemoryKind::Device, |_, refused| {
            let message = assert_refused!(refused, PointerError::NotExportable { .. });
            assert!(message.contains("another process allocated: export it there"), "{message}");
        });
    });
}

#[test]
fn rocm() {
    clean(&HSA, || {
        let hsa = Hsa::load().unwrap();
        kind(&HSA, &hsa, 0, MemoryKind::Host, |info, refused| {
            assert_eq!((info.id, info.device), (None, None));
            wrong_kind(refused, &["is host memory of ROCm"]);
        });
        kind(&HSA, &hsa, 2, MemoryKind::Imported, |info, refused| {
            assert!(info.id.is_none() && info.device.is_some());
            wrong_kind(
                refused,
                &["is imported device memory of ROCm", "send the descriptor over a Unix socket"],
            );
        });
        kind(&HSA, &hsa, 3, MemoryKind::Virtual, |info, refused| {
            assert!(info.id.is_none() && info.device.is_some());
            wrong_kind(refused, &["is memory mapped into reserved addresses of ROCm", "allocate other"]);
        });
        // hipHostMalloc: fine-grained memory of the host.
        kind(&HSA, &hsa, 4, MemoryKind::Host, |_, refused| wrong_kind(refused, &["host memory of ROCm"]));
        // hipExtMallocWithFlags: fine-grained memory of the GPU is exported as coarse-grained is.
        kind(&HSA, &hsa, 5, MemoryKind::Device, |info, exported| {
            assert!(info.id.is_some());
            assert_eq!(exported.unwrap()[0].range(), 8..72);
        });
    });
}

#[test]
fn level_zero() {
    clean(&ZE, || {
        let ze = LevelZero::load().unwrap();
        kind(&ZE, &ze, 0, MemoryKind::Host, |info, refused| {
            assert_eq!(info.device, None);
            wrong_kind(refused, &["is host memory of Level Zero"]);
        });
        kind(&ZE, &ze, 1, MemoryKind::Managed, |_, refused| {
            wrong_kind(refused, &["is managed memory of Level Zero"]);
        });
    });
}

/// Memory of a device that another device has mapped belongs to the first, whatever context is current.
#[test]
fn memory_that_a_peer_maps_is_of_its_owner() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        let [first, second] = [0, 1].map(|device| cuda.clone().with_device(device).unwrap());
        let (ours, theirs) = (first.memory(1 << 20).unwrap(), second.memory(1 << 20).unwrap());
        // SAFETY: the types in the stub's source and in cuda.h; each pushed context is popped.
        let (context, push, pop) = unsafe {
            (
                CUDA.function::<unsafe extern "C" fn(i32) -> usize>("stub_context")(0),
                CUDA.function::<unsafe extern "C" fn(usize) -> i32>("cuCtxPushCurrent_v2"),
                CUDA.function::<unsafe extern "C" fn(*mut usize) -> i32>("cuCtxPopCurrent_v2"),
            )
        };
        let mut popped = 0;
        // SAFETY: as above.
        assert_eq!(unsafe { push(context) }, 0);
        for (memory, device) in [(&ours, "0000:3b:00.0"), (&theirs, "0001:5e:00.0")] {
            let info = first.find(memory.address()).unwrap().unwrap();
            assert_eq!(info.device.unwrap().to_string(), device);
            let exported = first.export_at(memory.address(), 4096).unwrap();
            assert_eq!(exported[0].dmabuf.pci_device(), info.device);
        }
        // SAFETY: as above.
        assert_eq!((unsafe { pop(&raw mut popped) }, popped), (0, context), "still current");
    });
}

/// Two instances of one divided GPU are two devices with one PCI address.
#[test]
fn instances_of_a_divided_gpu() {
    clean(&CUDA, || {
        CUDA.set("mig", 1);
        let cuda = Cuda::load().unwrap();
        CUDA.set("mig", 0);
        let addresses: Vec<_> = cuda.devices().map(|address| address.unwrap().to_string()).collect();
        assert_eq!(addresses, ["0000:3b:00.0"; 2]);
        let memory = cuda.with_device(1).unwrap().memory(1 << 20).unwrap();
        let other = Cuda::load().unwrap();
        assert_eq!(other.export_at(memory.address() + 4, 8).unwrap()[0].range(), 4..12);
    });
}
