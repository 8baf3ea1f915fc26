//! The cache with real regions: no key is ever stale, and every region is deregistered in the end.
//!
//! `src/mr/cache/tests.rs` tests its policy.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use dma_sg::RangeError;
use dmabuf_rdma::exporter::{PageKind, Udmabuf};
use dmabuf_rdma::mr::{Access, CacheOptions, Growth, RegionCache, RegionSlice, RegisterError};
use dmabuf_rdma::{DmaBuf, Iova};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::assert_refused;
use crate::common::buffers::{heap, udmabuf};
use crate::common::census::{Census, dma_bufs, regions};
use crate::common::link::Link;
use crate::common::peers::{Peers, domain};
use crate::common::{assert_same, contents, pattern};

const PAGE: u64 = 4096;

fn cache(max_bytes: u64, max_entries: usize, growth: Growth) -> RegionCache {
    RegionCache::new(CacheOptions::default().max_bytes(max_bytes).max_entries(max_entries).growth(growth))
}

/// (hits, misses, evictions, entries)
fn figures(cache: &RegionCache) -> (u64, u64, u64, u64) {
    let now = cache.gauges();
    (now.hits, now.misses, now.evictions, now.entries)
}

#[test]
fn a_hit_is_a_slice_of_the_cached_region() {
    let census = Census::take();
    {
        let (domain, other, buffer) = (domain(), domain(), heap(1 << 20));
        let cache = RegionCache::default();
        let before = regions();
        let whole = cache.get(&domain, &buffer, .., Access::REMOTE).unwrap();
        for range in [0..1 << 20, 0..1, (1 << 20) - 1..1 << 20, 12_345..13_023] {
            // Any descriptor of the buffer finds the entry.
            let again = buffer.try_clone().unwrap();
            let part = cache.get(&domain, &again, range.clone(), Access::REMOTE).unwrap();
            let length = range.end - range.start;
            assert_eq!(part.region().rkey(), whole.region().rkey());
            assert_eq!((part.iova(), part.len()), (Iova(range.start), length));
            assert_eq!((part.remote().runs()[0].iova, part.remote().len()), (Iova(range.start), length));
            assert_refused!(part.slice(..=length), RangeError::OutOfRange { .. });
        }
        assert_eq!((figures(&cache), regions()), ((4, 1, 0, 1), before + 1));
        // Another access or domain misses.
        cache.get(&domain, &buffer, ..1, Access::REMOTE_READ).unwrap();
        cache.get(&other, &buffer, ..1, Access::REMOTE).unwrap();
        assert_eq!((figures(&cache), regions()), ((4, 3, 0, 3), before + 3));
        assert_eq!(cache.gauges().bytes, (1 << 20) + 2);
        assert_refused!(
            cache.get(&domain, &buffer, 7..7, Access::REMOTE),
            RegisterError::Range(RangeError::Empty { offset: 7 })
        );
        for range in [1..=1 << 20, 0..=u64::MAX] {
            assert_refused!(
                cache.get(&domain, &buffer, range, Access::REMOTE),
                RegisterError::Range(RangeError::OutOfRange { .. })
            );
        }
        assert_eq!(cache.invalidate_domain(&other), 1);
        assert_eq!((cache.clear(), cache.gauges().bytes), (2, 0));
    }
    census.assert_unchanged();
}

/// Each buffer has the size of the one before it, and often its descriptor number, which was closed.
#[test]
fn a_reused_descriptor_never_gets_another_buffers_key() {
    let census = Census::take();
    {
        let peers = Peers::new();
        let cache = RegionCache::default();
        let sink = heap(64 << 10);
        let target = peers.register(&sink);
        let (mut numbers, mut identities, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..24 {
            let buffer =
                if round % 2 == 0 { heap(64 << 10) } else { udmabuf(PageKind::Base, 64 << 10).dmabuf };
            numbers.push(buffer.as_fd().as_raw_fd());
            identities.push(buffer.id());
            let bytes = pattern(64 << 10, round);
            buffer.map().unwrap().write(0, &bytes).unwrap();
            for _ in 0..2 {
                let slice = cache.get(&peers.domain, &buffer, .., Access::REMOTE).unwrap();
                assert_eq!(slice.region().umem().buffer(), buffer.id());
                keys.push(slice.region().rkey());
                peers.read(slice.region(), &target);
                assert_same(&contents(&sink), &bytes, "the bytes of the requested buffer");
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        identities.sort_unstable();
        identities.dedup();
        keys.dedup();
        assert!(numbers.len() < 12, "descriptor numbers were reused: {numbers:?}");
        assert_eq!((identities.len(), keys.len()), (24, 24));
        assert_eq!(figures(&cache), (24, 24, 0, 24));
        // All but the last are closed, and the cache still finds them by identity.
        for id in identities {
            assert_eq!(cache.invalidate(id), 1);
        }
    }
    census.assert_unchanged();
}

/// As V4L2's EXPBUF makes them.
#[test]
fn two_dma_bufs_of_one_memory_are_two_entries() {
    let domain = domain();
    let memfd = memfd_create(c"shared", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&memfd, PAGE as i64).unwrap();
    let make = || {
        let memfd = memfd.try_clone().unwrap();
        Udmabuf::open().unwrap().from_memfds([(memfd, 0..PAGE)]).unwrap().dmabuf
    };
    let (one, two) = (make(), make());
    let cache = RegionCache::default();
    let first = cache.get(&domain, &one, .., Access::REMOTE).unwrap();
    let second = cache.get(&domain, &two, .., Access::REMOTE).unwrap();
    assert_ne!(first.region().rkey(), second.region().rkey());
    assert_eq!(figures(&cache), (0, 2, 0, 2));
}

/// GBM returns read-only descriptors.
#[test]
fn a_read_only_descriptor_never_gets_a_writable_region() {
    let (domain, buffer) = (domain(), heap(PAGE));
    let cache = RegionCache::default();
    cache.get(&domain, &buffer, .., Access::REMOTE).unwrap();
    let read_only = {
        let heap = std::fs::File::open("/dev/dma_heap/system").unwrap();
        let fd = rdma_sys_ext::dma_heap::alloc(heap.as_fd(), PAGE, libc::O_CLOEXEC as u32).unwrap();
        DmaBuf::from_fd(fd).unwrap()
    };
    assert!(!read_only.is_writable());
    let get = |access| cache.get(&domain, &read_only, .., access).map(|slice| slice.region().access());
    assert_refused!(get(Access::REMOTE), RegisterError::ReadOnlyBuffer { .. });
    assert_eq!(get(Access::REMOTE_READ).unwrap(), Access::REMOTE_READ);
    assert_refused!(get(Access::REMOTE), RegisterError::ReadOnlyBuffer { .. });
    assert_eq!(figures(&cache), (0, 2, 0, 2));
}

#[test]
fn an_evicted_region_is_deregistered_and_one_in_use_never_evicted() {
    let census = Census::take();
    {
        let domain = domain();
        let buffers: Vec<DmaBuf> = (0..4).map(|_| heap(2 * PAGE)).collect();
        let cache = cache(5 * PAGE, 8, Growth::Exact);
        let get = |at: usize| cache.get(&domain, &buffers[at], .., Access::empty());
        let before = regions();
        let first = get(0).unwrap();
        drop(get(1).unwrap());
        // The first was used before the second, but is in use: the second makes room.
        let third = get(2).unwrap();
        assert_eq!((figures(&cache), cache.gauges().bytes), ((0, 3, 1, 2), 4 * PAGE));
        assert_eq!(regions(), before + 2);
        let message = assert_refused!(
            get(3),
            RegisterError::CacheFull {
                length: 0x2000,
                used_bytes: 0x4000,
                max_bytes: 0x5000,
                used_entries: 2,
                max_entries: 8,
            }
        );
        assert!(message.contains("drop handles"), "{message}");
        let clone = first.clone();
        drop(first);
        assert_refused!(get(3), RegisterError::CacheFull { .. });
        drop(clone);
        let fourth = get(3).unwrap();
        assert_eq!((figures(&cache), regions()), ((0, 4, 2, 2), before + 2));
        drop((third, fourth));
        assert_refused!(
            cache.get(&domain, &heap(6 * PAGE), .., Access::empty()),
            RegisterError::CacheFull { used_entries: 0, .. }
        );
    }
    census.assert_unchanged();
}

#[test]
fn a_replaced_region_stays_until_its_last_slice_is_dropped() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(16 * PAGE));
        let cache = RegionCache::default();
        let get = |first: u64, end: u64| {
            cache.get(&domain, &buffer, first * PAGE..end * PAGE, Access::REMOTE).unwrap()
        };
        let before = regions();
        let low = get(0, 2);
        get(4, 6);
        get(10, 12);
        assert_eq!((figures(&cache), regions()), ((0, 3, 0, 3), before + 3));
        // Adjoins the first two: one region replaces both.
        let middle = get(2, 4);
        let pages = |slice: &RegionSlice| {
            let umem = slice.region().umem();
            (umem.offset() / PAGE, (umem.offset() + umem.len()) / PAGE)
        };
        assert_eq!((pages(&middle), pages(&low)), ((0, 6), (0, 2)));
        // The first region is in use: it stays registered, but requests find the new one.
        assert_eq!((figures(&cache), regions()), ((0, 4, 0, 2), before + 3));
        assert_eq!(get(0, 2).region().rkey(), middle.region().rkey());
        assert_ne!(low.region().rkey(), middle.region().rkey());
        low.region().self_check().unwrap();
        drop(low);
        assert_eq!(regions(), before + 2);
        // Overlaps both entries.
        assert_eq!(pages(&get(5, 11)), (0, 12));
        assert_eq!(cache.gauges().bytes, 12 * PAGE);
    }
    census.assert_unchanged();
}

#[test]
fn an_invalidated_region_stays_until_its_last_slice_is_dropped() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(PAGE));
        let cache = RegionCache::default();
        let (live, live_buffers) = (regions(), dma_bufs());
        let first = cache.get(&domain, &buffer, .., Access::REMOTE).unwrap();
        assert_eq!((cache.invalidate(buffer.id()), cache.invalidate(buffer.id())), (1, 0));
        let second = cache.get(&domain, &buffer, .., Access::REMOTE).unwrap();
        assert_ne!(first.region().rkey(), second.region().rkey());
        first.region().self_check().unwrap();
        assert_eq!(regions(), live + 2);
        let clone = first.clone();
        drop(first);
        assert_eq!(regions(), live + 2);
        thread::spawn(move || drop(clone)).join().unwrap();
        assert_eq!(regions(), live + 1);
        // The buffer is closed while it has an entry, which keeps the memory.
        let id = buffer.id();
        drop((buffer, second));
        assert_eq!((regions(), dma_bufs()), (live + 1, live_buffers));
        assert_eq!(cache.invalidate(id), 1);
        assert_eq!((regions(), dma_bufs()), (live, live_buffers - 1));
    }
    census.assert_unchanged();
}

#[test]
fn a_slice_outlives_the_cache() {
    let census = Census::take();
    let (domain, buffer) = (domain(), heap(PAGE));
    let cache = RegionCache::default();
    let slice = cache.get(&domain, &buffer, .., Access::REMOTE).unwrap();
    drop(cache.get(&domain, &heap(PAGE), .., Access::REMOTE).unwrap());
    let live = regions();
    drop((cache, buffer, domain));
    assert_eq!(regions(), live - 1);
    slice.region().self_check().unwrap();
    drop(slice);
    census.assert_unchanged();
}

#[test]
fn threads_that_miss_at_once_register_once() {
    let census = Census::take();
    {
        let domain = domain();
        for growth in [Growth::Exact, Growth::Adjoining, Growth::Whole] {
            let buffer = heap(4 << 20);
            let cache = cache(u64::MAX, 8, growth);
            let (before, barrier) = (regions(), Barrier::new(8));
            let slices: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            cache.get(&domain, &buffer, .., Access::REMOTE).unwrap()
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let rkey = slices[0].region().rkey();
            assert!(slices.iter().all(|slice| slice.region().rkey() == rkey));
            assert_eq!((figures(&cache), regions()), ((7, 1, 0, 1), before + 1));
        }
    }
    census.assert_unchanged();
}

/// Hits, misses, evictions, invalidation and slices that change threads, with two caches of the same buffers.
#[test]
fn threads_never_hold_what_they_did_not_request() {
    let census = Census::take();
    {
        let domain = domain();
        let buffers: Vec<DmaBuf> = (0..6).map(|_| heap(8 * PAGE)).collect();
        let caches = [cache(20 * PAGE, 4, Growth::Adjoining), cache(20 * PAGE, 4, Growth::Exact)];
        let before = regions();
        let served = AtomicUsize::new(0);
        let full = AtomicUsize::new(0);
        let (sender, receiver) = std::sync::mpsc::sync_channel(16);
        thread::scope(|scope| {
            let (domain, buffers, caches, served, full) = (&domain, &buffers, &caches, &served, &full);
            for thread in 0..4_u64 {
                let sender = sender.clone();
                scope.spawn(move || {
                    let mut random = thread * 77 + 1;
                    for round in 0..2000 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let pick = random >> 33;
                        let buffer = &buffers[pick as usize % buffers.len()];
                        let cache = &caches[(pick >> 20) as usize % 2];
                        let (offset, length) = ((pick >> 3) % 7 * PAGE, PAGE + (pick >> 8) % PAGE);
                        match cache.get(domain, buffer, offset..offset + length, Access::REMOTE) {
                            Ok(slice) => {
                                served.fetch_add(1, Ordering::Relaxed);
                                let umem = slice.region().umem();
                                assert_eq!(umem.buffer(), buffer.id());
                                assert!(umem.offset() <= offset);
                                assert!(offset + length <= umem.offset() + umem.len());
                                if round % 3 == 0 {
                                    sender.send(slice.clone()).unwrap();
                                }
                            }
                            Err(RegisterError::CacheFull { .. }) => {
                                full.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(error) => panic!("{error}"),
                        }
                        if round % 50 == 0 {
                            cache.invalidate(buffer.id());
                        }
                    }
                });
            }
            drop(sender);
            for slice in receiver {
                let region = slice.region();
                assert!(region.iova() <= slice.iova());
                assert!(slice.iova().0 + slice.len() <= region.iova().0 + region.len());
            }
        });
        let (served, full) = (served.into_inner(), full.into_inner());
        assert_eq!(served + full, 8000);
        assert!(served > 4000, "{served} served, {full} found no room");
        let now = caches.each_ref().map(RegionCache::gauges);
        assert!(now[0].hits + now[0].misses + now[1].hits + now[1].misses >= served as u64, "{now:?}");
        for cache in &now {
            assert!(cache.evictions > 0 && cache.entries <= 4 && cache.bytes <= 20 * PAGE, "{cache:?}");
        }
        // No slice is left: the entries hold the only handles.
        assert_eq!(regions(), before + (now[0].entries + now[1].entries) as usize);
        for cache in &caches {
            cache.clear();
        }
        assert_eq!(regions(), before);
    }
    census.assert_unchanged();
}

#[test]
fn deleting_the_device_while_the_cache_has_entries() {
    let census = Census::take();
    let link = Link::new();
    let domain = link.domain();
    let cache = RegionCache::default();
    let buffers: Vec<DmaBuf> = (0..4).map(|_| heap(1 << 20)).collect();
    let slices: Vec<_> =
        buffers.iter().map(|buffer| cache.get(&domain, buffer, .., Access::REMOTE).unwrap()).collect();
    let delete = link.delete();
    thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(cache.invalidate_domain(&domain), 4);
    drop((slices, domain, buffers));
    link.deleted(delete);
    assert_eq!(cache.gauges().entries, 0);
    census.assert_unchanged();
}
