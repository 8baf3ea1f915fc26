//! The list itself.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::hint;
use std::slice;

use super::view::Spans;
use super::wire::{SgeGroups, SgeLimits};
use super::{Blocks, DmaSg, DmaSgBuilder, DmaSgView, PageSizes};
use crate::Result;
use crate::mr::Lkey;
use crate::umem::Iova;

/// A list of runs, in the order of the bytes they hold. Never empty.
///
/// Two lists are equal when they cover the same addresses in the same order, however these are cut into
/// runs; [`runs`](Self::runs) shows the cuts. A byte is found in O(log n). Memory is 16 bytes a run,
/// and about 2 bytes a run for the index, which one run does without.
#[derive(Clone)]
pub struct DmaSgList {
    runs: Runs,
    total: u64,
}

/// One run, as every region's iova makes it, is not worth an allocation.
#[derive(Clone)]
enum Runs {
    One(DmaSg),
    Many(Box<Indexed>),
}

/// Two runs or more.
#[derive(Clone)]
struct Indexed {
    runs: Box<[DmaSg]>,
    /// The offset at which each stride of runs begins, and the end.
    index: Box<[u64]>,
    /// Strides a byte, as a fraction of 2^64.
    scale: u64,
}

/// Runs under one entry of the index: a cache line of them, or two that are fetched at once, and few enough
/// that the processor is at the next lookups while memory still answers this one.
pub(super) const STRIDE: usize = 4;

impl DmaSgList {
    /// A list of one run. Whoever calls has checked it: not empty, no overflow.
    #[inline]
    pub(crate) fn single(run: DmaSg) -> Self {
        debug_assert!(run.len > 0 && run.addr.checked_add(run.len).is_some());
        Self { runs: Runs::One(run), total: run.len }
    }

    /// What the builder checked and indexed.
    pub(super) fn from_checked(runs: Box<[DmaSg]>, index: Box<[u64]>, total: u64) -> Self {
        if let [run] = *runs {
            return Self::single(run);
        }
        let strides = index.len() - 1;
        debug_assert_eq!(strides, runs.len().div_ceil(STRIDE));
        debug_assert_eq!((index[0], index[strides]), (0, total));
        // No more strides than bytes.
        let scale = (((strides as u128) << 64) / u128::from(total)).min(u64::MAX.into()) as u64;
        Self { runs: Runs::Many(Box::new(Indexed { runs, index, scale })), total }
    }

    /// A list of these runs, neighbours merged.
    ///
    /// # Errors
    /// As [`DmaSgBuilder::push`] and [`DmaSgBuilder::finish`].
    #[inline]
    pub fn from_runs(runs: impl IntoIterator<Item = DmaSg>) -> Result<Self> {
        let mut builder = DmaSgBuilder::new();
        builder.extend(runs)?;
        builder.finish()
    }

    /// Lists, or ranges of lists, one after the other: a buffer made of several dma-bufs.
    ///
    /// # Errors
    /// [`AddressError::TotalOverflow`](crate::error::AddressError::TotalOverflow): longer than 64 bits count;
    /// [`Error::ZeroLength`](crate::Error::ZeroLength): no list at all.
    pub fn concat<'a>(parts: impl IntoIterator<Item: Into<DmaSgView<'a>>>) -> Result<Self> {
        let mut builder = DmaSgBuilder::new();
        for part in parts {
            builder.extend(part.into().runs())?;
        }
        builder.finish()
    }

    /// The runs, in order.
    #[inline]
    pub fn runs(&self) -> &[DmaSg] {
        match &self.runs {
            Runs::One(run) => slice::from_ref(run),
            Runs::Many(many) => &many.runs,
        }
    }

    /// Length of all runs together in bytes.
    #[inline]
    pub fn total_len(&self) -> u64 {
        self.total
    }

    /// The run that holds the byte at `offset` of the list, cut so that it begins with that byte;
    /// `None` past the end.
    #[inline]
    pub fn run_at(&self, offset: u64) -> Option<DmaSg> {
        let (at, skip) = self.find(offset)?;
        let run = self.runs()[at];
        Some(DmaSg { addr: run.addr + skip, len: run.len - skip })
    }

    /// Which run holds the byte at `offset`, and how far into it.
    #[inline]
    pub(super) fn find(&self, offset: u64) -> Option<(usize, u64)> {
        if offset >= self.total {
            return None;
        }
        match &self.runs {
            Runs::One(_) => Some((0, offset)),
            Runs::Many(many) => Some(many.find(offset)),
        }
    }

    /// All of the list as a view.
    pub fn as_view(&self) -> DmaSgView<'_> {
        DmaSgView::whole(self)
    }

    /// `length` bytes from `offset`, without copying: the first and the last run are cut as they are
    /// read.
    ///
    /// # Errors
    /// [`Error::ZeroLength`](crate::Error::ZeroLength),
    /// [`Error::OutOfRange`](crate::Error::OutOfRange): the range is empty or not inside the list.
    pub fn view(&self, offset: u64, length: u64) -> Result<DmaSgView<'_>> {
        self.as_view().view(offset, length)
    }

    /// Of all of it: see [`DmaSgView::best_page_size`].
    ///
    /// # Errors
    /// As there.
    pub fn best_page_size(&self, supported: PageSizes, iova: Iova) -> Result<u64> {
        self.as_view().best_page_size(supported, iova)
    }

    /// Of all of it: see [`DmaSgView::blocks`].
    ///
    /// # Errors
    /// As there.
    pub fn blocks(&self, page_size: u64, iova: Iova) -> Result<Blocks<'_>> {
        self.as_view().blocks(page_size, iova)
    }

    /// Of all of it: see [`DmaSgView::sges`].
    ///
    /// # Errors
    /// As there.
    pub fn sges(&self, lkey: Lkey, limits: SgeLimits) -> Result<SgeGroups<'_>> {
        self.as_view().sges(lkey, limits)
    }
}

impl Indexed {
    /// Which run holds the byte at `offset`, which is inside, and how far into it.
    #[inline]
    fn find(&self, offset: u64) -> (usize, u64) {
        let stride = self.stride_of(offset);
        let first = stride * STRIDE;
        let within = offset - self.index[stride];
        let rest = &self.runs[first..];
        let (at, skip) = match rest.first_chunk::<STRIDE>() {
            Some(stride) => run_of(stride, within),
            None => run_of(rest, within),
        };
        (first + at, skip)
    }

    /// Which stride holds the byte at `offset`: near where it would be if all runs were of one length, as
    /// pages are, and from there outwards in doubling steps.
    #[inline]
    fn stride_of(&self, offset: u64) -> usize {
        let guess = ((u128::from(offset) * u128::from(self.scale)) >> 64) as usize;
        match self.index[guess..] {
            [start, end, ..] if start <= offset && offset < end => guess,
            _ => self.stride_near(guess, offset),
        }
    }

    #[cold]
    fn stride_near(&self, guess: usize, offset: u64) -> usize {
        let index = &self.index;
        let last = index.len() - 1;
        let (mut low, mut high) = (guess, guess);
        let mut step = 1;
        while index[low] > offset {
            high = low;
            low = low.saturating_sub(step);
            step *= 2;
        }
        step = 1;
        while index[high] <= offset {
            low = high;
            high = (high + step).min(last);
            step *= 2;
        }
        low + index[low..high].partition_point(|&start| start <= offset) - 1
    }
}

/// Which of a stride's runs holds the byte `within` it, and how far into the run.
///
/// All of the stride, without a branch on what was read: the processor then goes on to the next lookup while
/// memory still answers this one.
#[inline(always)]
fn run_of(stride: &[DmaSg], within: u64) -> (usize, u64) {
    let (mut at, mut start, mut end) = (0, 0, 0);
    for run in stride {
        end += run.len;
        let past = end <= within;
        at += usize::from(past);
        start = hint::select_unpredictable(past, end, start);
    }
    (at, within - start)
}

impl PartialEq for DmaSgList {
    fn eq(&self, other: &Self) -> bool {
        self.as_view() == other.as_view()
    }
}

impl Eq for DmaSgList {}

impl Hash for DmaSgList {
    /// Of the merged runs, as equality is.
    fn hash<H: Hasher>(&self, state: &mut H) {
        Spans::new(self.as_view()).for_each(|span| span.hash(state));
    }
}

impl fmt::Debug for DmaSgList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.as_view(), f)
    }
}

impl fmt::Display for DmaSgList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.as_view(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::super::model;
    use super::*;
    use crate::Error;
    use proptest::prelude::*;
    use std::collections::hash_map::DefaultHasher;

    #[test]
    fn a_byte_is_found_in_its_run() {
        let runs = [DmaSg { addr: 0x1000, len: 0x1000 }, DmaSg { addr: 1 << 40, len: 5 << 30 }];
        let list = DmaSgList::from_runs(runs).unwrap();
        assert_eq!(list.total_len(), (5 << 30) + 0x1000);
        assert_eq!(list.run_at(0xfff), Some(DmaSg { addr: 0x1fff, len: 1 }));
        assert_eq!(list.run_at(0x1000), Some(runs[1]));
        assert_eq!(list.run_at((5 << 30) + 0xfff).map(|run| run.len), Some(1));
        assert_eq!(list.run_at((5 << 30) + 0x1000), None);
    }

    #[test]
    fn memory_stays_within_24_bytes_a_run_and_one_run_has_no_index() {
        assert!(matches!(DmaSgList::single(DmaSg { addr: 0, len: 1 << 40 }).runs, Runs::One(_)));
        for n in [STRIDE, STRIDE + 1, 1000] {
            let list = model::scattered(n);
            assert_eq!(list.runs().len(), n);
            let Runs::Many(many) = &list.runs else { panic!("{n} runs as one") };
            assert!(many.index.len() * 8 <= n * 8, "{n} runs, {} entries", many.index.len());
        }
    }

    /// Lengths of which no guess is near.
    #[test]
    fn a_byte_is_found_among_runs_of_uneven_length() {
        let mut builder = DmaSgBuilder::new();
        for i in 0..3000_u64 {
            let len = if i % 1000 < 990 { 1 + i % 3 } else { 1 << (i % 45) };
            builder.push(DmaSg { addr: i << 50 >> 1 | 1, len }).unwrap();
        }
        let list = builder.finish().unwrap();
        let mut offset = 0;
        for &run in list.runs() {
            assert_eq!(list.run_at(offset), Some(run));
            let last = DmaSg { addr: run.addr + run.len - 1, len: 1 };
            assert_eq!(list.run_at(offset + run.len - 1), Some(last));
            offset += run.len;
        }
        assert_eq!(list.run_at(offset), None);
    }

    fn hash(list: &DmaSgList) -> u64 {
        let mut hasher = DefaultHasher::new();
        list.hash(&mut hasher);
        hasher.finish()
    }

    proptest! {
        /// Against the addresses of all bytes, one by one.
        #[test]
        fn lookup_agrees_with_counting_bytes(list in model::list()) {
            let bytes = model::bytes(list.as_view());
            prop_assert_eq!(bytes.len() as u64, list.total_len());
            for (offset, &addr) in bytes.iter().enumerate() {
                let run = list.run_at(offset as u64).unwrap();
                prop_assert_eq!(run.addr, addr);
                prop_assert_eq!(&bytes[offset..][..run.len as usize], &(addr..addr + run.len).collect::<Vec<_>>());
            }
            prop_assert_eq!(list.run_at(list.total_len()), None);
            prop_assert_eq!(list.run_at(u64::MAX), None);
        }

        /// Against equality of the addresses of all bytes.
        #[test]
        fn equality_and_hash_go_by_coverage(left in model::list(), right in model::list()) {
            let same = model::bytes(left.as_view()) == model::bytes(right.as_view());
            prop_assert_eq!(left == right, same);
            // Cut otherwise: every byte a run of its own.
            let mut cut = DmaSgBuilder::new();
            for addr in model::bytes(left.as_view()) {
                cut.push_apart(DmaSg { addr, len: 1 }).unwrap();
            }
            let cut = cut.finish().unwrap();
            prop_assert_eq!(cut.runs().len() as u64, left.total_len());
            prop_assert_eq!(&cut, &left);
            prop_assert_eq!(hash(&cut), hash(&left));
        }

        #[test]
        fn a_concatenation_has_the_bytes_of_its_parts(parts in prop::collection::vec(model::list(), 1..5)) {
            let whole = DmaSgList::concat(&parts).unwrap();
            let expected: Vec<_> = parts.iter().flat_map(|part| model::bytes(part.as_view())).collect();
            prop_assert_eq!(model::bytes(whole.as_view()), expected);
            prop_assert!(whole.runs().windows(2).all(|w| w[0].addr + w[0].len != w[1].addr), "not merged");
        }

        /// Any input whatever: no panic, and an error exactly where the sums say so.
        #[test]
        fn any_runs_are_taken_or_refused_by_name(
            runs in prop::collection::vec((model::edge(), model::edge()), 0..6)
        ) {
            let mut total = 0_u128;
            let mut expected = "";
            for &(addr, len) in &runs {
                total += u128::from(len);
                expected = if len == 0 {
                    "zero"
                } else if u128::from(addr) + u128::from(len) > u128::from(u64::MAX) {
                    "address"
                } else if total > u128::from(u64::MAX) {
                    "total"
                } else {
                    continue;
                };
                break;
            }
            if runs.is_empty() {
                expected = "zero";
            }
            let built = DmaSgList::from_runs(runs.into_iter().map(|(addr, len)| DmaSg { addr, len }));
            let seen = match &built {
                Ok(list) => {
                    prop_assert_eq!(u128::from(list.total_len()), total);
                    ""
                }
                Err(Error::ZeroLength { .. }) => "zero",
                Err(Error::Addresses(crate::error::AddressError::AddressOverflow { .. })) => "address",
                Err(Error::Addresses(crate::error::AddressError::TotalOverflow { .. })) => "total",
                Err(other) => panic!("{other}"),
            };
            prop_assert_eq!(seen, expected);
        }
    }
}
