//! Counters of what the process holds.

#[cfg(test)]
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, Weak};
use std::time::Duration;

/// What the library holds in this process. Each figure is exact; figures may change between two reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Gauges {
    /// Regions registered with `ibv_reg_dmabuf_mr`.
    pub verbs: RegionGauges,
    /// Regions registered with the kernel's REG_DMABUF_MR command.
    pub uverbs: RegionGauges,
    /// Regions registered with `ibv_reg_mr_iova2` on the host pages behind a dma-buf.
    pub host_mapping: RegionGauges,
    /// Regions registered with `ibv_reg_mr_ex`.
    pub verbs_ex: RegionGauges,
    /// Regions registered with `mlx5dv_reg_dmabuf_mr`.
    pub data_direct: RegionGauges,
    /// Regions registered with `ibv_reg_mr_iova2` on host memory.
    pub host_memory: RegionGauges,
    /// Open dma-buf descriptors: those of `DmaBuf`s, mappings and sets.
    pub fds: u64,
    /// The sum over all caches of the process.
    pub cache: CacheGauges,
}

/// Regions of one registration path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RegionGauges {
    /// Number of registered regions.
    pub regions: u64,
    /// Bytes that the regions map.
    pub bytes: u64,
}

/// What one cache, or all caches of the process, hold and have done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CacheGauges {
    /// Requests that an entry covered.
    pub hits: u64,
    /// Requests that started a registration.
    pub misses: u64,
    /// Entries that the cache removed to make room.
    pub evictions: u64,
    /// Entries in the cache.
    pub entries: u64,
    /// Bytes that the entries map.
    pub bytes: u64,
    /// Time spent registering, summed over all threads.
    pub registering: Duration,
}

impl Gauges {
    /// The name of each path with its figures.
    pub fn by_path(&self) -> impl Iterator<Item = (&'static str, RegionGauges)> + use<> {
        let Self { verbs, uverbs, host_mapping, verbs_ex, data_direct, host_memory, .. } = *self;
        [
            ("Verbs", verbs),
            ("Uverbs", uverbs),
            ("HostMapping", host_mapping),
            ("VerbsEx", verbs_ex),
            ("DataDirect", data_direct),
            ("HostMemory", host_memory),
        ]
        .into_iter()
    }

    /// The sum over all paths.
    pub fn regions(&self) -> RegionGauges {
        self.by_path().fold(RegionGauges::default(), |sum, (_, each)| RegionGauges {
            regions: sum.regions + each.regions,
            bytes: sum.bytes + each.bytes,
        })
    }
}

/// Counts the regions of one path.
#[derive(Debug)]
pub(crate) struct RegionCounter {
    regions: AtomicU64,
    bytes: AtomicU64,
}

impl RegionCounter {
    const fn new() -> Self {
        Self { regions: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.regions.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn subtract(&self, bytes: u64) {
        self.regions.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn read(&self) -> RegionGauges {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RegionGauges { regions: read(&self.regions), bytes: read(&self.bytes) }
    }
}

pub(crate) static VERBS: RegionCounter = RegionCounter::new();
pub(crate) static UVERBS: RegionCounter = RegionCounter::new();
pub(crate) static HOST_MAPPING: RegionCounter = RegionCounter::new();
pub(crate) static VERBS_EX: RegionCounter = RegionCounter::new();
pub(crate) static DATA_DIRECT: RegionCounter = RegionCounter::new();
pub(crate) static HOST_MEMORY: RegionCounter = RegionCounter::new();

/// A cache that [`gauges`] includes.
pub(crate) trait CountedCache: Send + Sync {
    fn gauges(&self) -> CacheGauges;
}

/// The live caches, and the sums over the dropped ones.
static CACHES: Mutex<(Vec<Weak<dyn CountedCache>>, CacheGauges)> = Mutex::new((
    Vec::new(),
    CacheGauges { hits: 0, misses: 0, evictions: 0, entries: 0, bytes: 0, registering: Duration::ZERO },
));

/// Includes a cache in [`gauges`] while it lives.
pub(crate) fn count_cache(cache: Weak<dyn CountedCache>) {
    CACHES.lock().unwrap_or_else(PoisonError::into_inner).0.push(cache);
}

/// Keeps the sums of a cache that is being dropped.
pub(crate) fn remember_cache(done: CacheGauges) {
    let mut caches = CACHES.lock().unwrap_or_else(PoisonError::into_inner);
    caches.1 = caches.1.and(CacheGauges { entries: 0, bytes: 0, ..done });
    caches.0.retain(|cache| cache.strong_count() > 0);
}

impl CacheGauges {
    fn and(self, other: Self) -> Self {
        Self {
            hits: self.hits + other.hits,
            misses: self.misses + other.misses,
            evictions: self.evictions + other.evictions,
            entries: self.entries + other.entries,
            bytes: self.bytes + other.bytes,
            registering: self.registering + other.registering,
        }
    }
}

fn all_caches() -> CacheGauges {
    // Upgraded under the lock and dropped outside it, since dropping the last reference takes the lock.
    let (live, gone) = {
        let caches = CACHES.lock().unwrap_or_else(PoisonError::into_inner);
        (caches.0.iter().filter_map(Weak::upgrade).collect::<Vec<_>>(), caches.1)
    };
    live.iter().fold(gone, |sum, cache| sum.and(cache.gauges()))
}

static FDS: AtomicU64 = AtomicU64::new(0);

/// A snapshot of what the library holds in this process.
pub fn gauges() -> Gauges {
    Gauges {
        verbs: VERBS.read(),
        uverbs: UVERBS.read(),
        host_mapping: HOST_MAPPING.read(),
        verbs_ex: VERBS_EX.read(),
        data_direct: DATA_DIRECT.read(),
        host_memory: HOST_MEMORY.read(),
        fds: FDS.load(Ordering::Relaxed),
        cache: all_caches(),
    }
}

/// Counts one dma-buf descriptor while it lives; it is stored beside the descriptor.
#[derive(Debug)]
pub(crate) struct HeldFd(());

impl HeldFd {
    pub(crate) fn new() -> Self {
        FDS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for HeldFd {
    fn drop(&mut self) {
        FDS.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_counts_regions_and_their_bytes() {
        let counter = RegionCounter::new();
        counter.add(7 << 30);
        counter.add(1);
        counter.subtract(1);
        assert_eq!(counter.read(), RegionGauges { regions: 1, bytes: 7 << 30 });
        let gauges = Gauges { data_direct: counter.read(), ..Default::default() };
        assert_eq!(gauges.regions(), counter.read());
    }

    #[test]
    fn the_sums_of_a_cache_outlive_it() {
        struct Cache;
        impl CountedCache for Cache {
            fn gauges(&self) -> CacheGauges {
                CacheGauges { evictions: 1 << 40, entries: 1 << 40, ..Default::default() }
            }
        }
        let cache: Arc<dyn CountedCache> = Arc::new(Cache);
        count_cache(Arc::downgrade(&cache));
        let now = gauges().cache;
        assert!(now.evictions >= 1 << 40 && now.entries >= 1 << 40);
        remember_cache(cache.gauges());
        drop(cache);
        let now = gauges().cache;
        assert!(now.evictions >= 1 << 40 && now.entries < 1 << 40);
    }
}
