//! The list and its index.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::hint;
use std::ops::RangeBounds;
use std::slice;

use crate::view::Spans;
use crate::{Blocks, DmaSg, DmaSgBuilder, DmaSgView, Iova, PageSizes, Result, SgeGroups, SgeLimits};

/// A list of runs of device addresses, in the order of a buffer's bytes. It is never empty.
///
/// Two lists are equal if they cover the same addresses in the same order, wherever these are cut into runs;
/// [`runs`](Self::runs) shows the cuts. Looking a byte up takes O(log n). A run takes 16 bytes of memory, and
/// about 2 more for the index; a list of one run has no index.
#[derive(Clone)]
pub struct DmaSgList {
    storage: Storage,
    total: u64,
}

/// A single run, the most frequent case, needs no allocation.
#[derive(Clone)]
enum Storage {
    One(DmaSg),
    Many(Box<Indexed>),
}

/// Two runs or more.
#[derive(Clone)]
struct Indexed {
    runs: Box<[DmaSg]>,
    /// The offset at which each stride of runs begins, and the end of the list.
    index: Box<[u64]>,
    /// Strides per byte, as a fraction of 2^64.
    scale: u64,
}

/// Runs per index entry. Four runs span one or two cache lines, which are fetched together, and are few enough
/// that the CPU starts the next lookups while the loads of this one are in flight.
pub(crate) const STRIDE: usize = 4;

impl DmaSgList {
    /// Makes a list of one run. The caller has checked that the run is not empty and does not overflow.
    #[inline]
    pub(crate) fn single(run: DmaSg) -> Self {
        debug_assert!(run.len > 0 && run.addr.checked_add(run.len).is_some());
        Self { storage: Storage::One(run), total: run.len }
    }

    /// Makes a list of runs that the builder has checked and indexed.
    pub(crate) fn from_checked(runs: Box<[DmaSg]>, index: Box<[u64]>, total: u64) -> Self {
        if let [run] = *runs {
            return Self::single(run);
        }
        let strides = index.len() - 1;
        debug_assert_eq!(strides, runs.len().div_ceil(STRIDE));
        debug_assert_eq!((index[0], index[strides]), (0, total));
        // There are at most as many strides as bytes, so only a fraction of 1 does not fit.
        let scale = (((strides as u128) << 64) / u128::from(total)).min(u64::MAX.into()) as u64;
        Self { storage: Storage::Many(Box::new(Indexed { runs, index, scale })), total }
    }

    /// Makes a list of `runs`, and merges contiguous ones.
    ///
    /// # Errors
    /// See [`DmaSgBuilder::push`] and [`DmaSgBuilder::finish`].
    #[inline]
    pub fn from_runs(runs: impl IntoIterator<Item = DmaSg>) -> Result<Self> {
        let mut builder = DmaSgBuilder::new();
        builder.extend(runs)?;
        builder.finish()
    }

    /// Concatenates lists or views, as for a buffer that consists of several dma-bufs.
    ///
    /// # Errors
    /// - [`Error::TotalOverflow`](crate::Error::TotalOverflow): the total length does not fit in 64 bits.
    /// - [`RangeError::Empty`](crate::RangeError::Empty): there is no part.
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
        match &self.storage {
            Storage::One(run) => slice::from_ref(run),
            Storage::Many(many) => &many.runs,
        }
    }

    /// Total length in bytes.
    #[inline]
    pub fn total_len(&self) -> u64 {
        self.total
    }

    /// The rest of the run that holds the byte at `offset`, from that byte on; `None` past the end.
    #[inline]
    pub fn run_at(&self, offset: u64) -> Option<DmaSg> {
        let (at, skip) = self.find(offset)?;
        let run = self.runs()[at];
        Some(DmaSg { addr: run.addr + skip, len: run.len - skip })
    }

    /// The index of the run that holds the byte at `offset`, and the byte's offset in that run.
    #[inline]
    pub(crate) fn find(&self, offset: u64) -> Option<(usize, u64)> {
        if offset >= self.total {
            return None;
        }
        match &self.storage {
            Storage::One(_) => Some((0, offset)),
            Storage::Many(many) => Some(many.find(offset)),
        }
    }

    /// The whole list as a view.
    pub fn as_view(&self) -> DmaSgView<'_> {
        DmaSgView::whole(self)
    }

    /// Selects a range of bytes, without a copy.
    ///
    /// # Errors
    /// [`RangeError`](crate::RangeError): the range is empty, inverted, or ends past the list.
    pub fn view(&self, range: impl RangeBounds<u64>) -> Result<DmaSgView<'_>> {
        self.as_view().view(range)
    }

    /// See [`DmaSgView::best_page_size`].
    ///
    /// # Errors
    /// As there.
    pub fn best_page_size(&self, supported: PageSizes, iova: Iova) -> Result<u64> {
        self.as_view().best_page_size(supported, iova)
    }

    /// See [`DmaSgView::num_blocks`].
    ///
    /// # Errors
    /// As there.
    pub fn num_blocks(&self, page_size: u64, iova: Iova) -> Result<u64> {
        self.as_view().num_blocks(page_size, iova)
    }

    /// See [`DmaSgView::blocks`].
    ///
    /// # Errors
    /// As there.
    pub fn blocks(&self, page_size: u64, iova: Iova) -> Result<Blocks<'_>> {
        self.as_view().blocks(page_size, iova)
    }

    /// See [`DmaSgView::sges`].
    ///
    /// # Errors
    /// As there.
    pub fn sges(&self, limits: SgeLimits) -> Result<SgeGroups<'_>> {
        self.as_view().sges(limits)
    }
}

impl Indexed {
    /// The index of the run that holds the byte at `offset`, and the byte's offset in that run.
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

    /// The stride that holds the byte at `offset`. Pages have equal lengths, so one multiplication mostly
    /// guesses it; otherwise a search in doubling steps starts from the guess.
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

/// The run of a stride that holds the byte at offset `within`, and the byte's offset in that run.
///
/// Reads the whole stride without a branch on its data, so that the CPU starts the next lookups while the loads of
/// this one are in flight.
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
    /// Hashes the merged runs, so that equal lists have equal hashes.
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
    use super::*;
    use crate::{Error, RangeError, model};
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
        assert!(matches!(DmaSgList::single(DmaSg { addr: 0, len: 1 << 40 }).storage, Storage::One(_)));
        for n in [STRIDE, STRIDE + 1, 1000] {
            let list = model::scattered(n);
            assert_eq!(list.runs().len(), n);
            let Storage::Many(many) = &list.storage else { panic!("{n} runs are stored as one") };
            assert!(many.index.len() * 8 <= n * 8, "{n} runs, {} entries", many.index.len());
        }
    }

    /// Lengths for which the guess is far off.
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
        /// Compared with the address of every byte.
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

        /// Compared with the equality of the addresses of all bytes.
        #[test]
        fn equality_and_hash_depend_on_the_addresses_only(left in model::list(), right in model::list()) {
            let same = model::bytes(left.as_view()) == model::bytes(right.as_view());
            prop_assert_eq!(left == right, same);
            // Cut differently: every byte is a run.
            let mut cut = DmaSgBuilder::new();
            for addr in model::bytes(left.as_view()) {
                cut.push_unmerged(DmaSg { addr, len: 1 }).unwrap();
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

        /// Any input: no panic, and an error exactly where a sum overflows.
        #[test]
        fn any_runs_are_accepted_or_refused(
            runs in prop::collection::vec((model::edge(), model::edge()), 0..6)
        ) {
            let mut total = 0_u128;
            let mut expected = "accepted";
            for &(addr, len) in &runs {
                total += u128::from(len);
                expected = if len == 0 {
                    "empty"
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
                expected = "empty";
            }
            let built = DmaSgList::from_runs(runs.into_iter().map(|(addr, len)| DmaSg { addr, len }));
            let seen = match &built {
                Ok(list) => {
                    prop_assert_eq!(u128::from(list.total_len()), total);
                    "accepted"
                }
                Err(Error::Range(RangeError::Empty { .. })) => "empty",
                Err(Error::AddressOverflow { .. }) => "address",
                Err(Error::TotalOverflow { .. }) => "total",
                Err(other) => panic!("{other}"),
            };
            prop_assert_eq!(seen, expected);
        }
    }
}
