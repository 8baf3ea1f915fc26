//! The page side: which pages, before anything says how a device reaches them.

use super::{DmaSg, DmaSgBuilder, DmaSgList};
use crate::{Error, Result};

/// Pages that follow one another in physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Page frame number of the first: its physical address divided by the page size.
    pub pfn: u64,
    /// How many, never 0 in a [`PageList`].
    pub count: u64,
}

/// Pages in the order of the bytes they hold, as runs of page frame numbers: what the kernel keeps in an
/// array of `bio_vec`. Whole pages; a [view](DmaSgList::view) of what they are mapped to cuts the ends.
///
/// It says nothing about addresses that a device may use: a [`DmaMap`](super::DmaMap) makes those.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PageList {
    shift: u32,
    /// The same list in units of pages, so that merging, lookup and equality are there already.
    pages: DmaSgList,
}

impl PageList {
    /// A list of these runs, neighbours merged.
    ///
    /// # Errors
    /// - [`AddressError::InvalidPageSize`](crate::error::AddressError::InvalidPageSize): the page size is no power of two.
    /// - [`Error::ZeroLength`]: a run of no pages, or no run at all.
    /// - [`AddressError::AddressOverflow`](crate::error::AddressError::AddressOverflow): a run's last physical address does not fit in 64 bits.
    /// - [`AddressError::TotalOverflow`](crate::error::AddressError::TotalOverflow): the length of all does not.
    pub fn from_runs(page_size: u64, runs: impl IntoIterator<Item = PageRun>) -> Result<Self> {
        if !page_size.is_power_of_two() {
            return Err(Error::Addresses(crate::error::AddressError::InvalidPageSize {
                page_size,
                alignment: 1 << 63,
            }));
        }
        let shift = page_size.trailing_zeros();
        let most = u64::MAX >> shift;
        let mut builder = DmaSgBuilder::new();
        for PageRun { pfn, count } in runs {
            let total = builder.total_len();
            if count == 0 {
                return Err(Error::ZeroLength { offset: total << shift });
            }
            // In pages as they came, since in bytes they do not fit.
            if pfn.checked_add(count).is_none_or(|end| end > most) {
                return Err(Error::Addresses(crate::error::AddressError::AddressOverflow {
                    addr: pfn.saturating_mul(page_size),
                    length: count.saturating_mul(page_size),
                }));
            }
            if total.checked_add(count).is_none_or(|sum| sum > most) {
                return Err(Error::Addresses(crate::error::AddressError::TotalOverflow {
                    total: total << shift,
                    length: count << shift,
                }));
            }
            builder.push(DmaSg { addr: pfn, len: count })?;
        }
        Ok(Self { shift, pages: builder.finish()? })
    }

    /// A list of single pages, neighbours merged.
    ///
    /// # Errors
    /// As [`from_runs`](Self::from_runs).
    pub fn from_pfns(page_size: u64, pfns: impl IntoIterator<Item = u64>) -> Result<Self> {
        Self::from_runs(page_size, pfns.into_iter().map(|pfn| PageRun { pfn, count: 1 }))
    }

    /// Bytes of a page, a power of two.
    pub fn page_size(&self) -> u64 {
        1 << self.shift
    }

    /// Number of pages.
    pub fn num_pages(&self) -> u64 {
        self.pages.total_len()
    }

    /// Length of all pages together in bytes.
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
    pub(super) fn physical(&self) -> impl Iterator<Item = DmaSg> {
        let shift = self.shift;
        self.pages.runs().iter().map(move |run| DmaSg { addr: run.addr << shift, len: run.len << shift })
    }
}

#[cfg(test)]
mod tests {
    use super::super::model;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bad_pages_are_refused_by_name() {
        let one = |page_size, pfn, count| PageList::from_runs(page_size, [PageRun { pfn, count }]);
        assert!(matches!(
            one(4095, 1, 1),
            Err(Error::Addresses(crate::error::AddressError::InvalidPageSize { page_size: 4095, .. }))
        ));
        assert!(matches!(
            one(0, 1, 1),
            Err(Error::Addresses(crate::error::AddressError::InvalidPageSize { page_size: 0, .. }))
        ));
        assert!(matches!(one(4096, 1, 0), Err(Error::ZeroLength { offset: 0 })));
        assert!(matches!(PageList::from_pfns(4096, []), Err(Error::ZeroLength { offset: 0 })));
        assert!(one(4096, (1 << 52) - 2, 1).is_ok());
        assert!(matches!(
            one(4096, (1 << 52) - 1, 1),
            Err(Error::Addresses(crate::error::AddressError::AddressOverflow {
                addr: 0xffff_ffff_ffff_f000,
                ..
            }))
        ));
        assert!(matches!(
            one(4096, u64::MAX, 1),
            Err(Error::Addresses(crate::error::AddressError::AddressOverflow {
                addr: u64::MAX,
                length: 4096
            }))
        ));
        let most = PageRun { pfn: 0, count: (1 << 52) - 1 };
        let twice = PageList::from_runs(4096, [most, PageRun { pfn: 5, count: 1 }]);
        assert!(matches!(
            twice,
            Err(Error::Addresses(crate::error::AddressError::TotalOverflow { length: 4096, .. }))
        ));
    }

    #[test]
    fn a_tebibyte_of_pages_is_held_as_its_runs() {
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
        fn any_pages_are_taken_or_refused(
            size in model::edge(), runs in prop::collection::vec((model::edge(), model::edge()), 0..4)
        ) {
            let runs = runs.into_iter().map(|(pfn, count)| PageRun { pfn, count });
            if let Ok(list) = PageList::from_runs(size, runs) {
                prop_assert_eq!(list.physical().map(|run| u128::from(run.len)).sum::<u128>(), u128::from(list.total_len()));
            }
        }
    }
}
