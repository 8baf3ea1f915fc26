//! Wrong pointers, and drivers that answer with nonsense: a named error, and no descriptor left.

use dma_sg::RangeError;
use dmabuf_rdma::exporter::{Cuda, ExportOptions, Extent, PointerError, Runtime};
use dmabuf_rdma::mr::{Access, RegionCache, RegisterError};
use gpu_stubs::{Nonsense, Stub};

use super::{CUDA, clean, each};
use crate::assert_refused;
use crate::common::census::{fds, regions};
use crate::common::gpu::Gpu;
use crate::common::peers::domain;

const MIB: u64 = 1 << 20;

/// Exports in both extents and registers through a cache; each must fail in the same way, and leave nothing.
#[track_caller]
fn refused(gpu: &dyn Runtime, address: u64, length: u64, expected: &dyn Fn(&PointerError) -> bool) {
    let (domain, cache) = (domain(), RegionCache::default());
    let (open, before) = (fds(), regions());
    let export = |extent| {
        let info = gpu.locate(address)?;
        gpu.export(&info, length, ExportOptions::default().extent(extent))
    };
    for extent in [Extent::Range, Extent::Allocation] {
        let error = export(extent).unwrap_err();
        assert!(expected(&error), "{extent:?}: {error:?}");
    }
    let error = gpu.export_at(address, length).unwrap_err();
    assert!(expected(&error), "{error:?}");
    match cache.get_pointer(&domain, gpu, address, length, Access::REMOTE) {
        Err(RegisterError::Pointer(error)) => assert!(expected(&error), "{error:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!((fds(), regions(), cache.gauges().entries), (open, before, 0));
}

#[test]
fn lengths_that_no_memory_has() {
    each(|gpu, _| {
        let memory = gpu.memory(4 * MIB).unwrap();
        let address = memory.address() + 4096;
        refused(gpu, address, 0, &|error| {
            matches!(error, PointerError::Range(RangeError::Empty { offset: 4096 }))
        });
        for length in [4 * MIB - 4095, 1 << 63, (1 << 63) - 1, u64::MAX, u64::MAX - address] {
            refused(
                gpu,
                address,
                length,
                &|error| matches!(error, PointerError::PastAllocation { length: of, .. } if *of == length),
            );
        }
    });
}

#[test]
fn pointers_that_were_freed() {
    each(|gpu, _| {
        let memory = gpu.memory(2 * MIB).unwrap();
        let (address, name) = (memory.address(), Runtime::name(gpu));
        let info = gpu.find(address).unwrap().unwrap();
        drop(memory);
        refused(
            gpu,
            address,
            64,
            &|error| matches!(error, PointerError::ForeignPointer { runtime, .. } if *runtime == name),
        );
        let open = fds();
        assert_refused!(gpu.export(&info, 64, ExportOptions::default()), PointerError::Freed { .. });
        assert_refused!(gpu.export_at(0, 64), PointerError::NullPointer);
        assert_eq!(fds(), open);
    });
}

/// Another allocation of the same size took the address between the look-up and the export.
#[test]
fn an_address_that_was_allocated_anew_after_the_look_up() {
    each(|gpu, stub| {
        stub.reuse(true);
        let memory = gpu.memory(2 * MIB).unwrap();
        let info = gpu.find(memory.address()).unwrap().unwrap();
        drop(memory);
        let memory = gpu.memory(2 * MIB).unwrap();
        assert_eq!(memory.address(), info.address);
        assert_refused!(gpu.export(&info, 64, ExportOptions::default()), PointerError::Freed { .. });
        gpu.export_at(memory.address(), 64).unwrap();
        drop(memory);
        stub.reuse(false);
    });
}

#[test]
fn allocations_of_two_devices_side_by_side() {
    clean(&CUDA, || {
        CUDA.reuse(true);
        let cuda = Cuda::load().unwrap();
        let sizes = [0, 1].map(|device| cuda.clone().with_device(device).unwrap().memory(4 * MIB).unwrap());
        let [first, second] = &sizes;
        assert_eq!(first.address() + 4 * MIB, second.address(), "side by side");
        refused(
            &cuda,
            first.address() + 4 * MIB - 4096,
            8192,
            &|error| matches!(error, PointerError::PastAllocation { size, .. } if *size == 4 * MIB),
        );
        drop(sizes);
        CUDA.reuse(false);
    });
}

/// An application's context, destroyed with its memory: before the look-up, after it, and during the export.
#[test]
fn contexts_that_were_destroyed() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        // SAFETY: the types in the stub's source.
        let (context, destroy) = unsafe {
            (
                CUDA.function::<unsafe extern "C" fn(i32) -> usize>("stub_context"),
                CUDA.function::<unsafe extern "C" fn(i32)>("stub_destroy_context"),
            )
        };
        // SAFETY: as above.
        assert_ne!(unsafe { context(0) }, 0);
        let pooled = super::other(&CUDA, 1);
        let info = cuda.find(pooled).unwrap().unwrap();
        // SAFETY: as above.
        unsafe { destroy(0) };
        let refused_after = cuda.export(&info, 64, ExportOptions::default());
        assert_refused!(refused_after, PointerError::WrongKind { .. });
        refused(&cuda, pooled, 64, &|error| matches!(error, PointerError::ForeignPointer { .. }));

        let memory = cuda.memory(2 * MIB).unwrap();
        CUDA.refuse_times("cuCtxPushCurrent", 709, 4);
        refused(&cuda, memory.address(), 64, &|error| {
            matches!(error, PointerError::Freed { runtime: "CUDA", .. })
        });
        CUDA.refuse_times("", 0, 0);
        // SAFETY: as above. Makes the context anew.
        unsafe { context(0) };
    });
}

#[test]
fn drivers_that_succeed_with_nonsense() {
    struct Sense<'a>(&'a Stub);
    impl Drop for Sense<'_> {
        fn drop(&mut self) {
            self.0.nonsense(Nonsense::No);
        }
    }
    let nonsense = |stub: &Stub, which: Nonsense, run: &dyn Fn()| {
        // Also if the test fails.
        let _sense = Sense(stub);
        stub.nonsense(which);
        run();
    };
    let invalid = |error: &PointerError| {
        let named = matches!(error, PointerError::InvalidAnswer { .. });
        assert!(!named || error.to_string().contains("report this to the vendor"), "{error}");
        named
    };
    each(|gpu, stub| {
        let memory = gpu.memory(2 * MIB).unwrap();
        let address = memory.address() + 4096;
        for which in [Nonsense::SizeZero, Nonsense::BaseAbove] {
            nonsense(stub, which, &|| refused(gpu, address, 64, &invalid));
        }
        // A dma-buf of one page, for an address in the second and a range of two.
        nonsense(stub, Nonsense::ShortBuffer, &|| {
            // Level Zero's driver keeps the descriptor of its first export.
            assert!(invalid(&gpu.export_at(address, 8192).unwrap_err()));
            refused(gpu, address, 8192, &invalid);
        });
    });
    // Success without a descriptor.
    each(|gpu, stub| {
        let memory = gpu.memory(2 * MIB).unwrap();
        stub.export_nothing(true);
        refused(gpu, memory.address(), 64, &|error| matches!(error, PointerError::NotExportable { .. }));
        stub.export_nothing(false);
        gpu.export_at(memory.address(), 64).unwrap();
    });
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        let memory = super::mapped::Reservation::mapped(2, 0);
        nonsense(&CUDA, Nonsense::RangeElsewhere, &|| refused(&cuda, memory.base, 64, &invalid));
    });
}

/// 801 ends the export at once; EINVAL and an exhausted window lead to the next way; all others are named.
#[test]
fn refusals_of_the_export_fall_back_or_are_named() {
    clean(&CUDA, || {
        let (call, cuda) = ("cuMemGetHandleForAddressRange", Cuda::load().unwrap());
        let memory = cuda.memory(4 * MIB).unwrap();
        let info = cuda.find(memory.address() + 5000).unwrap().unwrap();
        let export = |extent| cuda.export(&info, 64, ExportOptions::default().extent(extent));
        for code in [1, 2] {
            CUDA.refuse(call, code);
            assert_eq!(export(Extent::Range).unwrap()[0].dmabuf.size(), 4 * MIB, "the allocation instead");
            CUDA.refuse(call, code);
            assert_eq!(export(Extent::Allocation).unwrap()[0].dmabuf.size(), 4096, "the range instead");
        }
        let open = fds();
        CUDA.refuse_times(call, 1, 2);
        let message = assert_refused!(export(Extent::Range), PointerError::NotExportable { .. });
        assert!(message.contains("CUDA_ERROR_INVALID_VALUE"), "{message}");
        CUDA.refuse_times(call, 2, 2);
        let message = assert_refused!(export(Extent::Range), PointerError::RuntimeCall { .. });
        assert!(message.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{message}");
        for (code, calls) in [(801, 1), (999, 1)] {
            CUDA.refuse_times(call, code, calls);
            let error = export(Extent::Range).unwrap_err();
            assert_eq!(matches!(error, PointerError::NotExportable { .. }), code == 801, "{error:?}");
        }
        // The PCIe mapping is asked for once, and falls back to the driver's own.
        for code in [801, 1] {
            CUDA.set("pcie", 1);
            let pcie = ExportOptions::default().pcie(true);
            assert!(cuda.export(&info, 64, pcie).unwrap()[0].pcie);
            CUDA.refuse(call, code);
            assert!(!cuda.export(&info, 64, pcie).unwrap()[0].pcie);
            CUDA.set("pcie", 0);
            assert!(!cuda.export(&info, 64, pcie).unwrap()[0].pcie);
        }
        assert_eq!(fds(), open);
    });
}

/// A buffer with the PCIe mapping is registered for Data Direct or not at all.
#[test]
fn the_pcie_mapping_is_registered_by_no_other_path() {
    use dmabuf_rdma::mr::{MemoryRegion, Path};
    clean(&CUDA, || {
        let (cuda, domain) = (Cuda::load().unwrap(), domain());
        let memory = cuda.memory(MIB).unwrap();
        CUDA.set("pcie", 1);
        let info = cuda.find(memory.address()).unwrap().unwrap();
        let exported = cuda.export(&info, 64, ExportOptions::default().pcie(true)).unwrap();
        CUDA.set("pcie", 0);
        let builder = || MemoryRegion::builder(&domain, &exported[0].dmabuf);
        let message = assert_refused!(builder().register(), RegisterError::NoPath { .. });
        assert!(message.contains("which only DataDirect can use"), "{message}");
        assert_refused!(
            builder().paths(&[Path::Verbs, Path::Uverbs]).register(),
            RegisterError::NoPath { .. }
        );
        // No device here has a data-direct function.
        let all = builder().paths(&[Path::Uverbs, Path::DataDirect]).register();
        assert_refused!(all, RegisterError::Verbs(_));
        // A duplicate of the descriptor is the same.
        let copy = exported[0].dmabuf.try_clone().unwrap();
        assert_refused!(MemoryRegion::builder(&domain, &copy).register(), RegisterError::NoPath { .. });
    });
}
