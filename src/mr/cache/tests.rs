//! Tests of the cache with fake registrations, which know whether they are still registered. The guest tests add
//! real devices.

use std::sync::atomic::AtomicUsize;
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::Duration;

use super::pointers::Allocation;
use super::*;
use crate::dmabuf::DmaBuf;
use crate::exporter::{ExportOptions, ExportedRange, MemoryKind, PointerError, PointerInfo, Runtime};
use crate::mr::tests::{domain, fake};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const SIZE: u64 = 64 * PAGE;

/// A cache in one domain, for buffers that are only numbers.
struct Bench {
    domain: ProtectionDomain,
    cache: RegionCache,
    registered: AtomicUsize,
}

impl Bench {
    fn new(options: CacheOptions) -> Self {
        Self { domain: domain(), cache: RegionCache::new(options), registered: AtomicUsize::new(0) }
    }

    fn wanted(&self, buffer: u64, range: Range<u64>) -> Wanted {
        let key = Key {
            memory: Memory::Buffer(BufferId::from_parts(13, buffer)),
            domain: Key::domain_of(&self.domain),
            access: Access::REMOTE,
            writable: true,
        };
        Wanted { key, range, size: SIZE }
    }

    fn get(&self, buffer: u64, range: Range<u64>) -> Result<RegionSlice, RegisterError> {
        self.get_by(&self.wanted(buffer, range), || {})
    }

    /// Calls `while_registering` in each registration.
    fn get_by(&self, wanted: &Wanted, while_registering: impl Fn()) -> Result<RegionSlice, RegisterError> {
        let inner = &self.cache.inner;
        let register = |range: Range<u64>| {
            while_registering();
            self.registered.fetch_add(1, Ordering::SeqCst);
            Ok(registered(&self.domain, wanted, range))
        };
        let growth = inner.options.growth;
        let slice = match inner.find(wanted) {
            Some((slice, _)) => slice,
            None => inner.miss(wanted, growth, register)?,
        };
        let (umem, range) = (slice.region().umem(), &wanted.range);
        assert!(slice.region().is_registered() && Memory::Buffer(umem.buffer()) == wanted.key.memory);
        assert_eq!((slice.iova().0, slice.len()), (range.start, range.end - range.start));
        Ok(slice)
    }

    fn pages(&self, buffer: u64, pages: Range<u64>) -> Result<RegionSlice, RegisterError> {
        self.get(buffer, pages.start * PAGE..pages.end * PAGE)
    }

    fn invalidate(&self, buffer: u64) -> usize {
        self.cache.invalidate(BufferId::from_parts(13, buffer))
    }

    /// Hits, misses, evictions, entries.
    fn figures(&self) -> (u64, u64, u64, u64) {
        let now = self.cache.gauges();
        (now.hits, now.misses, now.evictions, now.entries)
    }
}

fn registered(domain: &ProtectionDomain, wanted: &Wanted, range: Range<u64>) -> Registered {
    let Memory::Buffer(buffer) = wanted.key.memory else { panic!("a buffer's request") };
    let region = fake::region_of(domain, buffer, range.clone(), wanted.key.access);
    Registered { slice: region.into(), range, exported: None }
}

fn exact(max_bytes: u64, max_entries: usize) -> CacheOptions {
    CacheOptions::default().max_bytes(max_bytes).max_entries(max_entries).growth(Growth::Exact)
}

#[test]
fn an_entry_serves_only_ranges_that_it_covers() {
    let bench = Bench::new(CacheOptions::default());
    let whole = bench.get(7, 0..SIZE).unwrap();
    for range in [0..SIZE, 0..1, SIZE - 1..SIZE, 12345..13000] {
        assert_eq!(bench.get(7, range).unwrap().region().rkey(), whole.region().rkey());
    }
    assert_eq!((bench.figures(), bench.cache.gauges().bytes), ((4, 1, 0, 1), SIZE));
    let others = [
        |key: &mut Key| key.memory = Memory::Buffer(BufferId::from_parts(13, 8)),
        |key: &mut Key| key.access = Access::REMOTE_READ,
        |key: &mut Key| key.writable = false,
        |key: &mut Key| key.domain += 1,
    ];
    for (at, change) in others.into_iter().enumerate() {
        let mut wanted = bench.wanted(7, 0..1);
        change(&mut wanted.key);
        bench.get_by(&wanted, || {}).unwrap();
        assert_eq!(bench.figures().1, at as u64 + 2, "another key misses");
    }
    assert_eq!((bench.cache.invalidate_domain(&bench.domain), bench.cache.clear()), (4, 1));
    assert!(whole.region().is_registered() && !whole.region().is_shared());
}

#[test]
fn the_least_recently_used_is_evicted_and_never_one_in_use() {
    let bench = Bench::new(exact(u64::MAX, 3));
    for buffer in [0, 1, 2, 0, 3] {
        bench.pages(buffer, 0..1).unwrap();
    }
    assert_eq!(bench.figures(), (1, 4, 1, 3)); // 3 evicted 1
    for buffer in [0, 2, 3] {
        bench.pages(buffer, 0..1).unwrap();
    }
    assert_eq!(bench.figures(), (4, 4, 1, 3));
    // Entries with equal last use go in the order of their registration; 0 is in use and stays.
    let held = bench.pages(0, 0..1).unwrap();
    bench.pages(4, 0..1).unwrap();
    assert_eq!((bench.invalidate(2), bench.invalidate(3), bench.figures().2), (0, 1, 2));
    assert!(held.region().is_registered());
}

#[test]
fn a_cache_full_of_entries_in_use_is_an_error() {
    let bench = Bench::new(exact(5 * PAGE, 8));
    let first = bench.pages(0, 0..2).unwrap();
    drop(bench.pages(1, 0..2).unwrap());
    let third = bench.pages(2, 0..2).unwrap();
    match bench.pages(3, 0..2) {
        Err(RegisterError::CacheFull {
            length: 0x2000,
            used_bytes: 0x4000,
            max_bytes: 0x5000,
            used_entries: 2,
            max_entries: 8,
        }) => {}
        other => panic!("{other:?}"),
    }
    let clone = first.clone();
    drop(first);
    assert!(bench.pages(3, 0..2).is_err());
    drop(clone);
    bench.pages(3, 0..2).unwrap();
    drop(third);
    assert!(matches!(bench.pages(4, 0..6), Err(RegisterError::CacheFull { used_entries: 0, .. })));
}

#[test]
fn a_request_that_cannot_fit_evicts_nothing() {
    for growth in [Growth::Exact, Growth::Adjoining, Growth::Whole] {
        let bench = Bench::new(CacheOptions::default().max_bytes(8 * PAGE).growth(growth));
        for buffer in 0..4 {
            bench.pages(buffer, 0..1).unwrap();
        }
        // Growing to the whole buffer would take more than the limit: each kept its page.
        assert_eq!(bench.figures(), (0, 4, 0, 4), "{growth:?}");
        assert!(matches!(bench.pages(9, 0..9), Err(RegisterError::CacheFull { used_entries: 0, .. })));
        assert_eq!(bench.figures(), (0, 4, 0, 4), "{growth:?}");
        bench.pages(9, 0..8).unwrap();
        assert_eq!(bench.figures(), (0, 5, 4, 1), "{growth:?}");
    }
}

#[test]
fn neighbours_grow_together() {
    let bench = Bench::new(CacheOptions::default());
    let low = bench.pages(0, 0..2).unwrap();
    bench.pages(0, 4..6).unwrap();
    bench.pages(0, 10..12).unwrap();
    // Adjoins the first two.
    let middle = bench.pages(0, 2..4).unwrap();
    assert_eq!((middle.region().umem().offset(), middle.region().len()), (0, 6 * PAGE));
    // The first one is in use: it stays registered, but no request finds it.
    assert_eq!(bench.figures(), (0, 4, 0, 2));
    assert_eq!(bench.pages(0, 0..2).unwrap().region().rkey(), middle.region().rkey());
    assert_ne!(low.region().rkey(), middle.region().rkey());
    assert!(low.region().is_registered() && !low.region().is_shared());
    // Overlaps the two remaining entries.
    assert_eq!(bench.pages(0, 5..11).unwrap().region().len(), 12 * PAGE);
    assert_eq!(bench.cache.gauges().bytes, 12 * PAGE);
}

#[test]
fn growth_follows_the_options_within_the_limits() {
    let bench = Bench::new(exact(u64::MAX, 8));
    for pages in [0..2, 1..3, 2..3] {
        bench.pages(0, pages).unwrap();
    }
    assert_eq!(bench.figures(), (1, 2, 0, 2));
    let whole = Bench::new(CacheOptions::default().growth(Growth::Whole));
    assert_eq!(whole.pages(0, 3..4).unwrap().region().len(), SIZE);
    let small = Bench::new(CacheOptions::default().growth(Growth::Whole).max_bytes(4 * PAGE));
    assert_eq!(small.pages(0, 3..4).unwrap().region().len(), PAGE);
}

#[test]
fn a_range_that_is_too_long_for_the_device_is_registered_exactly() {
    let bench = Bench::new(CacheOptions::default().growth(Growth::Whole));
    let wanted = bench.wanted(0, 0..PAGE);
    let slice = bench.cache.inner.miss(&wanted, Growth::Whole, |range| match range.end - range.start {
        PAGE => Ok(registered(&bench.domain, &wanted, range)),
        length => Err(RegisterError::Refused {
            device: "stub0".into(),
            path: Path::Verbs,
            memory: "a \"system\" dma-buf".into(),
            offset: 0,
            length,
            source: std::io::Error::from_raw_os_error(libc::EINVAL),
        }),
    });
    assert_eq!(slice.unwrap().region().len(), PAGE);
    assert_eq!(bench.figures(), (0, 2, 0, 1));
}

#[test]
fn threads_that_miss_at_once_register_once() {
    for growth in [Growth::Exact, Growth::Adjoining, Growth::Whole] {
        let bench = Bench::new(CacheOptions::default().growth(growth));
        let barrier = Barrier::new(8);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let wanted = bench.wanted(0, 0..SIZE);
                    barrier.wait();
                    bench.get_by(&wanted, || thread::sleep(Duration::from_millis(20))).unwrap();
                });
            }
        });
        assert_eq!((bench.registered.load(Ordering::SeqCst), bench.figures()), (1, (7, 1, 0, 1)));
    }
}

#[test]
fn a_registration_invalidated_in_progress_is_not_kept() {
    let bench = Bench::new(CacheOptions::default());
    let slice = bench.get_by(&bench.wanted(0, 0..PAGE), || assert_eq!(bench.invalidate(0), 0)).unwrap();
    assert_eq!(bench.figures(), (0, 1, 0, 0));
    assert!(slice.region().is_registered() && !slice.region().is_shared());
}

/// Memory mapped into reserved addresses, by a runtime of another crate that exports too little, or nothing.
#[derive(Debug)]
struct Mapped(Option<u64>);

const MAPPED: PointerInfo = PointerInfo {
    runtime: "test",
    address: SIZE,
    base: SIZE,
    size: SIZE,
    kind: MemoryKind::Virtual,
    id: Some(1),
    device: None,
};

impl Runtime for Mapped {
    fn name(&self) -> &'static str {
        MAPPED.runtime
    }

    fn find(&self, address: u64) -> Result<Option<PointerInfo>, PointerError> {
        Ok(Some(PointerInfo { address, ..MAPPED }))
    }

    fn export(
        &self,
        info: &PointerInfo,
        _: u64,
        _: ExportOptions,
    ) -> Result<Vec<ExportedRange>, PointerError> {
        let freed = PointerError::Freed { runtime: info.runtime, address: info.address };
        Ok(vec![ExportedRange::new(DmaBuf::fake(1, self.0.ok_or(freed)?), ..)?])
    }
}

#[test]
fn no_entry_of_memory_that_is_mapped_anew_is_a_hit() {
    let (domain, cache) = (domain(), RegionCache::default());
    for length in [PAGE, 2 * PAGE] {
        let range = ExportedRange::new(DmaBuf::fake(1, length), ..).unwrap().with_test_witness(false);
        let region = fake::region_of(&domain, BufferId::from_parts(13, 1), 0..length, Access::REMOTE);
        cache.insert_pointer_for_test(&domain, &MAPPED, region, vec![range]);
    }
    assert_eq!(cache.gauges().entries, 2);
    match cache.get_pointer(&domain, &Mapped(None), SIZE, PAGE, Access::REMOTE) {
        Err(RegisterError::Pointer(PointerError::Freed { .. })) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(cache.gauges().entries, 0);
}

#[test]
fn an_export_of_too_few_bytes_is_refused() {
    let cache = RegionCache::default();
    match cache.get_pointer(&domain(), &Mapped(Some(PAGE)), SIZE, 2 * PAGE, Access::REMOTE) {
        Err(RegisterError::Pointer(PointerError::InvalidAnswer { runtime: "test", .. })) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_whose_change_nobody_could_tell_is_not_kept() {
    for (watched, entries) in [(false, 0), (true, 1)] {
        let bench = Bench::new(CacheOptions::default());
        let (base, size) = (MAPPED.base, MAPPED.size);
        let of = Allocation { runtime: MAPPED.runtime, device: None, base, size, id: None };
        let key = Key::of_allocation(&bench.domain, of, Access::REMOTE);
        let wanted = Wanted { key, range: 0..PAGE, size };
        let register = |range: Range<u64>| {
            let part = ExportedRange::new(DmaBuf::fake(1, PAGE), ..)?;
            let part = if watched { part.with_test_witness(true) } else { part };
            let exported = Some(Arc::new(Exported::new(&MAPPED, &range, vec![part])));
            let buffer = BufferId::from_parts(13, 1);
            let region = fake::region_of(&bench.domain, buffer, range.clone(), Access::REMOTE);
            Ok(Registered { slice: region.into(), range, exported })
        };
        assert_eq!(bench.cache.inner.miss(&wanted, Growth::Exact, register).unwrap().len(), PAGE);
        assert_eq!(bench.cache.gauges().entries, entries);
    }
}

#[test]
fn a_registration_that_panics_leaves_room_for_the_next() {
    let bench = Bench::new(exact(PAGE, 1));
    let panicked = thread::scope(|scope| {
        scope.spawn(|| bench.get_by(&bench.wanted(0, 0..PAGE), || panic!("on purpose"))).join()
    });
    assert!(panicked.is_err());
    bench.get(0, 0..PAGE).unwrap();
}

/// Threads end, and other threads drop their handles: no entry may stay in use.
#[test]
fn handles_may_be_dropped_by_another_thread() {
    let bench = Bench::new(exact(u64::MAX, 4));
    for round in 0..40 {
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            for at in 0..32 {
                let (sender, bench) = (sender.clone(), &bench);
                // At most four buffers are in use, so the cache is never full.
                scope.spawn(move || sender.send(bench.get((at + round) % 4, 0..PAGE).unwrap()).unwrap());
            }
            drop(sender);
            receiver.into_iter().for_each(drop);
        });
    }
    // No entry is in use, so each can be evicted.
    for buffer in 100..104 {
        bench.get(buffer, 0..PAGE).unwrap();
    }
    assert_eq!(bench.figures().3, 4);
}

/// 10^6 requests of 32 threads with invalidation, eviction and a second cache for the same buffers. `get_by`
/// panics if a region is deregistered while a slice lives; a region panics if it is deregistered twice.
#[test]
fn threads_always_get_a_registered_region_of_their_request() {
    const THREADS: u64 = 32;
    const REQUESTS: u64 = 1_000_000;
    let options = CacheOptions::default().max_bytes(20 * 8 * PAGE).max_entries(12);
    let caches = [Bench::new(options), Bench::new(options.growth(Growth::Exact))];
    let (sender, receiver) = mpsc::sync_channel(64);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (caches, sender) = (&caches, sender.clone());
            scope.spawn(move || {
                let mut random = thread * 77 + 1;
                for round in 0..REQUESTS / THREADS {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let pick = random >> 33;
                    let (bench, buffer) = (&caches[pick as usize & 1], pick / 2 % 16);
                    let start = (pick >> 7) % 50 * PAGE;
                    match bench.get(buffer, start..start + PAGE + (pick >> 13) % PAGE) {
                        Ok(slice) if round % 64 == 0 => sender.send(slice).unwrap(),
                        Ok(slice) => assert!(slice.region().is_registered()),
                        Err(RegisterError::CacheFull { .. }) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                    if round % 100 == 0 {
                        bench.invalidate(buffer);
                    }
                }
            });
        }
        drop(sender);
        // Another thread drops the slices.
        receiver.into_iter().for_each(|slice| assert!(slice.region().is_registered()));
    });
    for bench in &caches {
        let now = bench.cache.gauges();
        assert!(now.hits > 0 && now.evictions > 0 && now.entries <= 12, "{now:?}");
        let held: Vec<_> = (0..16).filter_map(|buffer| bench.get(buffer, 0..1).ok()).collect();
        bench.cache.clear();
        assert!(held.iter().all(|slice| slice.region().is_registered()));
        assert!(bench.cache.inner.lock_pending().is_empty());
        assert_eq!(bench.cache.gauges().entries, 0);
    }
}

proptest! {
    /// Growing terminates, and covers the request and each entry that it touches.
    #[test]
    fn a_grown_range_covers_what_it_touches(
        ranges in proptest::collection::vec((0..60_u64, 1..6_u64), 1..12), start in 0..60_u64, len in 1..4_u64
    ) {
        let bench = Bench::new(CacheOptions::default().growth(Growth::Exact));
        for (at, pages) in ranges {
            bench.pages(0, at..(at + pages).min(64)).unwrap();
        }
        let wanted = bench.wanted(0, start * PAGE..(start + len) * PAGE);
        let entries = bench.cache.inner.write();
        let grown = entries.grown(&wanted.key, wanted.range.clone());
        prop_assert!(covers(&grown, &wanted.range));
        prop_assert_eq!(&entries.grown(&wanted.key, grown.clone()), &grown);
    }
}
