//! The cache against a model that is a list, for a hundred thousand requests.

use std::collections::VecDeque;

use dmabuf_rdma::mr::{Access, CacheOptions, RegionCache, RegionSlice, RegisterError};
use dmabuf_rdma::{DmaBuf, Iova};

use crate::common::buffers::heap;
use crate::common::census::{Census, regions};
use crate::common::peers::domain;

const PAGE: u64 = 4096;
const SIZE: u64 = 64 * PAGE;
const BUFFERS: usize = 64;
const MAX_BYTES: u64 = 3900 * PAGE;
const MAX_ENTRIES: usize = 128;

/// An entry that the cache should have.
#[derive(Debug, Clone)]
struct Entry {
    number: u64,
    buffer: usize,
    start: u64,
    end: u64,
    used: u64,
}

#[derive(Default)]
struct Model {
    /// In the order of their registrations.
    entries: Vec<Entry>,
    /// Numbers of the entries that the test holds slices of.
    held: VecDeque<u64>,
    clock: u64,
    next: u64,
    hits: u64,
    misses: u64,
    evictions: u64,
}

impl Model {
    /// The entry that serves a request, or `None` if there is no room.
    fn get(&mut self, buffer: usize, start: u64, end: u64) -> Option<Entry> {
        let clock = self.clock;
        let covers = |e: &&mut Entry| e.buffer == buffer && e.start <= start && end <= e.end;
        if let Some(entry) = self.entries.iter_mut().find(covers) {
            entry.used = clock;
            self.hits += 1;
            return Some(entry.clone());
        }
        let (mut low, mut high) = (start, end);
        let touching = |e: &Entry, low, high| e.buffer == buffer && e.start <= high && low <= e.end;
        while let Some(e) =
            self.entries.iter().find(|e| touching(e, low, high) && (e.start < low || high < e.end))
        {
            (low, high) = (low.min(e.start), high.max(e.end));
        }
        if !self.room(buffer, low, high) {
            (low, high) = (start, end);
            if !self.room(buffer, low, high) {
                return None;
            }
        }
        self.misses += 1;
        self.entries.retain(|e| !(e.buffer == buffer && low <= e.start && e.end <= high));
        self.next += 1;
        let entry = Entry { number: self.next, buffer, start: low, end: high, used: self.clock };
        self.clock += 1;
        self.entries.push(entry.clone());
        Some(entry)
    }

    fn room(&mut self, buffer: usize, low: u64, high: u64) -> bool {
        loop {
            let replaced = |e: &Entry| e.buffer == buffer && low <= e.start && e.end <= high;
            let stays = self.entries.iter().filter(|e| !replaced(e));
            let (count, bytes) = stays.fold((0, 0), |(count, bytes), e| (count + 1, bytes + e.end - e.start));
            if count < MAX_ENTRIES && bytes + (high - low) <= MAX_BYTES {
                return true;
            }
            let unused = self.entries.iter().filter(|e| !replaced(e) && !self.held.contains(&e.number));
            let Some(victim) = unused.min_by_key(|e| (e.used, e.number)).map(|e| e.number) else {
                return false;
            };
            self.entries.retain(|e| e.number != victim);
            self.evictions += 1;
        }
    }
}

#[test]
fn the_cache_does_what_the_model_does() {
    let census = Census::take();
    {
        let domain = domain();
        let mut buffers: Vec<DmaBuf> = (0..BUFFERS).map(|_| heap(SIZE)).collect();
        let options = CacheOptions::default().max_bytes(MAX_BYTES).max_entries(MAX_ENTRIES);
        let (cache, mut model) = (RegionCache::new(options), Model::default());
        let mut slices: VecDeque<RegionSlice> = VecDeque::new();
        let before = regions();
        let (mut random, mut full) = (88_172_645_463_325_252_u64, 0);
        let mut draw = |below: u64| {
            // xorshift64: the same requests in every run.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for cycle in 0..100_000 {
            let at = draw(BUFFERS as u64) as usize;
            match draw(400) {
                // Another buffer of the same size takes the place of this one.
                0 => {
                    let there = model.entries.iter().filter(|e| e.buffer == at).count();
                    assert_eq!(cache.invalidate(buffers[at].id()), there, "cycle {cycle}");
                    model.entries.retain(|e| e.buffer != at);
                    buffers[at] = heap(SIZE);
                }
                1 => {
                    slices.clear();
                    model.held.clear();
                }
                _ => {
                    let start = draw(SIZE - 1);
                    let end = (start + 1 + draw(16 * PAGE)).min(SIZE);
                    let got = cache.get(&domain, &buffers[at], start..end, Access::REMOTE);
                    match (got, model.get(at, start, end)) {
                        (Ok(slice), Some(expected)) => {
                            assert_eq!((slice.iova(), slice.len()), (Iova(start), end - start));
                            let umem = slice.region().umem();
                            assert_eq!(umem.buffer(), buffers[at].id(), "cycle {cycle}");
                            let range = (umem.offset(), umem.offset() + umem.len());
                            assert_eq!(range, (expected.start, expected.end), "cycle {cycle}");
                            if draw(4) == 0 {
                                slices.push_back(slice);
                                model.held.push_back(expected.number);
                            }
                            if slices.len() > 24 {
                                slices.pop_front();
                                model.held.pop_front();
                            }
                        }
                        (Err(RegisterError::CacheFull { .. }), None) => full += 1,
                        (got, expected) => panic!("cycle {cycle}: {got:?}, not {expected:?}"),
                    }
                }
            }
        }
        let now = cache.gauges();
        assert_eq!((now.hits, now.misses, now.evictions), (model.hits, model.misses, model.evictions));
        assert_eq!(now.entries, model.entries.len() as u64);
        slices.clear();
        assert_eq!(regions() - before, model.entries.len(), "one region for each entry");
        assert!(now.hits > 10_000 && now.evictions > 1000, "{now:?}, full {full} times");
    }
    census.assert_unchanged();
}
