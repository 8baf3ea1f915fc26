//! Registrations by pointer, through the cache.

use dmabuf_rdma::exporter::{Cuda, Extent, LevelZero, PointerError, Runtime, Runtimes};
use dmabuf_rdma::mr::{Access, CacheOptions, Path, RegionCache, RegionSlice, RegisterError};
use dmabuf_rdma::verbs::Operation;
use gpu_stubs::Stub;

use super::mapped::{PART, Reservation};
use super::{CUDA, HSA, ZE, clean, each, other};
use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::{fds, regions};
use crate::common::gpu::{self, Gpu};
use crate::common::peers::{Peers, domain};
use crate::common::{assert_same, contents};

const MIB: u64 = 1 << 20;

/// A peer reads the slice.
fn read(peers: &Peers, slice: &RegionSlice) -> Vec<u8> {
    let target = heap(slice.len());
    let region = peers.register(&target);
    let mut at = 0;
    for run in slice.remote().runs() {
        let remote = slice.remote().slice(at..at + run.length).unwrap().addr().unwrap();
        peers.ours.succeed(Operation::Read { remote }, &[region.sge(at..at + run.length).unwrap()]);
        at += run.length;
    }
    contents(&target)[..slice.len() as usize].to_vec()
}

#[test]
fn ten_thousand_tensors_of_a_pool_are_one_region() {
    each(|gpu, stub| {
        let (domain, cache) = (domain(), RegionCache::default());
        let memory = gpu.memory(4 * MIB).unwrap();
        let (exports, before, lookups) = (stub.exports(), regions(), stub.lookups());
        // Tensors of 400 bytes, 512 bytes apart as PyTorch places them.
        for tensor in 0..10_000 {
            let address = memory.address() + tensor % 8192 * 512;
            let slice = cache.get_pointer(&domain, gpu, address, 400, Access::REMOTE).unwrap();
            assert_eq!(slice.len(), 400);
            assert_eq!(slice.iova().0, address - memory.address());
        }
        assert_eq!((stub.exports() - exports, regions() - before), (1, 1), "{}", Runtime::name(gpu));
        let gauges = cache.gauges();
        assert_eq!((gauges.hits, gauges.misses, gauges.entries, gauges.bytes), (9_999, 1, 1, 4 * MIB));
        // A hit is one look-up, and Level Zero's export asks once more than the others.
        let lookups = stub.lookups() - lookups;
        assert!((10_000..10_004).contains(&lookups), "{lookups} look-ups");
        assert_eq!(cache.invalidate_pointer(memory.address() + 5, 1), 1);
        assert_eq!(regions(), before);
    });
}

#[test]
fn bytes_of_a_tensor_cross_the_wire() {
    each(|gpu, _| {
        let (peers, cache) = (Peers::new(), RegionCache::default());
        let memory = gpu.memory(2 * MIB).unwrap();
        gpu::fill(&memory);
        for (offset, length) in [(0, 4096), (0x1_a340, 0x8_0004), (2 * MIB - 3, 3)] {
            let address = memory.address() + offset;
            let slice = cache.get_pointer(&peers.domain, gpu, address, length, Access::REMOTE).unwrap();
            assert_same(&read(&peers, &slice), &gpu::filled(offset, length), "a tensor");
        }
        assert_eq!(cache.gauges().misses, 1);
    });
}

/// Each export is a new dma-buf, and an address may be used again: neither is the identity.
#[test]
fn memory_at_an_address_used_again_is_other_memory() {
    fn check(gpu: &dyn Gpu, stub: &Stub, allocate: &dyn Fn() -> u64, free: &dyn Fn(u64)) {
        let (domain, cache) = (domain(), RegionCache::default());
        let mut keys = std::collections::HashSet::new();
        let mut seen = std::collections::HashMap::<u64, u32>::new();
        let before = (regions(), fds());
        for _ in 0..30 {
            let address = allocate();
            *seen.entry(address).or_default() += 1;
            let slice = cache.get_pointer(&domain, gpu, address, 4096, Access::REMOTE).unwrap();
            assert!(keys.insert(slice.region().rkey()), "a stale key");
            let again = cache.get_pointer(&domain, gpu, address, 4096, Access::REMOTE).unwrap();
            assert_eq!(again.region().rkey(), slice.region().rkey());
            free(address);
            assert_refused!(
                cache.get_pointer(&domain, gpu, address, 4096, Access::REMOTE),
                RegisterError::Pointer(PointerError::ForeignPointer { .. })
            );
        }
        assert_eq!(cache.gauges().hits, 30, "{}", Runtime::name(gpu));
        assert!(seen.values().any(|times| *times > 1), "the stub uses addresses again");
        // Entries of freed memory go when their addresses are used again.
        assert_eq!((regions() - before.0, fds() - before.1), (seen.len(), seen.len()));
        assert_eq!(cache.clear(), seen.len());
        assert_eq!(stub.misuse(), None);
    }
    each(|gpu, stub| {
        // The stub gives the lowest free addresses: each second allocation has those of the first.
        stub.reuse(true);
        let held = std::cell::RefCell::new(std::collections::HashMap::new());
        let allocate = || {
            let memory = gpu.memory(2 * MIB).unwrap();
            let address = memory.address();
            held.borrow_mut().insert(address, memory);
            address
        };
        check(gpu, stub, &allocate, &|address| drop(held.borrow_mut().remove(&address)));
        stub.reuse(false);
    });
}

/// A pool that grows, is unmapped in part and mapped anew, at the same addresses and with the same BUFFER_ID.
#[test]
fn a_segment_that_is_mapped_anew_is_other_memory() {
    clean(&CUDA, || {
        let (cuda, peers, cache) = (Cuda::load().unwrap(), Peers::new(), RegionCache::default());
        let memory = Reservation::empty(8);
        let get = |part: u64, length: u64| {
            cache.get_pointer(&peers.domain, &cuda, memory.part(part), length, Access::REMOTE).unwrap()
        };
        let figures = || (cache.gauges().hits, cache.gauges().misses, cache.gauges().entries);
        for part in 0..2 {
            memory.map(part, 0, true);
            memory.write(part, part as u8 + 1);
        }
        let id = cuda.find(memory.base).unwrap().unwrap().id;
        let (exports, before) = (CUDA.exports(), regions());
        assert_eq!(read(&peers, &get(0, PART)), vec![1; PART as usize]);
        assert_eq!(read(&peers, &get(1, PART)), vec![2; PART as usize]);
        assert_eq!((figures(), CUDA.exports() - exports), ((1, 1, 1), 1));
        // It grows: the new part misses, and one region in place of the old has all.
        memory.map(2, 0, true);
        memory.write(2, 3);
        assert_eq!(read(&peers, &get(2, PART)), vec![3; PART as usize]);
        get(0, 3 * PART);
        assert_eq!((figures(), regions() - before), ((2, 2, 1), 1));
        // It shrinks, and what is left is still the same.
        memory.unmap(2);
        get(0, 2 * PART);
        assert_eq!(figures(), (3, 2, 1));
        assert_refused!(
            cache.get_pointer(&peers.domain, &cuda, memory.part(1), PART + 1, Access::REMOTE),
            RegisterError::Pointer(PointerError::PastAllocation { .. })
        );
        // The second part gets other physical memory at the same address.
        memory.unmap(1);
        memory.map(1, 0, true);
        memory.write(1, 9);
        assert_eq!(cuda.find(memory.base).unwrap().unwrap().id, id, "the number does not tell");
        assert_eq!(read(&peers, &get(1, PART)), vec![9; PART as usize], "not the bytes of the old memory");
        assert_eq!(read(&peers, &get(0, PART)), vec![1; PART as usize]);
        assert_eq!((regions() - before, cache.gauges().entries), (1, 1));
        drop(cache);
        assert_eq!(regions(), before);
    });
}

/// A driver that does not export several mappings at once: one entry of several regions.
#[test]
fn pieces_are_one_entry() {
    clean(&CUDA, || {
        let (cuda, peers, cache) = (Cuda::load().unwrap(), Peers::new(), RegionCache::default());
        let memory = Reservation::mapped(3, 0);
        (0..3).for_each(|part| memory.write(part, part as u8 + 1));
        CUDA.set("spans", 0);
        let (exports, before) = (CUDA.exports(), regions());
        let get = |at, length| cache.get_pointer(&peers.domain, &cuda, at, length, Access::REMOTE).unwrap();
        let slice = get(memory.part(1) - 10, PART + 20);
        let expected = [[1; 10].as_slice(), &[2; PART as usize], &[3; 10]].concat();
        assert_same(&read(&peers, &slice), &expected, "three mappings");
        assert_eq!((CUDA.exports() - exports, regions() - before), (3, 3));
        assert_same(&read(&peers, &get(memory.part(1) - 2, 4)), &[1, 1, 2, 2], "a hit across two of them");
        assert_eq!((cache.gauges().hits, cache.gauges().entries), (1, 1));
        // Also with pieces, other memory at the same address is noticed.
        memory.unmap(1);
        memory.map(1, 0, true);
        memory.write(1, 7);
        assert_same(&read(&peers, &get(memory.part(1) - 2, 4)), &[1, 1, 7, 7], "mapped anew");
        CUDA.set("spans", 1);
    });
}

/// Several NICs import one dma-buf: the GPU maps it through its window once.
#[test]
fn several_devices_share_one_buffer() {
    each(|gpu, stub| {
        let (one, other, cache) = (domain(), domain(), RegionCache::default());
        let memory = gpu.memory(2 * MIB).unwrap();
        // Level Zero's driver makes one dma-buf of an allocation and keeps its descriptor.
        let kept = Runtime::name(gpu) == "Level Zero";
        let first = kept.then(|| gpu.export_at(memory.address(), 1).unwrap());
        drop(first);
        let (exports, before, open) = (stub.exports() - i32::from(kept), regions(), fds());
        let get = |domain, access| cache.get_pointer(domain, gpu, memory.address(), 4096, access).unwrap();
        let slices = [get(&one, Access::REMOTE), get(&other, Access::REMOTE), get(&one, Access::empty())];
        let buffers: std::collections::HashSet<_> =
            slices.iter().map(|slice| slice.region().umem().buffer()).collect();
        assert_eq!((stub.exports() - exports, regions() - before, buffers.len()), (1, 3, 1));
        assert_eq!(fds() - open, 1);
        assert_eq!(cache.invalidate_domain(&one), 2);
        // The last one keeps it.
        get(&one, Access::REMOTE);
        assert_eq!((stub.exports() - exports, cache.clear()), (1, 2));
        drop(slices);
        assert_eq!((regions(), fds()), (before, open));
    });
}

#[test]
fn ranges_of_an_arena_are_registered_alone_if_asked() {
    clean(&CUDA, || {
        let (cuda, domain) = (Cuda::load().unwrap(), domain());
        let cache = RegionCache::new(CacheOptions::default().extent(Extent::Range));
        let memory = cuda.memory(4 * MIB).unwrap();
        let get = |offset, length| {
            cache.get_pointer(&domain, &cuda, memory.address() + offset, length, Access::REMOTE).unwrap()
        };
        let slice = get(5000, 100);
        assert_eq!((slice.len(), slice.region().len()), (100, 100), "a peer reaches nothing else");
        assert_eq!(cache.gauges().bytes, 100);
        assert_eq!(get(5000, 50).region().rkey(), slice.region().rkey());
        get(4 * MIB - 1, 1);
        assert_eq!((cache.gauges().hits, cache.gauges().misses, cache.gauges().entries), (1, 2, 2));
        // An allocation that the limits have no room for is registered by ranges too.
        let small = RegionCache::new(CacheOptions::default().max_bytes(MIB));
        let slice = small.get_pointer(&domain, &cuda, memory.address(), 4096, Access::REMOTE).unwrap();
        assert_eq!(slice.region().len(), 4096);
        assert_refused!(
            small.get_pointer(&domain, &cuda, memory.address(), 2 * MIB, Access::REMOTE),
            RegisterError::CacheFull { .. }
        );
    });
}

/// Without a number or a handle there is no safe hit: the memory is exported each time, and its dma-buf found.
#[test]
fn memory_without_an_identity_is_exported_each_time() {
    clean(&HSA, || {
        HSA.set("callbacks", 0);
        let (hsa, domain, cache) =
            (dmabuf_rdma::exporter::Hsa::load().unwrap(), domain(), RegionCache::default());
        let memory = hsa.memory(MIB).unwrap();
        assert_eq!(hsa.find(memory.address()).unwrap().unwrap().id, None);
        let before = HSA.exports();
        for _ in 0..3 {
            let slice = cache.get_pointer(&domain, &hsa, memory.address() + 64, 64, Access::REMOTE).unwrap();
            assert_eq!((slice.len(), slice.iova().0), (64, 64));
        }
        assert_eq!(HSA.exports() - before, 3);
        HSA.set("callbacks", 1);
    });
}

#[test]
fn threads_that_miss_at_once_export_once() {
    clean(&CUDA, || {
        // The stubs are not thread-safe, so the library's calls are made one at a time.
        #[derive(Debug)]
        struct OneAtATime(Cuda, std::sync::Mutex<()>);
        impl Runtime for OneAtATime {
            fn name(&self) -> &'static str {
                Runtime::name(&self.0)
            }
            fn find(&self, address: u64) -> Result<Option<dmabuf_rdma::exporter::PointerInfo>, PointerError> {
                let _one = self.1.lock().unwrap();
                self.0.find(address)
            }
            fn export(
                &self,
                info: &dmabuf_rdma::exporter::PointerInfo,
                length: u64,
                options: dmabuf_rdma::exporter::ExportOptions,
            ) -> Result<Vec<dmabuf_rdma::exporter::ExportedRange>, PointerError> {
                let _one = self.1.lock().unwrap();
                self.0.export(info, length, options)
            }
        }
        let runtime = OneAtATime(Cuda::load().unwrap(), std::sync::Mutex::default());
        let (domain, cache) = (domain(), RegionCache::default());
        let memory = runtime.0.memory(4 * MIB).unwrap();
        let (exports, before) = (CUDA.exports(), regions());
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (runtime, domain, cache, address) = (&runtime, &domain, &cache, memory.address());
                scope.spawn(move || {
                    for tensor in 0..50 {
                        let address = address + (thread * 50 + tensor) * 8192;
                        cache.get_pointer(domain, runtime, address, 8192, Access::REMOTE).unwrap();
                    }
                });
            }
        });
        assert_eq!((CUDA.exports() - exports, regions() - before, cache.gauges().misses), (1, 1, 1));
    });
}

#[test]
fn refusals_of_every_step_reach_the_caller() {
    clean(&CUDA, || {
        let (cuda, domain, cache) = (Cuda::load().unwrap(), domain(), RegionCache::default());
        let memory = cuda.memory(MIB).unwrap();
        let (address, open, before) = (memory.address(), fds(), regions());
        let get = |length, access| cache.get_pointer(&domain, &cuda, address, length, access);
        for (length, empty) in [(0, true), (1 << 63, false), (u64::MAX, false), (3 * MIB, false)] {
            match get(length, Access::REMOTE) {
                Err(RegisterError::Pointer(PointerError::Range(_))) if empty => {}
                Err(RegisterError::Pointer(PointerError::PastAllocation { .. })) if !empty => {}
                other => panic!("{length}: {other:?}"),
            }
        }
        assert_refused!(get(1, Access::REMOTE_WRITE), RegisterError::LocalWriteMissing { .. });
        assert_refused!(
            get(1, Access::from_bits_retain(1 << 5)),
            RegisterError::AccessNotPermitted { device: None, .. }
        );
        CUDA.refuse("cuMemGetHandleForAddressRange", 801);
        assert_refused!(get(1, Access::REMOTE), RegisterError::Pointer(PointerError::NotExportable { .. }));
        let none = Runtimes::new(Vec::new());
        assert_refused!(
            cache.get_pointer(&domain, &none, address, 1, Access::REMOTE),
            RegisterError::Pointer(PointerError::WrongKind { runtime: None, .. })
        );
        let managed = other(&CUDA, 1);
        assert_refused!(
            cache.get_pointer(&domain, &cuda, managed, 1, Access::REMOTE),
            RegisterError::Pointer(PointerError::WrongKind { .. })
        );
        // SAFETY: the type in the stub's source.
        unsafe { CUDA.function::<unsafe extern "C" fn(u64)>("stub_free")(managed) };
        assert_eq!((fds(), regions(), cache.gauges().entries), (open, before, 0));
        // Nothing of that is remembered.
        get(1, Access::REMOTE).unwrap();
    });
}

/// A mapping through the PCIe BAR is made for Data Direct only, which no device here has.
#[test]
fn the_pcie_mapping_is_for_data_direct() {
    clean(&CUDA, || {
        let (cuda, domain) = (Cuda::load().unwrap(), domain());
        let memory = cuda.memory(MIB).unwrap();
        let cache = |paths| RegionCache::new(CacheOptions::default().paths(paths));
        let get =
            |cache: &RegionCache| cache.get_pointer(&domain, &cuda, memory.address(), 4096, Access::REMOTE);
        const BOTH: &[Path] = &[Path::Verbs, Path::Uverbs, Path::DataDirect];
        for pcie in [0, 1] {
            CUDA.set("pcie", pcie);
            // The default asks for the driver's own mapping.
            let default = RegionCache::default();
            get(&default).unwrap();
            let (exports, both) = (CUDA.exports(), cache(BOTH));
            // Data Direct asks for the other mapping and is refused, by the driver or by the device.
            let path = get(&both).unwrap().region().path();
            assert!(matches!(path, Path::Verbs | Path::Uverbs), "{path}");
            assert_eq!(CUDA.exports() - exports, 2);
            let only = cache(&[Path::DataDirect]);
            let refused = get(&only);
            match refused {
                Err(RegisterError::Verbs(error)) => {
                    assert!(error.to_string().contains("mlx5dv_reg_dmabuf_mr"), "{error}");
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(only.gauges().entries, 0);
        }
        CUDA.set("pcie", 0);
    });
}

#[test]
fn level_zero_and_all_runtimes_at_once() {
    let _ = (&*CUDA, &*HSA);
    clean(&ZE, || {
        let (ze, domain, cache) = (LevelZero::load().unwrap(), domain(), RegionCache::default());
        let all = Runtimes::loaded().unwrap();
        let memory = ze.memory(MIB).unwrap();
        let direct = cache.get_pointer(&domain, &ze, memory.address(), 64, Access::REMOTE).unwrap();
        let through = cache.get_pointer(&domain, &all, memory.address() + 64, 64, Access::REMOTE).unwrap();
        assert_eq!(direct.region().rkey(), through.region().rkey(), "one entry, whoever looks up");
        assert_eq!(cache.gauges().hits, 1);
    });
}
