//! Physical pages, before they are mapped for a device.

use std::sync::LazyLock;

use crate::{DmaSg, DmaSgBuilder, DmaSgList, Error, RangeError, Result};

/// The system's page size in bytes.
#[inline]
pub fn page_size() -> u64 {
    static PAGE_SIZE: LazyLock<u64> = LazyLock::new(|| {
        // SAFETY: sysconf takes no pointer and has no precondition.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(size).expect("Linux always has a page size")
    });
    *PAGE_SIZE
}

/// Pages that are contiguous in physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Page frame number of the first page: its physical address divided by the page size.
    pub pfn: u64,
    /// Number of pages; never 0 in a [`PageList`].
    pub count: u64,
}

/// Physical pages in the order of a buffer's bytes, as runs of page frame numbers.
///
/// The list holds whole pages, as the kernel's `bio_vec` array does. [`DmaMap`](crate::DmaMap) turns it into
/// addresses that a device uses; a [view](DmaSgList::view) of those cuts a range out.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PageList {
    shift: u32,
    /// In units of pages, not bytes: merging, lookup and equality come from this list.
    pages: DmaSgList,
}

impl PageList {
    /// Makes a list of runs of pages of `page_size` bytes, and merges contiguous runs.
    ///
    /// # Errors
    /// - [`Error::InvalidPageSize`]: `page_size` is not a power of two.
    /// - [`RangeError::Empty`]: a run has no pages, or there is no run.
    /// - [`Error::AddressOverflow`]: the end of a run, as a physical address, does not fit in 64 bits.
    /// - [`Error::TotalOverflow`]: the total length in bytes does not fit in 64 bits.
    pub fn from_runs(page_size: u64, runs: impl IntoIterator<Item = PageRun>) -> Result<Self> {
        if !page_size.is_power_of_two() {
            return Err(Error::InvalidPageSize { page_size, alignment: 1 << 63 });
        }
        let shift = page_size.trailing_zeros();
        let most = u64::MAX >> shift;
        let mut builder = DmaSgBuilder::new();
        for PageRun { pfn, count } in runs {
            let total = builder.total_len();
            if count == 0 {
                return Err(Error::Range(RangeError::Empty { offset: total << shift }));
            }
            // Checked in pages; the same numbers in bytes may not fit.
            if pfn.checked_add(count).is_none_or(|end| end > most) {
                return Err(Error::AddressOverflow {
                    addr: pfn.saturating_mul(page_size),
                    length: count.saturating_mul(page_size),
                });
            }
            if total.checked_add(count).is_none_or(|sum| sum > most) {
                return Err(Error::TotalOverflow { total: total << shift, length: count << shift });
            }
            builder.push(DmaSg { addr: pfn, len: count })?;
        }
        Ok(Self { shift, pages: builder.finish()? })
    }

    /// Makes a list of single pages, and merges contiguous ones.
    ///
    /// # Errors
    /// See [`from_runs`](Self::from_runs).
    pub fn from_pfns(page_size: u64, pfns: impl IntoIterator<Item = u64>) -> Result<Self> {
        Self::from_runs(page_size, pfns.into_iter().map(|pfn| PageRun { pfn, count: 1 }))
    }

    /// Bytes per page, a power of two.
    pub fn page_size(&self) -> u64 {
        1 << self.shift
    }

    /// Number of pages.
    pub fn num_pages(&self) -> u64 {
        self.pages.total_len()
    }

    /// Total length in bytes.
    pub fn total_len(&self) -> u64 {
        self.pages.total_len() << self.shift
    }

    /// The runs, in order.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = PageRun> + Clone {
        self.pages.runs().iter().map(|run| PageRun { pfn: run.addr, count: run.len })
    }

    /// Page frame number of the page at `index`; `None` past the end.
    pub fn pfn_at(&self, index: u64) -> Option<u64> {
        Some(self.pages.run_at(index)?.addr)
    }

    /// The runs as physical addresses.
    pub(crate) fn physical(&self) -> impl Iterator<Item = DmaSg> {
        let shift = self.shift;
        self.pages.runs().iter().map(move |run| DmaSg { addr: run.addr << shift, len: run.len << shift })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model;
    use proptest::prelude::*;

    #[test]
    fn unfit_pages_are_refused() {
        let one = |page_size, pfn, count| PageList::from_runs(page_size, [PageRun { pfn, count }]);
        assert!(matches!(one(4095, 1, 1), Err(Error::InvalidPageSize { page_size: 4095, .. })));
        assert!(matches!(one(0, 1, 1), Err(Error::InvalidPageSize { page_size: 0, .. })));
        assert!(matches!(one(4096, 1, 0), Err(Error::Range(RangeError::Empty { offset: 0 }))));
        assert!(matches!(PageList::from_pfns(4096, []), Err(Error::Range(RangeError::Empty { offset: 0 }))));
        assert!(one(4096, (1 << 52) - 2, 1).is_ok());
        assert!(matches!(
            one(4096, (1 << 52) - 1, 1),
            Err(Error::AddressOverflow { addr: 0xffff_ffff_ffff_f000, .. })
        ));
        assert!(matches!(
            one(4096, u64::MAX, 1),
            Err(Error::AddressOverflow { addr: u64::MAX, length: 4096 })
        ));
        let most = PageRun { pfn: 0, count: (1 << 52) - 1 };
        let twice = PageList::from_runs(4096, [most, PageRun { pfn: 5, count: 1 }]);
        assert!(matches!(twice, Err(Error::TotalOverflow { length: 4096, .. })));
    }

    #[test]
    fn a_tebibyte_of_contiguous_pages_is_one_run() {
        let list = PageList::from_runs(4096, [PageRun { pfn: 1 << 20, count: 1 << 28 }]).unwrap();
        assert_eq!((list.num_pages(), list.total_len(), list.runs().len()), (1 << 28, 1 << 40, 1));
        assert_eq!(list.pfn_at((1 << 28) - 1), Some((1 << 20) + (1 << 28) - 1));
        assert_eq!(list.pfn_at(1 << 28), None);
    }

    proptest! {
        #[test]
        fn pages_keep_their_order(pfns in prop::collection::vec(0..20_u64, 1..60)) {
            let list = PageList::from_pfns(4096, pfns.iter().copied()).unwrap();
            let seen: Vec<_> = list.runs().flat_map(|run| run.pfn..run.pfn + run.count).collect();
            prop_assert_eq!(&seen, &pfns);
            for (index, &pfn) in pfns.iter().enumerate() {
                prop_assert_eq!(list.pfn_at(index as u64), Some(pfn));
            }
        }

        #[test]
        fn any_pages_are_accepted_or_refused(
            size in model::edge(), runs in prop::collection::vec((model::edge(), model::edge()), 0..4)
        ) {
            let runs = runs.into_iter().map(|(pfn, count)| PageRun { pfn, count });
            if let Ok(list) = PageList::from_runs(size, runs) {
                prop_assert_eq!(list.physical().map(|run| u128::from(run.len)).sum::<u128>(), u128::from(list.total_len()));
            }
        }
    }
}
