//! What a hit costs: a request that finds its region, and the end of its handle.
//!
//! The peer is what is written by hand: a `HashMap` behind a `RwLock`, of reference-counted regions. The two
//! take turns over some seconds, since what slows a machine down comes and goes in tenths of them.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::{Arc, Barrier, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::dmabuf::BufferId;
use dmabuf_rdma::exporter::{DmaHeap, Exporter};
use dmabuf_rdma::mr::{Access, MemoryRegion, RegionCache};
use dmabuf_rdma::verbs::ProtectionDomain;

use super::ACCESS;
use crate::common::{Pair, Peer, Processors, Result, Rows, Spread, pairs, steps};

const PAIRS: usize = 151;
const PAUSE: Duration = Duration::from_millis(30);
const HITS: u64 = 20_000;
const SIZE: u64 = 1 << 20;
/// What is asked of it.
const OFFSET: u64 = 4096;
const LENGTH: u64 = 8192;

/// What is asked, of an entry that is there.
struct Request<'a> {
    cache: &'a RegionCache,
    by_hand: &'a RwLock<HashMap<(BufferId, Access), Arc<MemoryRegion>>>,
    domain: &'a ProtectionDomain,
    buffer: &'a DmaBuf,
}

impl Request<'_> {
    #[inline(always)]
    fn hit(&self) {
        let Self { cache, domain, buffer, .. } = *self;
        // The compiler does not know the buffer from one hit to the next, nor what becomes of the handle.
        let handle = cache.get(domain, black_box(buffer), OFFSET, LENGTH, ACCESS).expect("a hit");
        black_box(handle.iova());
    }

    #[inline(always)]
    fn hit_by_hand(&self) {
        let key = (black_box(self.buffer).id(), ACCESS);
        let region = self.by_hand.read().expect("nobody panics").get(&key).cloned().expect("a hit");
        assert!(OFFSET + LENGTH <= region.umem().len());
        black_box(region.iova());
    }

    /// Nanoseconds a hit.
    #[inline(always)]
    fn time(&self, hit: impl Fn(&Self)) -> f64 {
        let start = Instant::now();
        (0..HITS).for_each(|_| hit(self));
        start.elapsed().as_nanos() as f64 / HITS as f64
    }
}

pub fn run(rows: &mut Rows, domain: &ProtectionDomain, processors: &Processors) -> Result<()> {
    let heap = DmaHeap::open("system")?;
    // Among others, as a cache has them.
    let buffers = (0..64).map(|_| Ok(heap.allocate(SIZE)?.dmabuf)).collect::<Result<Vec<_>>>()?;
    let cache = RegionCache::default();
    let mut by_hand = HashMap::new();
    for buffer in &buffers {
        cache.get(domain, buffer, 0, SIZE, ACCESS)?;
        let region = MemoryRegion::builder(domain, buffer).access(ACCESS).register()?;
        by_hand.insert((buffer.id(), ACCESS), Arc::new(region));
    }
    let request = Request { cache: &cache, by_hand: &RwLock::new(by_hand), domain, buffer: &buffers[17] };

    processors.stay_on(0)?;
    let one = pairs(
        PAIRS,
        || Ok(request.time(Request::hit)),
        || {
            thread::sleep(PAUSE);
            Ok(request.time(Request::hit_by_hand))
        },
    )?;
    add(rows, "cache hit, one thread", &one, "value <= 40")?;

    // Each on a processor of its own, beginning and ending together.
    let barrier = Barrier::new(2);
    let both = thread::scope(|scope| {
        let threads = [0, 1].map(|processor| {
            let (request, barrier) = (&request, &barrier);
            scope.spawn(move || {
                // Without a second processor they take turns, and the row says so by its value.
                let _ = processors.stay_on(processor);
                let library = || {
                    barrier.wait();
                    Ok(request.time(Request::hit))
                };
                let bare = || {
                    thread::sleep(PAUSE);
                    barrier.wait();
                    Ok(request.time(Request::hit_by_hand))
                };
                pairs(PAIRS, library, bare).expect("nothing fails")
            })
        });
        threads.map(|thread| thread.join().expect("no panic in a hit"))
    });
    let two: Vec<Pair> = both.into_iter().flatten().skip(1).collect();
    add(rows, "cache hit, two threads on one entry", &two, "value <= 80")?;
    processors.all()?;

    let count = |hits: u64| steps::count(|| (0..hits).for_each(|_| request.hit()));
    let (few, many) = (count(10)?, count(110)?);
    let instructions = (many - few) as f64 / 100.0;
    let exact = Spread { min: instructions, median: instructions, max: instructions };
    rows.add("cache hit, instructions", "", exact, None, None)?;
    let now = cache.gauges();
    assert_eq!((now.misses, now.entries), (64, 64));
    Ok(())
}

fn add(rows: &mut Rows, name: &str, pairs: &[Pair], goal: &str) -> Result<()> {
    let time = Spread::of(pairs.iter().map(|pair| pair.library));
    rows.add(name, "ns", time, Some(Peer::of(pairs)), Some(goal))
}
