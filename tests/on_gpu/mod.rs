//! The drivers of this machine's own GPUs: `cargo xtask test --gpu`. Without a GPU, these tests fail.
//!
//! The same cases run in the guest with the stubs in place of the drivers. What a driver may do in one way or another
//! goes into the report.

mod mapped;
mod registered;

use dmabuf_rdma::exporter::{Cuda, Error, ExportOptions, Exporter, Extent, Hsa, LevelZero, PointerError};
use dmabuf_rdma::exporter::{Runtime, Runtimes};

use crate::common::cuda::Driver;
use crate::common::gpu::{self, Gpu};
use crate::common::report::say;

/// The runtimes of this machine that have a device.
fn gpus() -> Vec<Box<dyn Gpu>> {
    fn boxed<R: Gpu + 'static>(loaded: Result<R, Error>) -> Result<Box<dyn Gpu>, Error> {
        loaded.map(|runtime| Box::new(runtime) as Box<dyn Gpu>)
    }
    let (mut gpus, mut reasons) = (Vec::new(), Vec::new());
    for loaded in [boxed(Cuda::load()), boxed(Hsa::load()), boxed(LevelZero::load())] {
        match loaded {
            Ok(gpu) => gpus.push(gpu),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    assert!(!gpus.is_empty(), "`--gpu` needs a GPU and its driver:\n{}", reasons.join("\n"));
    gpus
}

/// CUDA with each of its GPUs, if this machine has one.
fn each_cuda(run: impl Fn(&Cuda, Driver, i32)) {
    gpus();
    let Ok(cuda) = Cuda::load() else { return };
    for ordinal in 0..cuda.devices().len() {
        let cuda = cuda.clone().with_device(ordinal).unwrap();
        run(&cuda, Driver::loaded(), ordinal as i32);
    }
}

fn first_line(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.lines().next()?.trim().to_string())
}

/// First by its name, so that the report begins with it.
#[test]
fn a_machine() {
    for (what, path) in [
        ("kernel", "/proc/sys/kernel/osrelease"),
        ("NVIDIA's module", "/proc/driver/nvidia/version"),
        ("amdgpu's module", "/sys/module/amdgpu/version"),
    ] {
        say(&format!("machine: {what}: {}", first_line(path).as_deref().unwrap_or("none")));
    }
    let devices = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten();
    let devices: Vec<_> = devices.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    say(&format!("machine: RDMA devices: {}", devices.join(" ")));
    say(&format!(
        "machine: nvidia_peermem loaded: {}",
        std::path::Path::new("/sys/module/nvidia_peermem").exists()
    ));
    say(&format!("machine: page size: {}", dma_sg::page_size()));
    for gpu in gpus() {
        say(&format!("machine: runtime: {}", Runtime::name(gpu.as_ref())));
    }
    each_cuda(|cuda, driver, ordinal| {
        let address = cuda.devices().nth(ordinal as usize).flatten();
        let address = address.map_or("no PCI address".into(), |address| address.to_string());
        say(&format!(
            "machine: GPU {ordinal}: {}, {address}, driver API {}",
            driver.name(ordinal),
            driver.version()
        ));
        for (attribute, name) in [
            (116, "GPU_DIRECT_RDMA_SUPPORTED"),
            (124, "DMA_BUF_SUPPORTED"),
            (110, "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED"),
            (117, "GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS"),
            (118, "GPU_DIRECT_RDMA_WRITES_ORDERING"),
        ] {
            let value =
                driver.attribute(ordinal, attribute).map_or("unknown".into(), |value| value.to_string());
            say(&format!("machine: GPU {ordinal}: attribute {attribute}, {name}: {value}"));
        }
        assert!(address.contains(':'), "the driver reports a PCI address");
    });
}

#[test]
fn sub_allocations_come_out_exact() {
    gpus().iter().for_each(|gpu| gpu::sub_allocations_come_out_exact(gpu.as_ref()));
}

#[test]
fn wrong_pointers_are_refused() {
    gpus().iter().for_each(|gpu| gpu::wrong_pointers_are_refused(gpu.as_ref()));
}

#[test]
fn exports_leave_no_descriptors() {
    gpus().iter().for_each(|gpu| gpu::exports_leave_no_descriptors(gpu.as_ref()));
}

#[test]
fn allocates() {
    gpus().iter().for_each(|gpu| gpu::allocates(gpu.as_ref()));
}

#[test]
fn an_allocation_has_an_identity_of_its_own() {
    for gpu in gpus() {
        let gpu = gpu.as_ref();
        let (one, other) = (gpu.memory(2 << 20).unwrap(), gpu.memory(2 << 20).unwrap());
        let id = |address| gpu.find(address).unwrap().unwrap().id;
        let Some(before) = id(one.address()) else {
            say(&format!("note: {} has no number for an allocation", Runtime::name(gpu)));
            continue;
        };
        assert_eq!(id(one.address() + 4096), Some(before));
        assert_ne!(id(other.address()), Some(before));
        drop(one);
        let again = gpu.memory(2 << 20).unwrap();
        assert_ne!(id(again.address()), Some(before), "{}: a number is not used again", Runtime::name(gpu));
    }
}

#[test]
fn the_loaded_drivers_find_their_memory() {
    for gpu in gpus() {
        let gpu = gpu.as_ref();
        let memory = gpu.memory(1 << 20).unwrap();
        let all = Runtimes::loaded().unwrap();
        assert!(all.names().any(|name| name == Runtime::name(gpu)));
        let info = all.find(memory.address()).unwrap().unwrap();
        assert_eq!((info.base, info.runtime), (memory.address(), Runtime::name(gpu)));
        assert!(Exporter::name(gpu).contains(" device 0"));
    }
}

/// Sub-ranges of one allocation, the PCIe mapping, SYNC_MEMOPS and flushes: a driver has them or not.
#[test]
fn what_the_drivers_have() {
    for gpu in gpus() {
        let (gpu, name) = (gpu.as_ref(), Runtime::name(gpu.as_ref()));
        let memory = gpu.memory(8 << 20).unwrap();
        let info = gpu.find(memory.address() + (4 << 20) + 100).unwrap().unwrap();
        let export = |options| gpu.export(&info, 1000, options).unwrap().remove(0);
        let range = export(ExportOptions::default());
        say(&format!("note: {name}: 1000 bytes were exported as a dma-buf of {} bytes", range.dmabuf.size()));
        let whole = export(ExportOptions::default().extent(Extent::Allocation));
        assert_eq!(whole.memory(), 0..8 << 20, "{name}");
        say(&format!("note: {name}: SYNC_MEMOPS: {}", range.sync_memops));
        let pcie = export(ExportOptions::default().pcie(true)).pcie;
        say(&format!("note: {name}: mapping through the PCIe BAR beside another: {pcie}"));
        say(&format!("note: {name}: the driver flushes: {}", gpu.flush(&info).unwrap()));
        let again = export(ExportOptions::default());
        let same =
            if again.dmabuf.id() == range.dmabuf.id() { "the same dma-buf" } else { "another dma-buf" };
        say(&format!("note: {name}: a second export is {same}"));
    }
}

/// Kinds of CUDA's memory that are refused, or that depend on the driver.
#[test]
fn other_kinds_of_memory() {
    each_cuda(|cuda, driver, ordinal| {
        driver.inside(ordinal, || {
            for (allocate, free, argument, name) in [
                ("cuMemAllocManaged", "cuMemFree_v2", 1, "managed"),
                ("cuMemAllocHost_v2", "cuMemFreeHost", 0, "host"),
                ("cuMemAllocAsync", "cuMemFreeAsync", 0, "pool"),
            ] {
                let address = match driver.allocate(allocate, 2 << 20, argument) {
                    Ok(address) => address,
                    Err(reason) => {
                        say(&format!("note: GPU {ordinal}: no {name} memory: {reason}"));
                        continue;
                    }
                };
                let found = cuda.find(address).unwrap().expect("its own memory");
                let exported = cuda.export_at(address + 64, 4096);
                say(&format!(
                    "note: GPU {ordinal}: {name} memory: {}: {:?}",
                    found.kind,
                    exported.as_ref().map(Vec::len)
                ));
                match (name, exported) {
                    ("pool", Ok(exported)) => assert_eq!(exported[0].len(), 4096),
                    ("pool", Err(PointerError::NotExportable { .. })) => {}
                    ("managed" | "host", Err(PointerError::WrongKind { .. })) => {}
                    (_, other) => panic!("{name}: {other:?}"),
                }
                driver.free(free, address);
            }
        });
    });
}
