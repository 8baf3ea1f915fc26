//! Registrations that are kept for the next request.
//!
//! | file | what |
//! |---|---|
//! | `key.rs` | what an entry is found by |
//! | `slot.rs` | an entry, and how handles are counted |
//! | `index.rs` | finding it |
//! | `fill.rs` | a miss: registering, merging, making room |
//! | `thread.rs`, `barrier.rs` | what makes a hit cheap |

mod barrier;
mod fill;
mod index;
mod key;
mod slot;
mod thread;

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};

use self::fill::State;
use self::index::Index;
use self::key::Key;
use self::slot::Slot;
pub(crate) use self::thread::{PLACES, own as own_place, place as shared_place};
use super::path::IMPORT;
use super::{Access, Lkey, MemoryRegion, Path, Rkey};
use crate::Result;
use crate::dmabuf::{BufferId, DmaBuf};
use crate::observe::CacheGauges;
use crate::transfer::{RemoteRegion, RemoteRun};
use crate::umem::{Iova, check_range};
use crate::verbs::{ProtectionDomain, Sge};

/// What a cache keeps, and what it registers on a miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Most bytes that entries map together. Default: no limit.
    pub max_bytes: u64,
    /// Most entries, at least 1. Default 1024.
    pub max_entries: usize,
    /// What a miss registers. Default [`Growth::Adjoining`].
    pub growth: Growth,
    /// The importing paths that are tried, as
    /// [`MemoryRegionBuilder::paths`](super::MemoryRegionBuilder::paths) has them.
    pub paths: &'static [Path],
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { max_bytes: u64::MAX, max_entries: 1024, growth: Growth::default(), paths: IMPORT }
    }
}

/// What a miss registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Growth {
    /// The range that was asked for, and nothing else.
    Exact,
    /// That and the entries that overlap or adjoin it, as one region in their place: neighbours grow
    /// together, and no byte is registered that nobody asked for.
    #[default]
    Adjoining,
    /// The whole buffer, so that each buffer misses once. Peers then reach all of it.
    Whole,
}

/// A cache of registrations, by buffer, protection domain and access. Clones are the same cache.
///
/// A buffer is known by its identity (inode and size), never by a descriptor's number or by an address. An
/// entry's region holds the buffer in the kernel, so the inode of an entry cannot become another
/// buffer's: closing descriptors, freeing the buffer and making another never leads to a wrong key. It
/// also means that memory stays until its entries go: [`invalidate`](Self::invalidate) a buffer when you
/// free it, or let newer entries push it out.
///
/// Two dma-bufs may share memory, as V4L2's EXPBUF makes; they are two buffers here.
#[derive(Clone)]
pub struct RegionCache {
    inner: Arc<Inner>,
}

struct Inner {
    index: Index,
    /// Goes on with each miss. An entry's stamp is what it was when the entry was used. Entries that are
    /// found at once were used since it last went on.
    clock: AtomicU64,
    options: CacheOptions,
    state: Mutex<State>,
    /// A registration has ended.
    ended: Condvar,
}

/// The caches of this process, and what those that are gone had done.
static CACHES: Mutex<(Vec<Weak<Inner>>, Option<CacheGauges>)> = Mutex::new((Vec::new(), None));

/// What all caches of the process hold and did.
pub(crate) fn all_caches() -> CacheGauges {
    let caches: Vec<Arc<Inner>>;
    let mut sum;
    {
        let known = CACHES.lock().unwrap_or_else(|poison| poison.into_inner());
        caches = known.0.iter().filter_map(Weak::upgrade).collect();
        sum = known.1.unwrap_or_default();
    }
    caches.iter().for_each(|cache| sum.add(cache.lock().gauges()));
    sum
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(|poison| poison.into_inner());
        let leaving = state.remove_if(&self.index, |_| true);
        let mut done = state.gauges();
        {
            let mut known = CACHES.lock().unwrap_or_else(|poison| poison.into_inner());
            done.add(known.1.unwrap_or_default());
            known.1 = Some(done);
            known.0.retain(|cache| cache.strong_count() > 0);
        }
        leaving.into_iter().for_each(Slot::empty_if_drained);
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
    /// An empty cache.
    pub fn new(options: CacheOptions) -> Self {
        barrier::prepare();
        let options = CacheOptions { max_entries: options.max_entries.max(1), ..options };
        let inner = Arc::new(Inner {
            index: Index::new(options.max_entries),
            clock: AtomicU64::new(1),
            options,
            state: Mutex::default(),
            ended: Condvar::new(),
        });
        let mut known = CACHES.lock().unwrap_or_else(|poison| poison.into_inner());
        known.0.push(Arc::downgrade(&inner));
        Self { inner }
    }

    /// A region that covers `length` bytes from `offset` of a buffer: a cached one, or a new one that is
    /// kept. Regions in a cache are addressed by the offset in the buffer.
    ///
    /// A hit takes no lock and writes nothing that another thread reads. Of several threads that miss on
    /// one range at once one registers, and the others wait for it.
    ///
    /// # Errors
    /// Of a miss only:
    /// - [`RegistrationError::CacheFull`](crate::error::RegistrationError::CacheFull): what is in use leaves
    ///   no room within the limits.
    /// - What [`MemoryRegionBuilder::register`](super::MemoryRegionBuilder::register) says.
    #[inline(always)]
    pub fn get(
        &self,
        domain: &ProtectionDomain,
        buffer: &DmaBuf,
        offset: u64,
        length: u64,
        access: Access,
    ) -> Result<CachedRegion> {
        let inner = &*self.inner;
        let tag = key::tag(domain, buffer, access);
        let slot = inner.index.first(tag);
        match slot.take_at_once(tag, offset, length) {
            Some(()) => Ok(CachedRegion { slot, offset, length }),
            None => inner.search(domain, buffer, offset, length, access),
        }
    }

    /// Drops the entries of a buffer; returns how many. Those in use go with their last handle, and are
    /// not found any more. A registration that is under way is not kept.
    ///
    /// The identity may be kept beside a buffer that is closed: as long as there are entries of it, no
    /// other buffer can have it.
    pub fn invalidate(&self, buffer: BufferId) -> usize {
        self.remove_if(|key| key.is_of_buffer(buffer))
    }

    /// Drops the entries of a protection domain, as [`invalidate`](Self::invalidate) those of a buffer:
    /// before its device goes away, since an entry holds its domain and that its context.
    pub fn invalidate_domain(&self, domain: &ProtectionDomain) -> usize {
        self.remove_if(|key| key.is_of_domain(domain))
    }

    /// Drops all entries.
    pub fn clear(&self) -> usize {
        self.remove_if(|_| true)
    }

    fn remove_if(&self, which: impl Fn(&Key) -> bool) -> usize {
        let leaving = self.inner.lock().remove_if(&self.inner.index, which);
        let count = leaving.len();
        // Deregistered without the lock.
        leaving.into_iter().for_each(Slot::empty_if_drained);
        count
    }

    /// What it holds and did.
    pub fn gauges(&self) -> CacheGauges {
        self.inner.lock().gauges()
    }

    /// What it was made with.
    pub fn options(&self) -> CacheOptions {
        self.inner.options
    }
}

impl Default for RegionCache {
    fn default() -> Self {
        Self::new(CacheOptions::default())
    }
}

/// A handle of a cached region, for the range that was asked for. As long as one lives the region stays
/// registered, whatever becomes of the entry, the cache and the buffer's descriptors.
///
/// Clones are of the same region. The last handle of an entry that left the cache deregisters it as it is
/// dropped.
pub struct CachedRegion {
    slot: &'static Slot,
    offset: u64,
    length: u64,
}

impl CachedRegion {
    /// The region, which may be larger than what was asked for.
    pub fn region(&self) -> &MemoryRegion {
        // SAFETY: this is a handle.
        unsafe { self.slot.region() }
    }

    /// Offset of the range in its buffer, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length of the range in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range is not registered
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Address of the range's first byte: its offset in the buffer.
    pub fn iova(&self) -> Iova {
        Iova(self.offset)
    }

    /// The key for this side's work requests.
    pub fn lkey(&self) -> Lkey {
        self.region().lkey()
    }

    /// The key for a peer's.
    pub fn rkey(&self) -> Rkey {
        self.region().rkey()
    }

    /// `length` bytes from `offset` of the range, for a work request.
    ///
    /// # Errors
    /// As [`MemoryRegion::sge`].
    pub fn sge(&self, offset: u64, length: u64) -> Result<Sge<'_>> {
        check_range(offset, length, self.length)?;
        let region = self.region();
        region.sge(self.offset - region.umem().offset() + offset, length)
    }

    /// What a peer must know to read and write the range. The key permits the whole region, of which the
    /// description has only the range.
    pub fn remote(&self) -> RemoteRegion {
        let region = self.region();
        let run = RemoteRun { iova: self.iova(), length: self.length, rkey: region.rkey() };
        RemoteRegion::new([run], region.access(), region.umem().buffer())
            .expect("the range lies in a region and is not empty")
    }
}

impl Clone for CachedRegion {
    fn clone(&self) -> Self {
        self.slot.take();
        Self { slot: self.slot, offset: self.offset, length: self.length }
    }
}

impl Drop for CachedRegion {
    #[inline]
    fn drop(&mut self) {
        self.slot.give_back();
    }
}

impl fmt::Debug for CachedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offset, length, .. } = self;
        f.debug_struct("CachedRegion")
            .field("offset", offset)
            .field("length", length)
            .field("region", self.region())
            .finish()
    }
}
