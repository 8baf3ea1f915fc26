//! I/O virtual addresses, and an address space of them in which scattered pages become one run.

use std::collections::BTreeMap;
use std::fmt;

use crate::{DmaSg, DmaSgList, Error, PageList, RangeError, Result, Translation};

/// An I/O virtual address: what work requests and remote keys address a region by.
///
/// It is neither a pointer nor an offset in the buffer, although by default it equals the offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Iova(pub u64);

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// An I/O address space in which every mapping takes a contiguous part, as behind an IOMMU.
///
/// Allocation is first fit from the lowest address. Released parts merge with free neighbours. The space
/// only does the bookkeeping; it has no page tables.
#[derive(Debug, Clone)]
pub struct IovaSpace {
    alignment: u64,
    /// Free parts: first address to length. No two of them touch.
    free: BTreeMap<u64, u64>,
    /// Mapped parts: first address to length as mapped.
    used: BTreeMap<u64, u64>,
}

impl IovaSpace {
    /// Makes a space of `size` bytes from `base`.
    ///
    /// Each mapping begins at a multiple of `alignment` bytes, a power of two. Use at least the IOMMU's page
    /// size, and more for large pages.
    ///
    /// # Errors
    /// - [`RangeError::Empty`]: `size` is 0.
    /// - [`Error::IovaOverflow`]: `base + size` does not fit in 64 bits.
    /// - [`Error::InvalidPageSize`]: `alignment` is not a power of two.
    pub fn new(base: Iova, size: u64, alignment: u64) -> Result<Self> {
        if size == 0 {
            return Err(Error::Range(RangeError::Empty { offset: base.0 }));
        }
        if base.0.checked_add(size).is_none() {
            return Err(Error::IovaOverflow { iova: base, length: size });
        }
        if !alignment.is_power_of_two() {
            return Err(Error::InvalidPageSize { page_size: alignment, alignment: 1 << 63 });
        }
        Ok(Self { alignment, free: BTreeMap::from([(base.0, size)]), used: BTreeMap::new() })
    }

    /// Number of mapped bytes.
    pub fn mapped(&self) -> u64 {
        self.used.values().sum()
    }

    /// Allocates `length` bytes.
    ///
    /// # Errors
    /// - [`RangeError::Empty`]: `length` is 0.
    /// - [`Error::IovaExhausted`]: no free part holds that many bytes, aligned.
    pub fn allocate(&mut self, length: u64) -> Result<Iova> {
        if length == 0 {
            return Err(Error::Range(RangeError::Empty { offset: 0 }));
        }
        let fitting = self.free.iter().find_map(|(&start, &len)| {
            let iova = start.checked_next_multiple_of(self.alignment)?;
            let left = len.checked_sub(iova - start)?.checked_sub(length)?;
            Some((start, iova, left))
        });
        let Some((start, iova, left)) = fitting else {
            let largest = self.free.values().copied().max().unwrap_or(0);
            return Err(Error::IovaExhausted { length, alignment: self.alignment, largest });
        };
        self.free.remove(&start);
        if iova > start {
            self.free.insert(start, iova - start);
        }
        if left > 0 {
            self.free.insert(iova + length, left);
        }
        self.used.insert(iova, length);
        Ok(Iova(iova))
    }

    /// Releases the whole mapping of `length` bytes at `iova`.
    ///
    /// # Errors
    /// [`Error::IovaNotMapped`]: no mapping begins there with exactly this length.
    pub fn release(&mut self, iova: Iova, length: u64) -> Result<()> {
        if self.used.get(&iova.0) != Some(&length) {
            return Err(Error::IovaNotMapped { iova, length });
        }
        self.used.remove(&iova.0);
        let (mut start, mut end) = (iova.0, iova.0 + length);
        if let Some((&before, &len)) = self.free.range(..start).next_back()
            && before + len == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(len) = self.free.remove(&end) {
            end += len;
        }
        self.free.insert(start, end - start);
        Ok(())
    }
}

impl Translation for IovaSpace {
    /// Maps all pages as one run.
    ///
    /// # Errors
    /// - [`Error::InvalidPageSize`]: a page is larger than the alignment of this space, so it could lie
    ///   unaligned.
    /// - [`Error::IovaExhausted`]: no free part holds the pages.
    fn map(&mut self, pages: &PageList) -> Result<DmaSgList> {
        if self.alignment < pages.page_size() {
            return Err(Error::InvalidPageSize { page_size: pages.page_size(), alignment: self.alignment });
        }
        let len = pages.total_len();
        let Iova(addr) = self.allocate(len)?;
        Ok(DmaSgList::single(DmaSg { addr, len }))
    }

    fn unmap(&mut self, list: &DmaSgList) -> Result<()> {
        let addr = list.as_view().start_addr();
        let len = list.total_len();
        // Segment limits may have cut the mapping, but it must be contiguous.
        if addr.checked_add(len).is_none() || *list != DmaSgList::single(DmaSg { addr, len }) {
            return Err(Error::IovaNotMapped { iova: Iova(addr), length: len });
        }
        self.release(Iova(addr), len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DmaMap, SegmentLimits, model};
    use proptest::prelude::*;

    fn map(base: u64, size: u64, limits: SegmentLimits) -> DmaMap<IovaSpace> {
        DmaMap::new(IovaSpace::new(Iova(base), size, 4096).unwrap(), limits)
    }

    #[test]
    fn scattered_pages_become_one_run_that_is_unmapped_whole() {
        let pages = PageList::from_pfns(4096, [9, 3, 7, 1, 40]).unwrap();
        let limits = SegmentLimits { max_size: 8192, boundary_mask: 0x3fff };
        let mut map = map(0x1000, 1 << 20, limits);
        let list = map.map(&pages).unwrap();
        let sizes: Vec<_> = list.runs().iter().map(|run| (run.addr, run.len)).collect();
        assert_eq!(sizes, [(0x1000, 0x2000), (0x3000, 0x1000), (0x4000, 0x2000)]);
        let other = map.map(&pages).unwrap();
        assert_eq!(map.translation().mapped(), 10 * 4096);
        assert_ne!(list, other);

        map.unmap(&list).unwrap();
        let again = map.unmap(&list);
        assert!(matches!(again, Err(Error::IovaNotMapped { iova: Iova(0x1000), length: 0x5000 })));
        let part = DmaSgList::from_runs(other.runs()[..1].iter().copied()).unwrap();
        assert!(matches!(map.unmap(&part), Err(Error::IovaNotMapped { .. })));
        let holes = DmaSgList::concat([&other.to_owned(), &part]).unwrap();
        assert!(matches!(map.unmap(&holes), Err(Error::IovaNotMapped { .. })));
        map.unmap(&other).unwrap();
        assert_eq!(map.translation().mapped(), 0);
        assert_eq!(map.map(&pages).unwrap(), list, "a released part is allocated again");
    }

    #[test]
    fn an_exhausted_space_reports_its_largest_free_part() {
        let mut map = map(0x1000, 0x4000, SegmentLimits::NONE);
        let pages = |n| PageList::from_pfns(4096, (0..n).map(|i| i * 2)).unwrap();
        let three = map.map(&pages(3)).unwrap();
        let refused = map.map(&pages(2));
        assert!(matches!(
            refused,
            Err(Error::IovaExhausted { length: 0x2000, alignment: 0x1000, largest: 0x1000 })
        ));
        map.unmap(&three).unwrap();
        assert!(map.map(&pages(4)).is_ok());
        assert!(matches!(map.map(&pages(1)), Err(Error::IovaExhausted { largest: 0, .. })));
    }

    #[test]
    fn unfit_spaces_and_pages_are_refused() {
        assert!(matches!(IovaSpace::new(Iova(5), 0, 1), Err(Error::Range(RangeError::Empty { .. }))));
        assert!(matches!(IovaSpace::new(Iova(u64::MAX), 1, 1), Err(Error::IovaOverflow { .. })));
        assert!(matches!(IovaSpace::new(Iova(0), 4096, 3), Err(Error::InvalidPageSize { page_size: 3, .. })));
        let mut space = IovaSpace::new(Iova(0), 1 << 20, 1024).unwrap();
        let refused = space.map(&PageList::from_pfns(4096, [1]).unwrap());
        assert!(matches!(refused, Err(Error::InvalidPageSize { page_size: 4096, alignment: 1024 })));
        assert!(matches!(space.allocate(0), Err(Error::Range(RangeError::Empty { .. }))));
    }

    proptest! {
        /// Compared with a bitmap of the space.
        #[test]
        fn parts_are_disjoint_and_aligned_and_merge_when_released(
            base in 0..20_u64, size in 1..100_u64, align in 0..4_u32,
            steps in prop::collection::vec((any::<bool>(), 0..200_usize, 1..30_u64), 1..60)
        ) {
            let align = 1 << align;
            let mut space = IovaSpace::new(Iova(base), size, align).unwrap();
            let mut taken = [false; 200];
            let mut held: Vec<(Iova, u64)> = Vec::new();
            for (take, which, length) in steps {
                if take || held.is_empty() {
                    let free = |at: u64| (at..at + length).all(|i| i >= base && i < base + size && !taken[i as usize]);
                    let expected = (0..base + size).find(|&at| at % align == 0 && free(at));
                    match space.allocate(length) {
                        Ok(iova) => {
                            prop_assert_eq!(Some(iova.0), expected);
                            taken[iova.0 as usize..][..length as usize].fill(true);
                            held.push((iova, length));
                        }
                        Err(Error::IovaExhausted { .. }) => prop_assert_eq!(expected, None),
                        Err(other) => panic!("{other}"),
                    }
                } else {
                    let (iova, length) = held.swap_remove(which % held.len());
                    let wrong = space.release(iova, length + 1);
                    prop_assert!(wrong.is_err());
                    space.release(iova, length).unwrap();
                    taken[iova.0 as usize..][..length as usize].fill(false);
                    let twice = space.release(iova, length);
                    prop_assert!(matches!(twice, Err(Error::IovaNotMapped { .. })), "{twice:?}");
                }
            }
            for (iova, length) in held {
                space.release(iova, length).unwrap();
            }
            prop_assert_eq!(space.free, BTreeMap::from([(base, size)]), "all parts merged");
        }

        #[test]
        fn any_space_and_length_are_accepted_or_refused(
            base in model::edge(), size in model::edge(), alignment in model::edge(), length in model::edge()
        ) {
            if let Ok(mut space) = IovaSpace::new(Iova(base), size, alignment) {
                if let Ok(iova) = space.allocate(length) {
                    prop_assert!(iova.0 >= base && iova.0 + length <= base + size && iova.0 % alignment == 0);
                }
                let _ = space.release(Iova(length), size);
            }
        }
    }
}
