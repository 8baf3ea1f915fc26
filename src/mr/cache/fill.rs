//! What a miss does, and what the cache's lock guards.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::index::Index;
use super::key::{Key, tag};
use super::slot::Slot;
use super::{CacheOptions, CachedRegion, Growth, Inner};
use crate::dmabuf::DmaBuf;
use crate::error::RegistrationError;
use crate::mr::{Access, MemoryRegion};
use crate::observe::CacheGauges;
use crate::umem::check_range;
use crate::verbs::ProtectionDomain;
use crate::{Error, Result};

/// A request.
struct Wanted<'a> {
    key: Key,
    domain: &'a ProtectionDomain,
    buffer: &'a DmaBuf,
    offset: u64,
    length: u64,
    access: Access,
}

/// Bytes of a buffer, from `start` up to `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
}

impl Range {
    fn len(self) -> u64 {
        self.end - self.start
    }

    fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether they overlap or adjoin.
    fn touches(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn with(self, other: Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

/// What the lock guards. Entries are few enough to be looked through for a miss, next to a registration.
#[derive(Default)]
pub(super) struct State {
    entries: Vec<Entry>,
    pending: Vec<Pending>,
    next_pending: u64,
    /// Of the entries, and of the registrations that are under way.
    bytes: u64,
    /// Hits of entries that are gone, and what is no entry's.
    done: CacheGauges,
}

struct Entry {
    slot: &'static Slot,
    key: Key,
    range: Range,
    /// What the slot had counted before.
    hits_before: i64,
}

impl Entry {
    fn hits(&self) -> u64 {
        self.slot.hits().saturating_sub(self.hits_before).max(0) as u64
    }
}

/// A registration that is under way.
struct Pending {
    number: u64,
    key: Key,
    range: Range,
    /// Its buffer or domain was invalidated meanwhile: it is not kept.
    doomed: bool,
}

impl State {
    /// What it holds and did.
    pub(super) fn gauges(&self) -> CacheGauges {
        let mut sum = self.done;
        sum.hits += self.entries.iter().map(Entry::hits).sum::<u64>();
        sum.entries = self.entries.len() as u64;
        sum.bytes = self.entries.iter().map(|entry| entry.range.len()).sum();
        sum
    }

    /// Takes out the entries of these keys; the caller empties their slots, without the lock.
    pub(super) fn remove_if(&mut self, index: &Index, which: impl Fn(&Key) -> bool) -> Vec<&'static Slot> {
        self.pending
            .iter_mut()
            .filter(|pending| which(&pending.key))
            .for_each(|pending| pending.doomed = true);
        let mut leaving = Vec::new();
        while let Some(at) = self.entries.iter().position(|entry| which(&entry.key)) {
            self.entries[at].slot.retire();
            leaving.push(self.take_out(index, at));
        }
        leaving
    }

    /// Forgets an entry that was retired.
    fn take_out(&mut self, index: &Index, at: usize) -> &'static Slot {
        // In order of their registration, by which those that were used at one time go.
        let entry = self.entries.remove(at);
        index.remove(entry.slot);
        self.bytes -= entry.range.len();
        self.done.hits += entry.hits();
        entry.slot
    }

    /// What a miss registers: the range that was asked for, grown as the options say.
    fn grown(&self, wanted: &Wanted<'_>, exact: Range, growth: Growth) -> Range {
        match growth {
            Growth::Exact => exact,
            Growth::Whole => Range { start: 0, end: wanted.buffer.size() },
            Growth::Adjoining => {
                let mut grown = exact;
                // What it reaches may reach further.
                loop {
                    let alike = self.entries.iter().filter(|entry| entry.key == wanted.key);
                    let touching = alike.filter(|entry| entry.range.touches(grown));
                    let next = touching.fold(grown, |sum, entry| sum.with(entry.range));
                    if next == grown {
                        return grown;
                    }
                    grown = next;
                }
            }
        }
    }

    /// Entries that a region of this range replaces.
    fn replaced(&self, key: &Key, range: Range, growth: Growth) -> impl Iterator<Item = usize> {
        let replaces =
            move |entry: &Entry| growth != Growth::Exact && entry.key == *key && range.covers(entry.range);
        let places = self.entries.iter().enumerate().filter(move |(_, entry)| replaces(entry));
        places.map(|(at, _)| at)
    }

    /// Evicts until one more entry of this range fits; whether it does.
    fn make_room(
        &mut self,
        inner: &Inner,
        key: &Key,
        range: Range,
        growth: Growth,
        leaving: &mut Vec<&'static Slot>,
    ) -> bool {
        let CacheOptions { max_bytes, max_entries, .. } = inner.options;
        let mut used: Vec<*const Slot> = Vec::new();
        loop {
            let replaced: Vec<usize> = self.replaced(key, range, growth).collect();
            let freed: u64 = replaced.iter().map(|at| self.entries[*at].range.len()).sum();
            let bytes = (self.bytes - freed).checked_add(range.len());
            let entries = self.entries.len() - replaced.len() + self.pending.len() + 1;
            if bytes.is_some_and(|bytes| bytes <= max_bytes) && entries <= max_entries {
                return true;
            }
            let candidate = (0..self.entries.len())
                .filter(|at| !replaced.contains(at))
                .filter(|at| !used.contains(&std::ptr::from_ref(self.entries[*at].slot)))
                .filter(|at| !self.entries[*at].slot.seems_used())
                .min_by_key(|at| self.entries[*at].slot.stamp());
            let Some(at) = candidate else { return false };
            let slot = self.entries[at].slot;
            if slot.retire_if_unused() {
                leaving.push(self.take_out(&inner.index, at));
                self.done.evictions += 1;
            } else {
                used.push(slot);
            }
        }
    }

    fn full(&self, length: u64, options: &CacheOptions) -> Error {
        let used: Vec<_> = self.entries.iter().filter(|entry| entry.slot.seems_used()).collect();
        RegistrationError::CacheFull {
            length,
            used_bytes: used.iter().map(|entry| entry.range.len()).sum(),
            max_bytes: options.max_bytes,
            used_entries: used.len(),
            max_entries: options.max_entries,
        }
        .into()
    }
}

/// A registration that is under way, until it is dropped, by a panic too.
struct Announced<'a> {
    inner: &'a Inner,
    number: u64,
    range: Range,
}

impl Announced<'_> {
    /// Ends it, within the lock; whether it was doomed.
    fn end(self, state: &mut State) -> bool {
        let doomed = self.forget(state);
        std::mem::forget(self);
        doomed
    }

    fn forget(&self, state: &mut State) -> bool {
        let at = state.pending.iter().position(|pending| pending.number == self.number);
        let doomed = at.is_some_and(|at| state.pending.swap_remove(at).doomed);
        state.bytes -= self.range.len();
        self.inner.ended.notify_all();
        doomed
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.forget(&mut self.inner.lock());
    }
}

impl Inner {
    /// No entry was found at once.
    #[cold]
    #[inline(never)]
    pub(super) fn search(
        &self,
        domain: &ProtectionDomain,
        buffer: &DmaBuf,
        offset: u64,
        length: u64,
        access: Access,
    ) -> Result<CachedRegion> {
        let key = Key::of(domain, buffer, access);
        if let Some(slot) = self.index.take(&key, offset, length) {
            let now = self.clock.load(Ordering::SeqCst);
            slot.touch(now);
            self.index.put_first(slot, || self.clock.load(Ordering::SeqCst) == now);
            return Ok(CachedRegion { slot, offset, length });
        }
        self.miss(&Wanted { key, domain, buffer, offset, length, access })
    }

    /// No entry was found without the lock.
    fn miss(&self, wanted: &Wanted<'_>) -> Result<CachedRegion> {
        let Wanted { offset, length, .. } = *wanted;
        check_range(offset, length, wanted.buffer.size())?;
        wanted.access.check(wanted.buffer)?;
        let exact = Range { start: offset, end: offset + length };
        let mut growth = self.options.growth;
        loop {
            let mut leaving = Vec::new();
            let announced = match self.announce(wanted, exact, growth, &mut leaving) {
                Ok(Ok(announced)) => announced,
                Ok(Err(found)) => return Ok(found),
                Err(full) => {
                    leaving.into_iter().for_each(Slot::empty_if_drained);
                    return Err(full);
                }
            };
            // What made room goes before what takes it comes.
            leaving.into_iter().for_each(Slot::empty_if_drained);
            let range = announced.range;
            let start = Instant::now();
            let answer = MemoryRegion::builder(wanted.domain, wanted.buffer)
                .range(range.start, range.len())
                .access(wanted.access)
                .paths(self.options.paths)
                .register();
            let took = start.elapsed();
            match answer {
                Ok(region) => return Ok(self.keep(wanted, announced, growth, region, took)),
                // It may only have been too long for the device.
                Err(Error::Register { .. }) if range != exact => {
                    growth = Growth::Exact;
                    self.lock().done.registering += took;
                }
                Err(error) => {
                    self.lock().done.registering += took;
                    return Err(error);
                }
            }
        }
    }

    /// Makes room for a registration, or finds that another thread has made it: that is waited for.
    fn announce(
        &self,
        wanted: &Wanted<'_>,
        exact: Range,
        growth: Growth,
        leaving: &mut Vec<&'static Slot>,
    ) -> Result<Result<Announced<'_>, CachedRegion>> {
        let Wanted { key, offset, length, .. } = *wanted;
        let mut state = self.lock();
        loop {
            if let Some(slot) = self.index.take(&key, offset, length) {
                slot.touch(self.clock.load(Ordering::Relaxed));
                return Ok(Err(CachedRegion { slot, offset, length }));
            }
            let mut range = state.grown(wanted, exact, growth);
            let waits = state.pending.iter().any(|pending| {
                let same = pending.key == key && !pending.doomed;
                same && if growth == Growth::Exact {
                    pending.range.covers(exact)
                } else {
                    pending.range.touches(range)
                }
            });
            if waits {
                state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if !state.make_room(self, &key, range, growth, leaving) {
                range = exact;
                if !state.make_room(self, &key, range, growth, leaving) {
                    return Err(state.full(length, &self.options));
                }
            }
            state.done.misses += 1;
            state.bytes += range.len();
            state.next_pending += 1;
            let number = state.next_pending;
            state.pending.push(Pending { number, key, range, doomed: false });
            return Ok(Ok(Announced { inner: self, number, range }));
        }
    }

    /// Makes an entry of a region, in the place of those that it covers.
    fn keep(
        &self,
        wanted: &Wanted<'_>,
        announced: Announced<'_>,
        growth: Growth,
        region: MemoryRegion,
        took: Duration,
    ) -> CachedRegion {
        let Wanted { key, offset, length, .. } = *wanted;
        let range = announced.range;
        let mut leaving = Vec::new();
        let slot = {
            let mut state = self.lock();
            state.done.registering += took;
            let doomed = announced.end(&mut state);
            let stamp = self.clock.load(Ordering::Relaxed);
            let tag = tag(wanted.domain, wanted.buffer, wanted.access);
            let slot = Slot::with(region, (&key, tag), (range.start, range.end), stamp);
            slot.publish(!doomed);
            if !doomed {
                loop {
                    let Some(at) = state.replaced(&key, range, growth).next() else { break };
                    state.entries[at].slot.retire();
                    leaving.push(state.take_out(&self.index, at));
                }
                self.index.insert(slot);
                state.bytes += range.len();
                state.entries.push(Entry { slot, key, range, hits_before: slot.hits() });
                // What is used from here on is used later.
                self.clock.fetch_add(1, Ordering::SeqCst);
                self.index.forget_first();
            }
            slot
        };
        leaving.into_iter().for_each(Slot::empty_if_drained);
        CachedRegion { slot, offset, length }
    }
}
