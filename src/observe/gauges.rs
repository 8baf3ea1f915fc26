//! Counting what is held.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::mr::{PLACES, Path, own_place, shared_place};

/// Regions and bytes of one path, as one thread changed them: a region may go in another than it came.
struct Cell {
    regions: AtomicU64,
    bytes: AtomicU64,
}

const PATHS: [Path; 5] = [Path::Verbs, Path::Uverbs, Path::HostMapping, Path::VerbsEx, Path::DataDirect];

/// One thread's, on lines of their own.
#[repr(align(128))]
struct Cells([Cell; PATHS.len()]);

static CELLS: [Cells; PLACES] =
    [const { Cells([const { Cell { regions: AtomicU64::new(0), bytes: AtomicU64::new(0) } }; PATHS.len()]) };
        PLACES];

static FDS: AtomicU64 = AtomicU64::new(0);

/// What the library holds in this process at one time: each figure is true by itself, while others may
/// change as it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Gauges {
    /// Memory regions that are registered, and the bytes they map, for each path.
    pub regions: ByPath,
    /// dma-buf descriptors that are open: of `DmaBuf`s, mappings and sets.
    pub fds: u64,
    /// What all caches hold and did.
    pub cache: CacheGauges,
}

/// A value for each [`Path`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ByPath([PathGauges; PATHS.len()]);

/// Regions of one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PathGauges {
    /// How many are registered.
    pub regions: u64,
    /// Bytes that they map.
    pub bytes: u64,
}

/// What caches hold and did, one or all of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CacheGauges {
    /// Requests that a cached region covered. Exact while nothing is evicted at the same time.
    pub hits: u64,
    /// Requests that led to a registration, or waited for one that another thread had begun.
    pub misses: u64,
    /// Entries that went to make room.
    pub evictions: u64,
    /// Entries that are kept.
    pub entries: u64,
    /// Bytes that these map.
    pub bytes: u64,
    /// Time spent registering, all threads together.
    pub registering: Duration,
}

impl ByPath {
    /// Of one path.
    pub fn of(&self, path: Path) -> PathGauges {
        self.0[path as usize]
    }

    /// Each path with its figures.
    pub fn iter(&self) -> impl Iterator<Item = (Path, PathGauges)> + '_ {
        PATHS.iter().map(|&path| (path, self.of(path)))
    }

    /// All paths together.
    pub fn total(&self) -> PathGauges {
        self.0.iter().fold(PathGauges::default(), |sum, each| PathGauges {
            regions: sum.regions + each.regions,
            bytes: sum.bytes + each.bytes,
        })
    }
}

impl CacheGauges {
    pub(crate) fn add(&mut self, other: Self) {
        let Self { hits, misses, evictions, entries, bytes, registering } = other;
        self.hits += hits;
        self.misses += misses;
        self.evictions += evictions;
        self.entries += entries;
        self.bytes += bytes;
        self.registering += registering;
    }
}

/// What the library holds now, in the whole process.
pub fn gauges() -> Gauges {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut paths = ByPath::default();
    for Cells(cells) in &CELLS {
        for (sum, cell) in paths.0.iter_mut().zip(cells) {
            sum.regions = sum.regions.wrapping_add(read(&cell.regions));
            sum.bytes = sum.bytes.wrapping_add(read(&cell.bytes));
        }
    }
    Gauges { regions: paths, fds: read(&FDS), cache: crate::mr::all_caches() }
}

/// One more region.
#[inline]
pub(crate) fn count_region(path: Path, length: u64) {
    change(path, 1, length);
}

/// One region less.
#[inline]
pub(crate) fn discount_region(path: Path, length: u64) {
    change(path, 1_u64.wrapping_neg(), length.wrapping_neg());
}

#[inline]
fn change(path: Path, regions: u64, bytes: u64) {
    let Some(place) = own_place() else { return change_in_common(path, regions, bytes) };
    // Nobody else writes it.
    let cell = &CELLS[place].0[path as usize];
    cell.regions.store(cell.regions.load(Ordering::Relaxed).wrapping_add(regions), Ordering::Relaxed);
    cell.bytes.store(cell.bytes.load(Ordering::Relaxed).wrapping_add(bytes), Ordering::Relaxed);
}

#[cold]
fn change_in_common(path: Path, regions: u64, bytes: u64) {
    let cell = &CELLS[shared_place()].0[path as usize];
    cell.regions.fetch_add(regions, Ordering::Relaxed);
    cell.bytes.fetch_add(bytes, Ordering::Relaxed);
}

/// Stands beside a dma-buf descriptor, to count it as long as it is held.
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
    fn each_path_has_its_own_place() {
        for (at, path) in PATHS.iter().enumerate() {
            assert_eq!(*path as usize, at);
        }
        let before = gauges().regions;
        count_region(Path::DataDirect, 7 << 30);
        let after = gauges().regions.of(Path::DataDirect);
        assert_eq!(after.regions, before.of(Path::DataDirect).regions + 1);
        assert_eq!(after.bytes, before.of(Path::DataDirect).bytes + (7 << 30));
        discount_region(Path::DataDirect, 7 << 30);
    }
}
