//! Measures a hit of the cache natively: `cargo xtask bench cache`. It needs no device, because a hit makes no
//! call; the entries are fake registrations.
//!
//! The peer is the cache that one would write by hand: a `HashMap` behind a `RwLock` with the same hasher, keyed
//! by buffer, domain and access, of `Arc`s that are searched for one that covers the range. Both alternate, and
//! the ratio is the median over the pairs.

use std::hint::black_box;
use std::sync::{Arc, Barrier, RwLock};
use std::thread;
use std::time::Instant;

use rustc_hash::FxHashMap;

use super::{domain, fake};
use crate::dmabuf::{BufferId, DmaBuf};
use crate::mr::{Access, CacheOptions, MemoryRegion, RegionCache};
use crate::tests::common::{Pair, Peer, Processors, Result, Rows, Spread, pairs};
use crate::verbs::ProtectionDomain;

const PAIRS: usize = 301;
const HITS: u64 = 20_000;
const SIZE: u64 = 1 << 20;
/// The requested range, a part of a larger entry.
const RANGE: std::ops::Range<u64> = 4096..12288;

type ByHand = RwLock<FxHashMap<(BufferId, usize, Access), Vec<Arc<MemoryRegion>>>>;

struct Request<'a> {
    cache: &'a RegionCache,
    by_hand: &'a ByHand,
    domain: &'a ProtectionDomain,
    buffer: &'a DmaBuf,
}

impl Request<'_> {
    fn hit(&self) {
        // Hides the buffer and the use of the slice from the optimizer.
        let slice =
            self.cache.get(self.domain, black_box(self.buffer), RANGE, Access::REMOTE).expect("a hit");
        black_box(slice.len());
    }

    fn hit_by_hand(&self) {
        let domain = self.domain.as_raw().as_ptr().addr();
        let key = (black_box(self.buffer).id(), domain, Access::REMOTE);
        let regions = self.by_hand.read().expect("nothing panics");
        let covers = |region: &&Arc<MemoryRegion>| {
            let umem = region.umem();
            umem.offset() <= RANGE.start && RANGE.end <= umem.offset() + umem.len()
        };
        let region = regions.get(&key).and_then(|regions| regions.iter().find(covers)).cloned();
        drop(regions);
        black_box(region.expect("a hit").iova());
    }

    /// Nanoseconds for a hit.
    fn time(&self, hit: impl Fn(&Self)) -> Result<f64> {
        let start = Instant::now();
        (0..HITS).for_each(|_| hit(self));
        Ok(start.elapsed().as_nanos() as f64 / HITS as f64)
    }
}

#[test]
#[ignore = "a benchmark: cargo xtask bench cache"]
fn cache_hit() -> Result<()> {
    let (domain, cache) = (domain(), RegionCache::new(CacheOptions::default()));
    // Several buffers, as in a real cache.
    let buffers: Vec<DmaBuf> = (1..=64).map(|inode| DmaBuf::fake(inode, SIZE)).collect();
    let mut by_hand = FxHashMap::default();
    for buffer in &buffers {
        let region = || fake::region_of(&domain, buffer.id(), 0..SIZE, Access::REMOTE);
        cache.insert_for_test(&domain, buffer, region());
        by_hand
            .insert((buffer.id(), domain.as_raw().as_ptr().addr(), Access::REMOTE), vec![Arc::new(region())]);
    }
    let by_hand = RwLock::new(by_hand);
    let request = Request { cache: &cache, by_hand: &by_hand, domain: &domain, buffer: &buffers[17] };

    let (mut rows, processors) = (Rows::new()?, Processors::allowed()?);
    processors.stay_on(0)?;
    let one = pairs(PAIRS, || request.time(Request::hit), || request.time(Request::hit_by_hand))?;
    add(&mut rows, "cache hit, one thread", &one, "value <= 40")?;
    let spread = Spread::of(one.iter().map(|pair| pair.library));
    rows.add("cache hit, one thread, of by hand", "ns", spread, Some(Peer::of(&one)), Some("ratio <= 2.0"))?;

    // Each thread has its own processor, and both start and end together.
    let barrier = Barrier::new(2);
    let both = thread::scope(|scope| {
        let threads = [0, 1].map(|processor| {
            let (request, barrier, processors) = (&request, &barrier, &processors);
            scope.spawn(move || {
                // On one processor they alternate, and the figure shows it.
                let _ = processors.stay_on(processor);
                let start = || _ = barrier.wait();
                let library = || {
                    start();
                    request.time(Request::hit)
                };
                let by_hand = || {
                    start();
                    request.time(Request::hit_by_hand)
                };
                pairs(PAIRS, library, by_hand).expect("nothing fails")
            })
        });
        threads.map(|thread| thread.join().expect("no panic in a hit"))
    });
    let two: Vec<Pair> = both.into_iter().flatten().skip(1).collect();
    add(&mut rows, "cache hit, two threads on one entry", &two, "value <= 100")?;
    let spread = Spread::of(two.iter().map(|pair| pair.library));
    rows.add("cache hit, two threads, of by hand", "ns", spread, Some(Peer::of(&two)), Some("ratio <= 2.0"))?;
    processors.all()?;

    assert_eq!((cache.gauges().misses, cache.gauges().entries), (0, 64));
    Ok(())
}

fn add(rows: &mut Rows, name: &str, pairs: &[Pair], goal: &str) -> Result<()> {
    rows.add(name, "ns", Spread::of(pairs.iter().map(|pair| pair.library)), None, Some(goal))
}
