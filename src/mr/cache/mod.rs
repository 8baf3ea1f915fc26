//! A cache of registrations: a map of region handles behind a lock.
//!
//! `entries.rs` contains the map and its policy, `pointers.rs` the memory of runtimes, `tests.rs` the tests. A hit takes the read lock and clones a
//! handle. A miss announces its range under the lock of `pending`, registers without any lock, and inserts the
//! region. Lock order: `pending`, then `entries`. Regions are never dropped under a lock, because dropping the
//! last handle deregisters.

mod entries;
mod pointers;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::{Range, RangeBounds};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use dma_sg::resolve_range;

use self::entries::{Entries, Kept, Key, Memory, Pending, covers, touches};
use self::pointers::Exported;
use super::path::DEFAULT;
use super::{Access, Buffer, MemoryRegion, Path, RegionSlice, RegisterError};
use crate::dmabuf::BufferId;
use crate::exporter::Extent;
use crate::observe::{self, CacheGauges, CountedCache, Process};
use crate::verbs::ProtectionDomain;

/// Limits of a cache, and what a miss registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheOptions {
    /// Maximum number of bytes that the entries map together. Default: no limit.
    pub max_bytes: u64,
    /// Maximum number of entries; 0 counts as 1. Default 1024.
    pub max_entries: usize,
    /// What a miss of [`get`](RegionCache::get) registers. Default [`Growth::Adjoining`].
    pub growth: Growth,
    /// What a miss of [`get_pointer`](RegionCache::get_pointer) exports and registers. Default [`Extent::Allocation`]:
    /// one export and one region serve all requests for an allocation, such as a pool of tensors. A peer with the key
    /// can access all of it.
    pub extent: Extent,
    /// The allowed paths, as in [`MemoryRegionBuilder::paths`](super::MemoryRegionBuilder::paths). Default:
    /// [`Path::Verbs`] and [`Path::Uverbs`] for dma-bufs, [`Path::HostMemory`] for host memory.
    pub paths: &'static [Path],
}

impl Default for CacheOptions {
    fn default() -> Self {
        let (growth, extent) = (Growth::default(), Extent::Allocation);
        Self { max_bytes: u64::MAX, max_entries: 1024, growth, extent, paths: DEFAULT }
    }
}

setters!(CacheOptions {
    max_bytes: u64,
    max_entries: usize,
    growth: Growth,
    extent: Extent,
    paths: &'static [Path],
});

/// What a miss registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Growth {
    /// The requested range.
    Exact,
    /// The requested range merged with the entries that overlap or adjoin it, as one region in their place. It
    /// covers only bytes that were requested.
    #[default]
    Adjoining,
    /// The whole buffer, so that each buffer misses once. A peer with the key can access all of it.
    Whole,
}

/// A cache of registrations, keyed by buffer or allocation, protection domain and access flags. Clones share one cache.
///
/// The cache identifies a dma-buf by its inode, never by a descriptor or an address. An entry's region holds the
/// buffer in the kernel, so no other buffer can get that inode. [Host memory](crate::HostBuffer) has an identity that
/// no later buffer gets. So closing descriptors, freeing a buffer and allocating another, even at the same address,
/// never leads to a wrong key. It also means that an entry keeps the memory of a freed buffer allocated. Call
/// [`invalidate`](Self::invalidate) when you free a buffer, or let newer entries evict it.
///
/// An entry is in use while a [`RegionSlice`] of it lives, and the cache never evicts it then. Two dma-bufs that
/// share memory, such as those of V4L2's EXPBUF, count as two buffers.
#[derive(Clone)]
pub struct RegionCache {
    inner: Arc<Inner>,
}

struct Inner {
    options: CacheOptions,
    entries: RwLock<Entries>,
    /// Registrations in progress.
    pending: Mutex<Vec<Pending>>,
    /// Notified when one of them ends.
    ended: Condvar,
    misses: AtomicU64,
    evictions: AtomicU64,
    /// Nanoseconds spent registering.
    registering: AtomicU64,
    creator: Process,
}

impl CountedCache for Inner {
    fn gauges(&self) -> CacheGauges {
        let entries = self.read();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheGauges {
            hits: entries.hits(),
            misses: read(&self.misses),
            evictions: read(&self.evictions),
            entries: entries.len() as u64,
            bytes: entries.bytes(),
            registering: Duration::from_nanos(read(&self.registering)),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A child of `fork` may inherit these locks while a thread of the parent holds them.
        if self.creator.is_current() {
            observe::remember_cache(self.gauges());
        }
    }
}

impl fmt::Debug for RegionCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionCache")
            .field("options", &self.inner.options)
            .field("gauges", &self.gauges())
            .finish()
    }
}

impl RegionCache {
    /// Creates an empty cache.
    pub fn new(options: CacheOptions) -> Self {
        let inner = Inner {
            options: options.max_entries(options.max_entries.max(1)),
            entries: RwLock::default(),
            pending: Mutex::default(),
            ended: Condvar::new(),
            misses: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            registering: AtomicU64::new(0),
            creator: Process::current(),
        };
        let inner = Arc::new(inner);
        let counted: Arc<dyn CountedCache> = inner.clone();
        observe::count_cache(Arc::downgrade(&counted));
        Self { inner }
    }

    /// Returns a slice of a registered region that covers this byte range of a buffer. A hit finds the region in the
    /// cache. A miss registers one and keeps it.
    ///
    /// The region may be larger than the range. Its iova is its offset in the buffer. If several threads miss on one
    /// range at once, one of them registers and the others wait.
    ///
    /// # Errors
    /// - [`RegisterError::Range`]: the range is empty, inverted, or not inside the buffer.
    /// - [`RegisterError::CacheFull`]: the entries in use leave no room within the limits.
    /// - On a miss, as [`MemoryRegionBuilder::register`](super::MemoryRegionBuilder::register).
    pub fn get<'b>(
        &self,
        domain: &ProtectionDomain,
        buffer: impl Into<Buffer<'b>>,
        range: impl RangeBounds<u64>,
        access: Access,
    ) -> Result<RegionSlice, RegisterError> {
        let buffer = buffer.into();
        let wanted = Wanted {
            key: Key::new(domain, buffer, access),
            range: resolve_range(range, buffer.size())?,
            size: buffer.size(),
        };
        if let Some((slice, _)) = self.inner.find(&wanted) {
            return Ok(slice);
        }
        access.check(buffer)?;
        self.inner.miss(&wanted, self.inner.options.growth, |range| {
            let builder = MemoryRegion::builder(domain, buffer).range(range.clone()).access(access);
            let region = builder.paths(self.inner.options.paths).register()?;
            Ok(Registered { slice: region.into(), range, exported: None })
        })
    }

    /// Inserts a unit test's region of a whole buffer.
    #[cfg(test)]
    pub(super) fn insert_for_test<'b>(
        &self,
        domain: &ProtectionDomain,
        buffer: impl Into<Buffer<'b>>,
        region: MemoryRegion,
    ) {
        let buffer = buffer.into();
        let (key, range) = (Key::new(domain, buffer, region.access()), 0..buffer.size());
        let kept = Kept { slice: region.into(), exported: None };
        self.inner.write().insert(key, range, Growth::Exact, kept, &mut Vec::new());
    }

    /// Removes the entries of a buffer, and returns how many. A region in use is deregistered with its last slice.
    /// A registration of the buffer in progress will not be kept.
    ///
    /// The buffer may be closed already: while it has entries, no other buffer has its identity.
    /// [`gauges`](crate::observe::gauges) shows what stays registered.
    pub fn invalidate(&self, buffer: BufferId) -> usize {
        self.inner.remove_if(|key| key.memory == Memory::Buffer(buffer))
    }

    /// Removes the entries of a protection domain, and returns how many. Call it before the device is removed: an
    /// entry holds its domain, and the domain its context.
    pub fn invalidate_domain(&self, domain: &ProtectionDomain) -> usize {
        let domain = Key::domain_of(domain);
        self.inner.remove_if(|key| key.domain == domain)
    }

    /// Removes all entries, and returns how many.
    pub fn clear(&self) -> usize {
        self.inner.remove_if(|_| true)
    }

    /// The content of the cache, and what it has done.
    pub fn gauges(&self) -> CacheGauges {
        self.inner.gauges()
    }

    /// The options of the cache.
    pub fn options(&self) -> CacheOptions {
        self.inner.options
    }
}

impl Default for RegionCache {
    fn default() -> Self {
        Self::new(CacheOptions::default())
    }
}

/// A request to the cache. Ranges are of the buffer, or of the allocation.
struct Wanted {
    key: Key,
    range: Range<u64>,
    /// Size of the buffer or allocation in bytes.
    size: u64,
}

/// What a miss registered.
struct Registered {
    slice: RegionSlice,
    range: Range<u64>,
    exported: Option<Arc<Exported>>,
}

/// A registration in progress. Dropping it ends the announcement, also on a panic.
struct Announced<'a> {
    inner: &'a Inner,
    number: u64,
    range: Range<u64>,
}

enum Step<'a> {
    Found(RegionSlice),
    Register(Announced<'a>),
}

impl Inner {
    fn lock_pending(&self) -> MutexGuard<'_, Vec<Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> RwLockReadGuard<'_, Entries> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Entries> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    // As `Entries::find`.
    #[inline(always)]
    fn find(&self, wanted: &Wanted) -> Option<(RegionSlice, Option<Arc<Exported>>)> {
        self.read().find(&wanted.key, &wanted.range)
    }

    #[cold]
    fn miss(
        &self,
        wanted: &Wanted,
        mut growth: Growth,
        register: impl Fn(Range<u64>) -> Result<Registered, RegisterError>,
    ) -> Result<RegionSlice, RegisterError> {
        loop {
            let mut evicted = Vec::new();
            let step = self.announce(wanted, growth, &mut evicted);
            // Deregisters outside the locks, and before the new region needs the room.
            drop(evicted);
            let announced = match step? {
                Step::Found(slice) => return Ok(slice),
                Step::Register(announced) => announced,
            };
            let start = Instant::now();
            let answer = register(announced.range.clone());
            let nanoseconds = start.elapsed().as_nanos().try_into().unwrap_or(u64::MAX);
            self.registering.fetch_add(nanoseconds, Ordering::Relaxed);
            match answer {
                Ok(registered) => return Ok(self.keep(wanted, announced, growth, registered)),
                // The grown range may be too long for the device: try the requested one.
                Err(RegisterError::Refused { .. }) if announced.range != wanted.range => {
                    growth = Growth::Exact
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns an entry that another thread registered meanwhile, after waiting for it if necessary. Otherwise
    /// makes room for a registration and announces it.
    fn announce(
        &self,
        wanted: &Wanted,
        growth: Growth,
        evicted: &mut Vec<Kept>,
    ) -> Result<Step<'_>, RegisterError> {
        let mut pending = self.lock_pending();
        loop {
            if let Some((slice, _)) = self.find(wanted) {
                return Ok(Step::Found(slice));
            }
            let mut entries = self.write();
            let mut range = match growth {
                Growth::Exact => wanted.range.clone(),
                Growth::Adjoining => entries.grown(&wanted.key, wanted.range.clone()),
                Growth::Whole => 0..wanted.size,
            };
            let wait = pending.iter().any(|other| {
                let serves = match growth {
                    Growth::Exact => covers(&other.range, &wanted.range),
                    Growth::Adjoining | Growth::Whole => touches(&other.range, &range),
                };
                other.key == wanted.key && !other.doomed && serves
            });
            if wait {
                drop(entries);
                pending = self.ended.wait(pending).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let before = evicted.len();
            let mut fits = |range: &Range<u64>| {
                entries.make_room(&self.options, &pending, &wanted.key, range, growth, evicted)
            };
            if !fits(&range) {
                range = wanted.range.clone();
                if !fits(&range) {
                    return Err(entries.full(&self.options, &pending, &range));
                }
            }
            self.evictions.fetch_add((evicted.len() - before) as u64, Ordering::Relaxed);
            self.misses.fetch_add(1, Ordering::Relaxed);
            let number = entries.next_number();
            pending.push(Pending { number, key: wanted.key, range: range.clone(), doomed: false });
            return Ok(Step::Register(Announced { inner: self, number, range }));
        }
    }

    /// Inserts a new region in place of the entries that it covers.
    fn keep(
        &self,
        wanted: &Wanted,
        announced: Announced<'_>,
        growth: Growth,
        registered: Registered,
    ) -> RegionSlice {
        let Range { start, end } = wanted.range;
        let Registered { slice: all, range, exported } = registered;
        let slice = all.part(start - range.start, end - start);
        let mut replaced = Vec::new();
        {
            let mut pending = self.lock_pending();
            let doomed = announced.remove_from(&mut pending);
            let untold = exported.as_ref().is_some_and(|exported| exported.is_untold(&wanted.key.memory));
            if !doomed && !untold {
                let kept = Kept { slice: all, exported };
                self.write().insert(wanted.key, range, growth, kept, &mut replaced);
            }
        }
        slice
    }

    fn remove_if(&self, which: impl Fn(&Key) -> bool) -> usize {
        let mut removed = Vec::new();
        {
            let mut pending = self.lock_pending();
            pending
                .iter_mut()
                .filter(|pending| which(&pending.key))
                .for_each(|pending| pending.doomed = true);
            self.write().remove_if(which, &mut removed);
        }
        removed.len()
    }
}

impl Announced<'_> {
    /// Ends the announcement. Returns whether the entry was invalidated meanwhile.
    fn remove_from(&self, pending: &mut Vec<Pending>) -> bool {
        let at = pending.iter().position(|pending| pending.number == self.number);
        self.inner.ended.notify_all();
        at.is_some_and(|at| pending.swap_remove(at).doomed)
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.remove_from(&mut self.inner.lock_pending());
    }
}
