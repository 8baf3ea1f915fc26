//! The cache's map and its policy: lookup, growth, eviction.

use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustc_hash::FxHashMap;

use super::pointers::{Allocation, Exported};
use super::{CacheOptions, Growth};
use crate::dmabuf::BufferId;
use crate::mr::{Access, Buffer, RegionSlice, RegisterError};
use crate::verbs::ProtectionDomain;

/// The memory of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    Buffer(BufferId),
    /// An allocation of a runtime, looked up by a pointer.
    Allocation(Allocation),
}

/// The key of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub memory: Memory,
    /// Address of the domain's C object. An entry holds its domain, so no other domain can get this address.
    pub domain: usize,
    pub access: Access,
    /// Whether the descriptor is writable: a read-only one must not find an entry with write access.
    pub writable: bool,
}

/// The other fields tell few keys apart, and each would cost a hit a nanosecond.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let memory = match &self.memory {
            Memory::Buffer(buffer) => buffer.inode(),
            Memory::Allocation(allocation) => allocation.base,
        };
        (memory, self.domain).hash(state);
    }
}

impl Key {
    pub(super) fn new(domain: &ProtectionDomain, buffer: Buffer<'_>, access: Access) -> Self {
        let (memory, writable) = (Memory::Buffer(buffer.id()), buffer.is_writable());
        Self { memory, domain: Self::domain_of(domain), access, writable }
    }

    /// Runtimes export memory writable.
    pub(super) fn of_allocation(domain: &ProtectionDomain, of: Allocation, access: Access) -> Self {
        let memory = Memory::Allocation(of);
        Self { memory, domain: Self::domain_of(domain), access, writable: true }
    }

    pub(super) fn domain_of(domain: &ProtectionDomain) -> usize {
        domain.as_raw().as_ptr().addr()
    }
}

/// Whether `range` contains all of `other`.
pub(super) fn covers(range: &Range<u64>, other: &Range<u64>) -> bool {
    range.start <= other.start && other.end <= range.end
}

/// Whether two ranges overlap or adjoin.
pub(super) fn touches(range: &Range<u64>, other: &Range<u64>) -> bool {
    range.start <= other.end && other.start <= range.end
}

fn len(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// A registration in progress.
pub(super) struct Pending {
    pub number: u64,
    pub key: Key,
    pub range: Range<u64>,
    /// Whether its buffer or domain was invalidated meanwhile, so that it will not be kept.
    pub doomed: bool,
}

/// Registered memory, which is dropped without a lock.
pub(super) struct Kept {
    /// All of it.
    pub slice: RegionSlice,
    /// What a runtime exported, for registrations on other devices.
    pub exported: Option<Arc<Exported>>,
}

struct Entry {
    kept: Kept,
    range: Range<u64>,
    /// The clock when it was inserted, and when it was last used.
    inserted: u64,
    used: AtomicU64,
}

/// The entries. Each key has few, so a lookup scans them.
#[derive(Default)]
pub(super) struct Entries {
    map: FxHashMap<Key, Vec<Entry>>,
    /// Advances with each insertion. The last use of an entry is the clock's value at that time.
    clock: u64,
    next_number: u64,
    /// Kept here, beside the lock's cache line, which a hit writes anyway.
    hits: AtomicU64,
}

impl Entries {
    pub(super) fn len(&self) -> usize {
        self.map.values().map(Vec::len).sum()
    }

    /// Bytes that the entries map, saturating.
    pub(super) fn bytes(&self) -> u64 {
        self.iter().map(|(_, entry)| len(&entry.range)).fold(0, u64::saturating_add)
    }

    pub(super) fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn iter(&self) -> impl Iterator<Item = (&Key, &Entry)> {
        self.map.iter().flat_map(|(key, entries)| entries.iter().map(move |entry| (key, entry)))
    }

    /// A slice of an entry that covers the range, and what was exported if it may have changed since. The entry counts
    /// as used now.
    // A hit takes 23 ns with the two attributes of this name and 27 without: `cargo xtask bench cache`.
    #[inline(always)]
    pub(super) fn find(&self, key: &Key, range: &Range<u64>) -> Option<(RegionSlice, Option<Arc<Exported>>)> {
        let entry = self.map.get(key)?.iter().find(|entry| covers(&entry.range, range))?;
        self.hits.fetch_add(1, Ordering::Relaxed);
        // Write only a change, so that threads with hits on one entry share its cache line.
        if entry.used.load(Ordering::Relaxed) != self.clock {
            entry.used.store(self.clock, Ordering::Relaxed);
        }
        let offset = range.start - entry.range.start;
        let watched = entry.kept.exported.as_ref().filter(|exported| exported.is_watched()).cloned();
        Some((entry.kept.slice.part(offset, len(range)), watched))
    }

    /// What an entry of any domain keeps of this part of an allocation.
    pub(super) fn exported(&self, of: &Allocation, range: &Range<u64>) -> Option<Arc<Exported>> {
        let same = |(key, _): &(&Key, &Entry)| key.memory == Memory::Allocation(*of);
        let exported = self.iter().filter(same).filter_map(|(_, entry)| entry.kept.exported.clone());
        exported.into_iter().find(|exported| covers(&exported.covers, range))
    }

    /// The range merged with all entries that it touches, and those that the merged range touches.
    pub(super) fn grown(&self, key: &Key, range: Range<u64>) -> Range<u64> {
        let alike = self.map.get(key).map_or(&[][..], Vec::as_slice);
        let mut grown = range;
        loop {
            let touching = alike.iter().map(|entry| &entry.range).filter(|range| touches(range, &grown));
            let next =
                touching.fold(grown.clone(), |sum, range| sum.start.min(range.start)..sum.end.max(range.end));
            if next == grown {
                return grown;
            }
            grown = next;
        }
    }

    /// Evicts entries until a new one of this range fits the limits. If it cannot fit, evicts nothing and returns
    /// false. Entries that the new one replaces do not count.
    pub(super) fn make_room(
        &mut self,
        options: &CacheOptions,
        pending: &[Pending],
        key: &Key,
        range: &Range<u64>,
        growth: Growth,
        evicted: &mut Vec<Kept>,
    ) -> bool {
        let (max_bytes, max_entries) = (u128::from(options.max_bytes), options.max_entries);
        let busy: u128 = pending.iter().map(|pending| u128::from(len(&pending.range))).sum();
        let stays = |(of, entry): &(&Key, &Entry)| !is_replaced(of, entry, key, range, growth);
        // An unused entry stays unused: a new handle needs this lock or another handle.
        let unused = |(_, entry): &(&Key, &Entry)| !entry.kept.slice.is_shared();
        let fits = |entries: &mut dyn Iterator<Item = (&Key, &Entry)>| {
            let new = (busy + u128::from(len(range)), pending.len() + 1);
            let add = |(bytes, count), (_, entry): (&Key, &Entry)| {
                (bytes + u128::from(len(&entry.range)), count + 1)
            };
            let (bytes, count) = entries.fold(new, add);
            bytes <= max_bytes && count <= max_entries
        };
        if !fits(&mut self.iter().filter(stays).filter(|entry| !unused(entry))) {
            return false;
        }
        loop {
            if fits(&mut self.iter().filter(stays)) {
                return true;
            }
            let unused = self.iter().filter(stays).filter(unused);
            let oldest = unused.min_by_key(|(_, entry)| (entry.used.load(Ordering::Relaxed), entry.inserted));
            let Some((of, inserted)) = oldest.map(|(of, entry)| (*of, entry.inserted)) else { return false };
            self.remove_entries(|key, entry| *key == of && entry.inserted == inserted, evicted);
        }
    }

    /// The error of a request that does not fit.
    pub(super) fn full(
        &self,
        options: &CacheOptions,
        pending: &[Pending],
        range: &Range<u64>,
    ) -> RegisterError {
        let used = self.iter().filter(|(_, entry)| entry.kept.slice.is_shared());
        let used: Vec<_> = used.map(|(_, entry)| len(&entry.range)).collect();
        let busy = pending.iter().map(|pending| len(&pending.range));
        RegisterError::CacheFull {
            length: len(range),
            used_bytes: used.iter().copied().chain(busy).fold(0, u64::saturating_add),
            max_bytes: options.max_bytes,
            used_entries: used.len() + pending.len(),
            max_entries: options.max_entries,
        }
    }

    /// Inserts a region and removes the entries that it replaces.
    pub(super) fn insert(
        &mut self,
        key: Key,
        range: Range<u64>,
        growth: Growth,
        kept: Kept,
        replaced: &mut Vec<Kept>,
    ) {
        self.remove_entries(|of, entry| is_replaced(of, entry, &key, &range, growth), replaced);
        let now = self.clock;
        self.clock += 1;
        let entry = Entry { kept, range, inserted: now, used: AtomicU64::new(now) };
        self.map.entry(key).or_default().push(entry);
    }

    /// Removes the entries of the keys that match.
    pub(super) fn remove_if(&mut self, which: impl Fn(&Key) -> bool, removed: &mut Vec<Kept>) {
        self.remove_entries(|key, _| which(key), removed);
    }

    /// Removes the entries that keep this export.
    pub(super) fn remove_exported(&mut self, gone: &Arc<Exported>, removed: &mut Vec<Kept>) {
        let keeps = |entry: &Entry| entry.kept.exported.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, gone));
        self.remove_entries(|_, entry| keeps(entry), removed);
    }

    fn remove_entries(&mut self, which: impl Fn(&Key, &Entry) -> bool, removed: &mut Vec<Kept>) {
        self.map.retain(|key, entries| {
            removed.extend(entries.extract_if(.., |entry| which(key, entry)).map(|entry| entry.kept));
            !entries.is_empty()
        });
    }
}

fn is_replaced(of: &Key, entry: &Entry, key: &Key, range: &Range<u64>, growth: Growth) -> bool {
    growth != Growth::Exact && of == key && covers(range, &entry.range)
}
