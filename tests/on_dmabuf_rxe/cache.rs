//! The cache: what a hit is, what stays, what goes, and that no key is ever stale.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use dmabuf_rdma::error::RegistrationError;
use dmabuf_rdma::exporter::udmabuf::Piece;
use dmabuf_rdma::exporter::{Pages, Udmabuf};
use dmabuf_rdma::mr::{Access, CacheOptions, Growth, RegionCache};
use dmabuf_rdma::{DmaBuf, Error};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::assert_refused;
use crate::common::buffers::{heap, udmabuf};
use crate::common::census::{Census, dma_bufs, regions};
use crate::common::link::Link;
use crate::common::peers::{Peers, domain};
use crate::common::{assert_same, contents, pattern};

const PAGE: u64 = 4096;

fn cache(max_bytes: u64, max_entries: usize, growth: Growth) -> RegionCache {
    RegionCache::new(CacheOptions { max_bytes, max_entries, growth, ..Default::default() })
}

/// (hits, misses, evictions, entries)
fn figures(cache: &RegionCache) -> (u64, u64, u64, u64) {
    let now = cache.gauges();
    (now.hits, now.misses, now.evictions, now.entries)
}

#[test]
fn what_a_cached_region_covers_is_a_hit() {
    let census = Census::take();
    {
        let (domain, other, buffer) = (domain(), domain(), heap(1 << 20));
        let cache = RegionCache::default();
        let before = regions();
        let whole = cache.get(&domain, &buffer, 0, 1 << 20, Access::REMOTE).unwrap();
        for (offset, length) in [(0, 1 << 20), (0, 1), ((1 << 20) - 1, 1), (12345, 678)] {
            // By whichever descriptor.
            let again = buffer.try_clone().unwrap();
            let part = cache.get(&domain, &again, offset, length, Access::REMOTE).unwrap();
            assert_eq!((part.rkey(), part.offset(), part.len()), (whole.rkey(), offset, length));
            assert_eq!((part.iova().0, part.remote().runs()[0].iova.0), (offset, offset));
            assert_eq!(part.remote().len(), length);
            assert_refused!(part.sge(0, length + 1), Error::OutOfRange { .. });
        }
        assert_eq!((figures(&cache), regions()), ((4, 1, 0, 1), before + 1));
        // Other access, another domain.
        cache.get(&domain, &buffer, 0, 1, Access::REMOTE_READ).unwrap();
        cache.get(&other, &buffer, 0, 1, Access::REMOTE).unwrap();
        assert_eq!((figures(&cache), regions()), ((4, 3, 0, 3), before + 3));
        assert_eq!(cache.gauges().bytes, (1 << 20) + 2);
        for refused in [
            cache.get(&domain, &buffer, 7, 0, Access::REMOTE),
            cache.get(&domain, &buffer, 1, 1 << 20, Access::REMOTE),
            cache.get(&domain, &buffer, 0, u64::MAX, Access::REMOTE),
        ] {
            assert_refused!(refused, Error::ZeroLength { offset: 7 } | Error::OutOfRange { .. });
        }
        assert_eq!(cache.invalidate_domain(&other), 1);
        assert_eq!((cache.clear(), cache.gauges().bytes), (2, 0));
    }
    census.assert_unchanged();
}

/// The same descriptor number, the same size, a new buffer each time; the old one is closed.
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
            let buffer = if round % 2 == 0 { heap(64 << 10) } else { udmabuf(Pages::Base, 64 << 10).dmabuf };
            numbers.push(buffer.as_fd().as_raw_fd());
            identities.push(buffer.id());
            let bytes = pattern(64 << 10, round);
            buffer.map().unwrap().write(0, &bytes).unwrap();
            for _ in 0..2 {
                let handle = cache.get(&peers.domain, &buffer, 0, 64 << 10, Access::REMOTE).unwrap();
                assert_eq!(handle.region().umem().buffer(), buffer.id());
                keys.push(handle.rkey());
                peers.read(handle.region(), &target);
                assert_same(&contents(&sink), &bytes, "the bytes of the buffer that was asked for");
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
        // Closed and freed long ago, and found by their identities.
        for id in identities {
            assert_eq!(cache.invalidate(id), 1);
        }
    }
    census.assert_unchanged();
}

#[test]
fn two_dma_bufs_of_one_memory_are_two_entries() {
    let domain = domain();
    let memfd = memfd_create(c"shared", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&memfd, PAGE as i64).unwrap();
    let make = || {
        let piece = Piece { memfd: memfd.try_clone().unwrap(), offset: 0, length: PAGE };
        Udmabuf::open().unwrap().from_pieces(vec![piece]).unwrap().dmabuf
    };
    let (one, two) = (make(), make());
    let cache = RegionCache::default();
    let first = cache.get(&domain, &one, 0, PAGE, Access::REMOTE).unwrap();
    let second = cache.get(&domain, &two, 0, PAGE, Access::REMOTE).unwrap();
    assert_ne!(first.rkey(), second.rkey());
    assert_eq!(figures(&cache), (0, 2, 0, 2));
}

/// GBM hands out such descriptors.
#[test]
fn a_read_only_descriptor_does_not_find_what_may_write() {
    let (domain, buffer) = (domain(), heap(PAGE));
    let cache = RegionCache::default();
    cache.get(&domain, &buffer, 0, PAGE, Access::REMOTE).unwrap();
    let read_only = {
        let heap = std::fs::File::open("/dev/dma_heap/system").unwrap();
        let fd = rdma_sys_ext::dma_heap::alloc(heap.as_fd(), PAGE, libc::O_CLOEXEC as u32).unwrap();
        DmaBuf::from_fd(fd).unwrap()
    };
    assert!(!read_only.is_writable());
    let get = |access| cache.get(&domain, &read_only, 0, PAGE, access).map(|handle| handle.region().access());
    assert_refused!(get(Access::REMOTE), Error::ReadOnlyBuffer { .. });
    assert_eq!(get(Access::REMOTE_READ).unwrap(), Access::REMOTE_READ);
    assert_refused!(get(Access::REMOTE), Error::ReadOnlyBuffer { .. });
    assert_eq!(figures(&cache), (0, 2, 0, 2));
}

#[test]
fn the_least_recently_used_goes_first() {
    let domain = domain();
    let buffers: Vec<DmaBuf> = (0..5).map(|_| heap(PAGE)).collect();
    let cache = cache(u64::MAX, 3, Growth::Exact);
    let get = |at: usize| cache.get(&domain, &buffers[at], 0, PAGE, Access::empty()).unwrap();
    for at in [0, 1, 2, 0, 3] {
        drop(get(at));
    }
    // 1 went for 3.
    assert_eq!(figures(&cache), (1, 4, 1, 3));
    for at in [0, 2, 3] {
        drop(get(at));
    }
    assert_eq!(figures(&cache), (4, 4, 1, 3));
    drop(get(1));
    assert_eq!(figures(&cache), (4, 5, 2, 3));
}

#[test]
fn what_is_in_use_stays_and_a_full_cache_says_so() {
    let census = Census::take();
    {
        let domain = domain();
        let buffers: Vec<DmaBuf> = (0..4).map(|_| heap(2 * PAGE)).collect();
        let cache = cache(5 * PAGE, 8, Growth::Exact);
        let get = |at: usize| cache.get(&domain, &buffers[at], 0, 2 * PAGE, Access::empty());
        let first = get(0).unwrap();
        drop(get(1).unwrap());
        // The other one goes, though it was used later.
        let third = get(2).unwrap();
        assert_eq!((figures(&cache), cache.gauges().bytes), ((0, 3, 1, 2), 4 * PAGE));
        let message = assert_refused!(
            get(3),
            Error::Registration(RegistrationError::CacheFull {
                length: 0x2000,
                used_bytes: 0x4000,
                max_bytes: 0x5000,
                used_entries: 2,
                max_entries: 8,
            })
        );
        assert!(message.contains("drop handles"), "{message}");
        let clone = first.clone();
        drop(first);
        assert_refused!(get(3), Error::Registration(RegistrationError::CacheFull { .. }));
        drop(clone);
        let fourth = get(3).unwrap();
        assert_eq!(figures(&cache), (0, 4, 2, 2));
        drop((third, fourth));
        assert_refused!(
            cache.get(&domain, &heap(6 * PAGE), 0, 6 * PAGE, Access::empty()),
            Error::Registration(RegistrationError::CacheFull { used_entries: 0, .. })
        );
    }
    census.assert_unchanged();
}

#[test]
fn neighbours_grow_together() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(16 * PAGE));
        let cache = RegionCache::default();
        let get = |from: u64, pages: u64| {
            cache.get(&domain, &buffer, from * PAGE, pages * PAGE, Access::REMOTE).unwrap()
        };
        let before = regions();
        let low = get(0, 2);
        get(4, 2);
        get(10, 2);
        assert_eq!((figures(&cache), regions()), ((0, 3, 0, 3), before + 3));
        // Between the first two, adjoining both.
        let middle = get(2, 2);
        let range = |handle: &dmabuf_rdma::mr::CachedRegion| {
            (handle.region().umem().offset() / PAGE, handle.region().len() / PAGE)
        };
        assert_eq!((range(&middle), range(&low)), ((0, 6), (0, 2)));
        // The first is in use and stays registered, and is not found any more.
        assert_eq!((figures(&cache), regions()), ((0, 4, 0, 2), before + 3));
        assert_eq!(get(0, 2).rkey(), middle.rkey());
        assert_ne!(low.rkey(), middle.rkey());
        low.region().self_check().unwrap();
        drop(low);
        assert_eq!(regions(), before + 2);
        // Overlapping both that are left.
        assert_eq!(range(&get(5, 6)), (0, 12));
        assert_eq!(cache.gauges().bytes, 12 * PAGE);
    }
    census.assert_unchanged();
}

#[test]
fn exactly_or_wholly_when_asked() {
    let (domain, buffer) = (domain(), heap(8 * PAGE));
    let exact = cache(u64::MAX, 8, Growth::Exact);
    let get = |cache: &RegionCache, from: u64, pages: u64| {
        cache.get(&domain, &buffer, from * PAGE, pages * PAGE, Access::REMOTE).unwrap().region().len() / PAGE
    };
    assert_eq!((get(&exact, 0, 2), get(&exact, 1, 2), get(&exact, 2, 1)), (2, 2, 2));
    assert_eq!(figures(&exact), (1, 2, 0, 2));
    let whole = cache(u64::MAX, 8, Growth::Whole);
    assert_eq!((get(&whole, 3, 1), get(&whole, 0, 8)), (8, 8));
    assert_eq!(figures(&whole), (1, 1, 0, 1));
    // Where the whole does not fit, what was asked for does.
    let small = cache(4 * PAGE, 8, Growth::Whole);
    assert_eq!(get(&small, 3, 1), 1);
}

#[test]
fn an_invalidated_buffer_is_not_found_and_goes_with_its_last_handle() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(PAGE));
        let cache = RegionCache::default();
        let (live, live_buffers) = (regions(), dma_bufs());
        let handle = cache.get(&domain, &buffer, 0, PAGE, Access::REMOTE).unwrap();
        assert_eq!((cache.invalidate(buffer.id()), cache.invalidate(buffer.id())), (1, 0));
        let second = cache.get(&domain, &buffer, 0, PAGE, Access::REMOTE).unwrap();
        assert_ne!(handle.rkey(), second.rkey());
        handle.region().self_check().unwrap();
        assert_eq!(regions(), live + 2);
        let clone = handle.clone();
        drop(handle);
        assert_eq!(regions(), live + 2);
        thread::spawn(move || drop(clone)).join().unwrap();
        assert_eq!(regions(), live + 1);
        // The buffer is freed while entries of it exist: the memory stays with them.
        let id = buffer.id();
        drop((buffer, second));
        assert_eq!((regions(), dma_bufs()), (live + 1, live_buffers));
        assert_eq!(cache.invalidate(id), 1);
        assert_eq!((regions(), dma_bufs()), (live, live_buffers - 1));
    }
    census.assert_unchanged();
}

#[test]
fn a_handle_outlives_the_cache() {
    let census = Census::take();
    let (domain, buffer) = (domain(), heap(PAGE));
    let cache = RegionCache::default();
    let handle = cache.get(&domain, &buffer, 0, PAGE, Access::REMOTE).unwrap();
    drop(cache.get(&domain, &heap(PAGE), 0, PAGE, Access::REMOTE).unwrap());
    let live = regions();
    drop((cache, buffer, domain));
    assert_eq!(regions(), live - 1);
    handle.region().self_check().unwrap();
    drop(handle);
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
            let keys: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            cache.get(&domain, &buffer, 0, 4 << 20, Access::REMOTE).unwrap()
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(keys.iter().all(|handle| handle.rkey() == keys[0].rkey()));
            assert_eq!((figures(&cache), regions()), ((7, 1, 0, 1), before + 1));
        }
    }
    census.assert_unchanged();
}

/// Hits, misses, evictions, invalidation, clones and handles that change threads, all at once.
#[test]
fn threads_never_hold_what_they_did_not_ask_for() {
    let census = Census::take();
    {
        let domain = domain();
        let buffers: Vec<DmaBuf> = (0..6).map(|_| heap(8 * PAGE)).collect();
        let cache = cache(20 * PAGE, 4, Growth::Adjoining);
        let gets = AtomicUsize::new(0);
        let full = AtomicUsize::new(0);
        let (sender, receiver) = std::sync::mpsc::sync_channel(16);
        thread::scope(|scope| {
            let (domain, buffers, cache, gets, full) = (&domain, &buffers, &cache, &gets, &full);
            for thread in 0..4_u64 {
                let sender = sender.clone();
                scope.spawn(move || {
                    let mut random = thread * 77 + 1;
                    for round in 0..1500 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let pick = random >> 33;
                        let buffer = &buffers[pick as usize % buffers.len()];
                        let (offset, length) = ((pick >> 3) % 7 * PAGE, PAGE + (pick >> 8) % PAGE);
                        match cache.get(domain, buffer, offset, length, Access::REMOTE) {
                            Ok(handle) => {
                                gets.fetch_add(1, Ordering::Relaxed);
                                let umem = handle.region().umem();
                                assert_eq!(umem.buffer(), buffer.id());
                                assert!(umem.offset() <= offset);
                                assert!(offset + length <= umem.offset() + umem.len());
                                if round % 3 == 0 {
                                    sender.send(handle.clone()).unwrap();
                                }
                            }
                            Err(Error::Registration(RegistrationError::CacheFull { .. })) => {
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
            for handle in receiver {
                let region = handle.region();
                assert!(region.umem().offset() <= handle.offset());
                assert!(handle.len() <= region.len());
            }
        });
        let (gets, full) = (gets.into_inner(), full.into_inner());
        assert_eq!(gets + full, 6000);
        assert!(gets > 3000, "{gets} served, {full} found no room");
        let now = cache.gauges();
        assert!(now.hits + now.misses >= gets as u64 && now.evictions > 0, "{now:?}");
        assert!(now.entries <= 4 && now.bytes <= 20 * PAGE, "{now:?}");
        cache.clear();
        assert_eq!(regions(), {
            drop(cache);
            regions()
        });
    }
    census.assert_unchanged();
}

#[test]
fn deleting_the_device_while_entries_live() {
    let census = Census::take();
    let link = Link::new();
    let domain = link.domain();
    let cache = RegionCache::default();
    let buffers: Vec<DmaBuf> = (0..4).map(|_| heap(1 << 20)).collect();
    let handles: Vec<_> = buffers
        .iter()
        .map(|buffer| cache.get(&domain, buffer, 0, 1 << 20, Access::REMOTE).unwrap())
        .collect();
    let delete = link.delete();
    thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(cache.invalidate_domain(&domain), 4);
    drop((handles, domain, buffers));
    link.deleted(delete);
    assert_eq!(cache.gauges().entries, 0);
    census.assert_unchanged();
}
