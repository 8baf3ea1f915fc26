//! Host memory as both ends of a transfer: bytes, lifetimes, limits and refusals. Files are in `host_files.rs`.
//!
//! `unsafe` is here for memory of others, which some of these tests describe wrongly.

use std::fs;
use std::sync::atomic::Ordering;

use dma_sg::RangeError;
use dmabuf_rdma::exporter::{self, PageKind};
use dmabuf_rdma::host::Error;
use dmabuf_rdma::mr::{
    Access, CacheOptions, DeregisterError, Growth, MemoryRegion, Path, RegionCache, RegisterError, SetError,
};
use dmabuf_rdma::observe::gauges;
use dmabuf_rdma::verbs::ProtectionDomain;
use dmabuf_rdma::{ErrorKind, HostBuffer, Iova, RegionSet};

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::cgroup::Cgroup;
use crate::common::faults::{Command, Fault};
use crate::common::host::{Arena, filled, host, host_contents, host_kinds};
use crate::common::peers::domain;
use crate::common::system::{Memlock, huge_pages, unprivileged};
use crate::common::wire::Wire;
use crate::common::{assert_same, pattern};
use crate::on_dmabuf_rxe::fork::in_a_child;

const SIZE: u64 = 4 << 20;

#[track_caller]
pub fn register(domain: &ProtectionDomain, buffer: &HostBuffer) -> MemoryRegion {
    let region = MemoryRegion::builder(domain, buffer).access(Access::REMOTE).register().expect("register");
    assert_eq!(region.path(), Path::HostMemory);
    region
}

/// A field of /proc/self/status in bytes.
fn status(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key}"));
    value.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn every_byte_of_every_kind() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        for kind in host_kinds() {
            let (ours, theirs) = ((kind.allocate)(SIZE), filled(SIZE, 2));
            ours.write(0, &pattern(SIZE as usize, 1)).unwrap();
            let (local, target) = (register(&near.domain, &ours), register(&far.domain, &theirs));
            assert_eq!((local.len(), local.umem().buffer()), (SIZE, ours.id()), "{}", kind.name);
            assert_eq!(local.iova(), Iova(ours.as_ptr() as u64 % 4096), "{}", kind.name);
            // From and to the middle of pages.
            let (from, to, length) = (13, 0x1a37, SIZE - 0x2000);
            let remote = target.remote();
            let place = remote.slice(to..to + length).unwrap();
            near.connection.write(local.slice(from..from + length).unwrap(), place).unwrap().wait().unwrap();
            let mut expected = pattern(SIZE as usize, 2);
            expected[to as usize..][..length as usize]
                .copy_from_slice(&pattern(SIZE as usize, 1)[from as usize..][..length as usize]);
            assert_same(&host_contents(&theirs), &expected, &format!("{}: written", kind.name));
            near.connection.read(&local, &remote).unwrap().wait().unwrap();
            assert_same(&host_contents(&ours), &expected, &format!("{}: read", kind.name));
            // The peer writes this kind, and it takes a message.
            theirs.write(0, &pattern(SIZE as usize, 3)).unwrap();
            far.connection.write(&target, local.remote()).unwrap().wait().unwrap();
            assert_same(&host_contents(&ours), &pattern(SIZE as usize, 3), &format!("{}: target", kind.name));
            theirs.write(0, &pattern(SIZE as usize, 4)).unwrap();
            let receiving = near.connection.recv(&local).unwrap();
            far.connection.send(&target).unwrap().wait().unwrap();
            receiving.wait().unwrap();
            assert_same(&host_contents(&ours), &pattern(SIZE as usize, 4), &format!("{}: sent", kind.name));
            // Atomics on it, and their result in it.
            ours.write(0, &41_u64.to_ne_bytes()).unwrap();
            let word = local.remote().slice(..8).unwrap();
            far.connection.fetch_add(target.slice(8..16).unwrap(), &word, 1).unwrap().wait().unwrap();
            far.connection.compare_swap(target.slice(..8).unwrap(), &word, 42, 7).unwrap().wait().unwrap();
            let number = |buffer: &HostBuffer, at| {
                let mut bytes = [0; 8];
                buffer.read(at, &mut bytes).unwrap();
                u64::from_ne_bytes(bytes)
            };
            let seen = (number(&theirs, 8), number(&theirs, 0), number(&ours, 0));
            assert_eq!(seen, (41, 42, 7), "{}", kind.name);
            local.self_check().unwrap();
        }
    }
    census.assert_unchanged();
}

#[test]
fn huge_pages_are_huge() {
    let _pool = huge_pages(4);
    let free = || fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap();
    let domain = domain();
    let buffer = HostBuffer::allocate(1, PageKind::HUGE_2M).unwrap();
    assert_eq!((buffer.size(), buffer.as_ptr() as usize % (2 << 20)), (2 << 20, 0));
    let region = register(&domain, &buffer);
    assert_eq!(free().trim(), "3");
    let message = assert_refused!(
        HostBuffer::allocate(8 << 20, PageKind::HUGE_2M),
        Error::Allocate(exporter::Error::HugePages { page_size: 0x20_0000, .. })
    );
    assert!(message.contains("need 4 free huge pages"), "{message}");
    drop((region, buffer));
    assert_eq!(free().trim(), "4");
}

#[test]
fn transparent_huge_pages_are_huge() {
    let _kinds = host_kinds();
    let buffer = HostBuffer::allocate(8 << 20, PageKind::Transparent).unwrap();
    assert_eq!(buffer.as_ptr() as usize % (2 << 20), 0);
    buffer.write(0, &pattern(8 << 20, 1)).unwrap();
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let address = format!("{:x}-", buffer.as_ptr() as usize);
    let (_, entry) = maps.split_once(&address).expect("a mapping of its own");
    let huge = entry.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).unwrap();
    assert_eq!(huge.trim(), "8192 kB");
}

#[test]
fn a_region_keeps_memory_of_others() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let (arena, freed) = Arena::new(SIZE);
        let buffer = arena.into_buffer();
        buffer.write(0, &pattern(SIZE as usize, 5)).unwrap();
        let region = register(&near.domain, &buffer);
        let theirs = host(SIZE);
        let target = register(&far.domain, &theirs);
        let slice = region.slice(..).unwrap();
        drop((buffer, region));
        let transfer = near.connection.write(slice, target.remote()).unwrap();
        assert_eq!(freed.load(Ordering::SeqCst), 0);
        transfer.wait().unwrap();
        assert_same(&host_contents(&theirs), &pattern(SIZE as usize, 5), "after the buffer was dropped");
        assert_eq!(freed.load(Ordering::SeqCst), 1);
        // Forgotten, it lives for ever.
        let (arena, freed) = Arena::new(4096);
        std::mem::forget(arena.into_buffer());
        assert_eq!(freed.load(Ordering::SeqCst), 0);
    }
    census.assert_unchanged();
}

/// A queue pair that is destroyed with a transfer in flight releases the memory only afterwards.
#[test]
fn a_dropped_transfer_keeps_its_memory() {
    let Wire { near, far } = Wire::new();
    let (arena, freed) = Arena::new(64 << 20);
    let region = register(&near.domain, &arena.into_buffer());
    let theirs = host(64 << 20);
    let target = register(&far.domain, &theirs);
    let transfer = near.connection.write(region, target.remote()).unwrap();
    assert_eq!((transfer.try_wait().unwrap(), freed.load(Ordering::SeqCst)), (None, 0));
    drop(transfer);
    assert_eq!(freed.load(Ordering::SeqCst), 0, "the device still reads it");
    drop(near);
    assert_eq!(freed.load(Ordering::SeqCst), 1);
}

#[test]
fn memory_of_a_region_that_stays_registered_is_never_freed() {
    let census = Census::take();
    {
        let domain = domain();
        let (arena, freed) = Arena::new(4096);
        let region = register(&domain, &arena.into_buffer());
        let fault = Fault::at(Command::Deregister, 0, libc::EBUSY);
        let refused = region.deregister();
        assert!(fault.happened());
        let DeregisterError::Refused { region, .. } = refused.unwrap_err() else { panic!("not refused") };
        // Dropping tries once more, in vain, and logs it.
        drop(region);
        assert_eq!(freed.load(Ordering::SeqCst), 0);
        drop(fault);
        drop(domain);
        assert_eq!(freed.load(Ordering::SeqCst), 0);
    }
    // The kernel deregistered it with its context.
    census.assert_unchanged();
}

#[test]
fn a_child_of_fork_does_not_have_the_memory() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let theirs = host(SIZE);
        let target = register(&far.domain, &theirs);
        for kind in host_kinds() {
            let buffer = (kind.allocate)(SIZE);
            buffer.write(0, &pattern(SIZE as usize, 6)).unwrap();
            let region = register(&near.domain, &buffer);
            let foreign = kind.name == "memory of others";
            let (buffer, region) = in_a_child((buffer, region), |(buffer, region)| {
                assert_refused!(buffer.read(0, &mut [0; 8]), Error::OtherProcess);
                let message = assert_refused!(buffer.write(0, &[0; 8]), Error::OtherProcess);
                assert!(message.contains("make a buffer in the child"), "{message}");
                let mapped = fs::read_to_string("/proc/self/maps").unwrap();
                let page = format!("{:x}-", buffer.as_ptr() as usize / 4096 * 4096);
                assert!(foreign || !mapped.contains(&page), "{page} is in the child");
                let own = domain();
                let refused = MemoryRegion::builder(&own, &buffer).register();
                assert_eq!(refused.as_ref().unwrap_err().kind(), ErrorKind::Misuse);
                assert_refused!(refused, RegisterError::Host(Error::OtherProcess));
                drop((region, buffer));
                // Its own memory is its own.
                let ours = host(4096);
                ours.write(0, &[1; 4096]).unwrap();
                drop(register(&own, &ours));
            });
            // The device reads the pages that the parent writes now.
            let bytes = pattern(SIZE as usize, 7);
            buffer.write(0, &bytes).unwrap();
            near.connection.write(&region, target.remote()).unwrap().wait().unwrap();
            assert_same(&host_contents(&theirs), &bytes, &format!("{}: after the fork", kind.name));
        }
    }
    census.assert_unchanged();
}

#[test]
fn the_cache_knows_a_buffer_by_its_identity() {
    let census = Census::take();
    {
        let domain = domain();
        let cache = RegionCache::new(CacheOptions::default().growth(Growth::Exact));
        let (arena, freed) = Arena::new(SIZE);
        let (start, first) = (arena.start(), arena.into_buffer());
        let get = |buffer: &HostBuffer, range| cache.get(&domain, buffer, range, Access::REMOTE);
        let slice = get(&first, 0..SIZE).unwrap();
        assert_eq!(slice.region().path(), Path::HostMemory);
        let again = get(&first.clone(), 100..200).unwrap();
        assert_eq!(again.region().rkey(), slice.region().rkey());
        assert_eq!(again.iova().0, slice.iova().0 + 100);
        // Other memory at the same address.
        // SAFETY: the cache keeps the arena, and only this library accesses it.
        let second = unsafe { HostBuffer::from_raw(start, SIZE, ()) }.unwrap();
        let other = get(&second, 0..SIZE).unwrap();
        assert_ne!(other.region().rkey(), slice.region().rkey());
        assert_eq!((cache.gauges().hits, cache.gauges().misses), (1, 2));
        let id = first.id();
        drop((other, slice, again, first));
        assert_eq!((freed.load(Ordering::SeqCst), cache.invalidate(second.id())), (0, 1));
        assert_eq!((cache.invalidate(id), freed.load(Ordering::SeqCst)), (1, 1));
        assert_refused!(
            RegionCache::new(CacheOptions::default().paths(&[Path::Uverbs])).get(
                &domain,
                &host(4096),
                ..,
                Access::empty()
            ),
            RegisterError::NoPath { .. }
        );
    }
    census.assert_unchanged();
}

#[test]
fn a_set_of_chunks_on_two_devices() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let (ours, theirs) = (filled(SIZE, 1), [host(SIZE / 2), host(SIZE / 2)]);
        let sets = RegionSet::builder(&ours).access(Access::REMOTE).chunk_size(96 << 12);
        let sets = sets.register_on(&[near.domain.clone(), far.domain.clone()]).unwrap();
        let (source, beside) = (&sets[0], &sets[1]);
        let chunks = SIZE.div_ceil(96 << 12) as usize;
        assert_eq!(
            (source.path(), source.chunks().len(), beside.chunks().len()),
            (Path::HostMemory, chunks, chunks)
        );
        let target = RegionSet::of_buffers(&theirs).access(Access::REMOTE).own_descriptors();
        let target = target.register(&far.domain).unwrap();
        assert!(target.descriptor(0).is_none() && target.descriptor(1).is_none());
        near.connection.write(source, target.remote()).unwrap().wait().unwrap();
        let seen = theirs.iter().flat_map(host_contents).collect::<Vec<_>>();
        assert_same(&seen, &pattern(SIZE as usize, 1), "the far end");
        // Memory that begins inside a page leaves no consecutive addresses, unless it is the first.
        let odd = Arena::new(8192 - 16).0.into_buffer();
        let refused = RegionSet::of_buffers([&ours, &odd]).register(&near.domain);
        assert_refused!(refused, SetError::Register(RegisterError::IovaNotCongruent { offset: 16, .. }));
        let set = RegionSet::of_buffers([&odd, &ours]).register(&near.domain).unwrap();
        assert_eq!((set.iova(), set.chunks()[1].iova()), (Iova(16), Iova(8192)));
    }
    census.assert_unchanged();
}

#[test]
fn block_tables() {
    const BLOCK: u64 = 4096 + 8;
    let Wire { near, far } = Wire::new();
    let (ours, theirs) = (filled(SIZE, 1), host(SIZE));
    let (source, target) = (register(&near.domain, &ours), register(&far.domain, &theirs));
    let local = source.slice(8..).unwrap().strided(BLOCK, 3 * BLOCK, 300).unwrap();
    let remote = target.remote().slice(..).unwrap().strided(BLOCK, 2 * BLOCK, 500).unwrap();
    let indices = [299, 0, 17, 18, 19];
    let chosen = [7, 499, 20, 1, 0];
    let from = local.select(indices).unwrap();
    near.connection.write(from, remote.select(chosen).unwrap()).unwrap().wait().unwrap();
    let (bytes, mut expected) = (pattern(SIZE as usize, 1), vec![0; SIZE as usize]);
    for (index, place) in indices.into_iter().zip(chosen) {
        let (from, to) = (8 + index * 3 * BLOCK as usize, place * 2 * BLOCK as usize);
        expected[to..][..BLOCK as usize].copy_from_slice(&bytes[from..][..BLOCK as usize]);
    }
    assert_same(&host_contents(&theirs), &expected, "the blocks");
}

#[test]
fn an_iova_is_chosen_or_refused() {
    let Wire { near, far } = Wire::new();
    let buffer = Arena::new(SIZE).0.into_buffer();
    buffer.write(0, &pattern(SIZE as usize, 8)).unwrap();
    let builder = MemoryRegion::builder(&near.domain, &buffer).range(100..);
    let message = assert_refused!(
        builder.iova(Iova(0x1064)).register(),
        RegisterError::IovaNotCongruent { offset: 116, .. }
    );
    assert!(message.contains("in that page, 0x1074 fits"), "{message}");
    assert_refused!(builder.iova(Iova(u64::MAX - 0xf8b)).register(), RegisterError::IovaOverflow { .. });
    let region = builder.iova(Iova(0x7f00_dead_0000_0074)).register().unwrap();
    let theirs = host(SIZE - 100);
    let target = register(&far.domain, &theirs);
    near.connection.write(&region, target.remote().slice(..SIZE - 100).unwrap()).unwrap().wait().unwrap();
    assert_same(
        &host_contents(&theirs)[..SIZE as usize - 100],
        &pattern(SIZE as usize, 8)[100..],
        "by its iova",
    );
}

#[test]
fn wrong_memory_of_others_is_refused() {
    let mut bytes = [0_u8; 16];
    let start = bytes.as_mut_ptr();
    // SAFETY: no buffer results.
    unsafe {
        assert_refused!(HostBuffer::from_raw(std::ptr::null_mut(), 4096, ()), Error::Null { length: 4096 });
        assert_refused!(HostBuffer::from_raw(start, 0, ()), Error::Range(RangeError::Empty { .. }));
        let high = std::ptr::without_provenance_mut(usize::MAX - 4095);
        let message = assert_refused!(HostBuffer::from_raw(high, 4097, ()), Error::AddressOverflow { .. });
        assert!(message.starts_with("4097 bytes at address 0xfffffffffffff000 end beyond"), "{message}");
        let refused = HostBuffer::from_raw(start, u64::MAX, ());
        assert_refused!(refused, Error::AddressOverflow { length: u64::MAX, .. });
        assert_refused!(HostBuffer::from_raw(start, 1 << 63, ()), Error::AddressOverflow { .. });
    }
}

#[test]
fn wrong_ranges_flags_and_paths_are_refused() {
    let (domain, buffer) = (domain(), host(8192));
    let builder = MemoryRegion::builder(&domain, &buffer);
    let out_of_range = |range| assert_refused!(range, RegisterError::Range(RangeError::OutOfRange { .. }));
    out_of_range(builder.range(1..8193).register());
    out_of_range(builder.range(8192..8193).register());
    assert_refused!(builder.range(5..5).register(), RegisterError::Range(RangeError::Empty { offset: 5 }));
    assert_refused!(builder.access(Access::REMOTE_WRITE).register(), RegisterError::LocalWriteMissing { .. });
    let flush = Access::from_bits_retain(1 << 8);
    assert_refused!(builder.access(flush).register(), RegisterError::AccessNotPermitted { device: None, .. });
    for paths in [&[] as &[_], &[Path::Verbs, Path::Uverbs, Path::HostMapping]] {
        let message = assert_refused!(builder.paths(paths).register(), RegisterError::NoPath { .. });
        assert!(message.contains("HostMemory for host memory"), "{message}");
    }
    assert_refused!(builder.data_direct().register(), RegisterError::NoPath { .. });
    assert_refused!(buffer.read(8191, &mut [0; 2]), Error::Range(RangeError::OutOfRange { .. }));
    assert_refused!(buffer.write(8192, &[0]), Error::Range(RangeError::OutOfRange { .. }));
    assert_refused!(buffer.read(u64::MAX, &mut [0; 2]), Error::Range(RangeError::OutOfRange { .. }));
    assert_refused!(buffer.read(0, &mut []), Error::Range(RangeError::Empty { .. }));
    builder.paths(&[Path::HostMemory]).register().unwrap();
}

#[test]
fn allocations_that_cannot_be() {
    let allocate = HostBuffer::allocate;
    let base = PageKind::Base;
    assert_refused!(allocate(0, base), Error::Allocate(exporter::Error::Range(RangeError::Empty { .. })));
    assert_refused!(allocate(u64::MAX, base), Error::Allocate(exporter::Error::SizeTooLarge { .. }));
    let odd = PageKind::Huge { size: 3 << 20 };
    assert_refused!(allocate(4096, odd), Error::Allocate(exporter::Error::HugePageSize { .. }));
    let none = PageKind::Huge { size: 8 << 20 };
    let refused = allocate(4096, none);
    assert_eq!(refused.as_ref().unwrap_err().errno(), Some(libc::EINVAL));
    assert_refused!(refused, Error::Allocate(exporter::Error::Allocate { .. }));
    for pages in [base, PageKind::Transparent] {
        let message = assert_refused!(
            allocate(1 << 40, pages),
            Error::Allocate(exporter::Error::OutOfMemory { limit: None, .. })
        );
        assert!(message.starts_with("host memory cannot allocate 1099511627776 bytes"), "{message}");
    }
    let _cgroup = Cgroup::new(64 << 20);
    let message = assert_refused!(
        allocate(96 << 20, base),
        Error::Allocate(exporter::Error::OutOfMemory { limit: Some(_), .. })
    );
    assert!(message.contains("are left by /sys/fs/cgroup/limited/memory.max"), "{message}");
}

#[test]
fn a_plain_users_memlock_limit_counts_what_is_pinned() {
    const MIB: u64 = 1 << 20;
    let buffer = host(12 * MIB);
    let _limit = Memlock::new(8 * MIB);
    let message = unprivileged(|| {
        let domain = domain();
        let register = |range| MemoryRegion::builder(&domain, &buffer).range(range).register();
        assert_refused!(
            register(0..12 * MIB),
            RegisterError::MemlockLimit {
                path: Path::HostMemory,
                limit: 0x80_0000,
                pinned: 0,
                needed: 0xc0_0000,
                ..
            }
        );
        // Bytes of a page count as the page.
        let held = register(1..6 * MIB - 1).unwrap();
        assert_eq!(status("VmPin:"), 6 * MIB);
        let refused = register(5 * MIB..8 * MIB);
        assert_eq!(refused.as_ref().unwrap_err().kind(), ErrorKind::Limit);
        let message = assert_refused!(
            refused,
            RegisterError::MemlockLimit { pinned: 0x60_0000, needed: 0x30_0000, .. }
        );
        drop(register(6 * MIB..8 * MIB).unwrap());
        drop(held);
        {
            // The kernel answers EPERM to a limit of 0.
            let _none = Memlock::new(0);
            assert_refused!(register(0..1), RegisterError::MemlockLimit { limit: 0, needed: 4096, .. });
        }
        drop(register(0..8 * MIB).unwrap());
        message
    });
    let expected = "HostMemory pins 3145728 bytes in addition to the 6291456 bytes already pinned, and RLIMIT_MEMLOCK is 8388608 bytes: raise it (ulimit -l, LimitMEMLOCK=), or import a dma-buf, which is not charged";
    assert_eq!(message, expected);
}

#[test]
fn a_thousand_cycles_leave_nothing() {
    let domain = domain();
    drop(register(&domain, &host(64 << 10)));
    let mappings = || fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let counts = || (mappings(), status("VmPin:"), gauges().host_memory.regions);
    let (census, before) = (Census::take(), counts());
    for _ in 0..1000 {
        let buffer = host(64 << 10);
        let region = register(&domain, &buffer);
        assert_eq!((gauges().host_memory.bytes, status("VmPin:")), (64 << 10, before.1 + (64 << 10)));
        region.deregister().unwrap();
    }
    census.assert_unchanged();
    assert_eq!(counts(), before);
}
