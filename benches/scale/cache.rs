//! What a hit costs: a request that finds its region, and the end of its handle.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::{DmaHeap, Exporter};
use dmabuf_rdma::mr::RegionCache;
use dmabuf_rdma::verbs::ProtectionDomain;

use super::{ACCESS, steps};
use crate::common::{Processors, Result, Rows, Spread};

const LOOPS: usize = 101;
const HITS: u64 = 20_000;
const SIZE: u64 = 1 << 20;
/// What is asked of it.
const OFFSET: u64 = 4096;
const LENGTH: u64 = 8192;

/// What is asked, of an entry that is there.
struct Request<'a> {
    cache: &'a RegionCache,
    domain: &'a ProtectionDomain,
    buffer: &'a DmaBuf,
}

impl Request<'_> {
    #[inline(always)]
    fn hit(&self) {
        let Self { cache, domain, buffer } = *self;
        // The compiler does not know the buffer from one hit to the next, nor what becomes of the handle.
        let handle = cache.get(domain, black_box(buffer), OFFSET, LENGTH, ACCESS).expect("a hit");
        black_box(handle.iova());
    }

    /// Nanoseconds a hit.
    fn time(&self) -> f64 {
        let start = Instant::now();
        (0..HITS).for_each(|_| self.hit());
        start.elapsed().as_nanos() as f64 / HITS as f64
    }
}

pub fn run(rows: &mut Rows, domain: &ProtectionDomain, processors: &Processors) -> Result<()> {
    let heap = DmaHeap::open("system")?;
    // Among others, as a cache has them.
    let buffers = (0..64).map(|_| Ok(heap.allocate(SIZE)?.dmabuf)).collect::<Result<Vec<_>>>()?;
    let cache = RegionCache::default();
    for buffer in &buffers {
        cache.get(domain, buffer, 0, SIZE, ACCESS)?;
    }
    let request = Request { cache: &cache, domain, buffer: &buffers[17] };

    processors.stay_on(0)?;
    request.time();
    let one = Spread::of((0..LOOPS).map(|_| request.time()));
    rows.add("cache hit, one thread", "ns", one, None, Some("value <= 40"))?;

    // Each on a processor of its own, beginning and ending together.
    let barrier = Barrier::new(2);
    let both = std::thread::scope(|scope| {
        let threads = [0, 1].map(|processor| {
            let (request, barrier) = (&request, &barrier);
            scope.spawn(move || -> Vec<f64> {
                // Without a second processor they take turns, and the row says so by its value.
                let _ = processors.stay_on(processor);
                let once = || {
                    barrier.wait();
                    request.time()
                };
                (0..LOOPS).map(|_| once()).collect()
            })
        });
        threads.map(|thread| thread.join().expect("no panic in a hit"))
    });
    let two = Spread::of(both.into_iter().flatten().take(2 * LOOPS - 1));
    rows.add("cache hit, two threads on one entry", "ns", two, None, Some("value <= 80"))?;
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
