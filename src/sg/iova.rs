//! An I/O address space: scattered pages become one run, as an IOMMU makes them.

use std::collections::BTreeMap;

use super::{DmaSg, DmaSgList, PageList, Translation};
use crate::umem::Iova;
use crate::{Error, Result};

/// A range of I/O virtual addresses of which each mapping takes a part of its own.
///
/// Lowest part first; what is given back is used again, and merges with what is free beside it. It keeps
/// the books only: an IOMMU has page tables beside this.
#[derive(Debug, Clone)]
pub struct IovaSpace {
    alignment: u64,
    /// Free parts: first address to length. No two of them touch.
    free: BTreeMap<u64, u64>,
    /// Mapped parts: first address to length as mapped.
    used: BTreeMap<u64, u64>,
}

impl IovaSpace {
    /// The addresses of `size` bytes from `base` on. Each mapping begins at a multiple of `alignment`
    /// bytes, a power of two: at least the IOMMU's page, and more where large pages are wanted.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::IovaOverflow`]: there is no such range.
    /// - [`AddressError::InvalidPageSize`](crate::error::AddressError::InvalidPageSize): the alignment is no power of two.
    pub fn new(base: Iova, size: u64, alignment: u64) -> Result<Self> {
        if size == 0 {
            return Err(Error::ZeroLength { offset: base.0 });
        }
        if base.0.checked_add(size).is_none() {
            return Err(Error::IovaOverflow { iova: base, length: size });
        }
        if !alignment.is_power_of_two() {
            return Err(Error::Addresses(crate::error::AddressError::InvalidPageSize {
                page_size: alignment,
                alignment: 1 << 63,
            }));
        }
        Ok(Self { alignment, free: BTreeMap::from([(base.0, size)]), used: BTreeMap::new() })
    }

    /// Bytes that are mapped.
    pub fn mapped(&self) -> u64 {
        self.used.values().sum()
    }

    /// Takes a part of so many bytes.
    ///
    /// # Errors
    /// [`Error::ZeroLength`]; [`AddressError::IovaExhausted`](crate::error::AddressError::IovaExhausted): no free part has room for it, aligned.
    pub fn allocate(&mut self, length: u64) -> Result<Iova> {
        if length == 0 {
            return Err(Error::ZeroLength { offset: 0 });
        }
        let fitting = self.free.iter().find_map(|(&start, &len)| {
            let iova = start.checked_next_multiple_of(self.alignment)?;
            let left = len.checked_sub(iova - start)?.checked_sub(length)?;
            Some((start, iova, left))
        });
        let Some((start, iova, left)) = fitting else {
            let largest = self.free.values().copied().max().unwrap_or(0);
            return Err(Error::Addresses(crate::error::AddressError::IovaExhausted {
                length,
                alignment: self.alignment,
                largest,
            }));
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

    /// Gives a part back, whole.
    ///
    /// # Errors
    /// [`AddressError::IovaNotMapped`](crate::error::AddressError::IovaNotMapped): no such part is mapped; it was given back before, or is longer or
    /// shorter.
    pub fn release(&mut self, iova: Iova, length: u64) -> Result<()> {
        if self.used.get(&iova.0) != Some(&length) {
            return Err(Error::Addresses(crate::error::AddressError::IovaNotMapped { iova, length }));
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
    /// All pages as one run.
    ///
    /// # Errors
    /// - [`AddressError::InvalidPageSize`](crate::error::AddressError::InvalidPageSize): pages smaller than the alignment's page cannot be told apart by an
    ///   IOMMU, larger ones would not be aligned; that is, the alignment is less than a page.
    /// - [`AddressError::IovaExhausted`](crate::error::AddressError::IovaExhausted): no free part has room for them.
    fn map(&mut self, pages: &PageList) -> Result<DmaSgList> {
        if self.alignment < pages.page_size() {
            return Err(Error::Addresses(crate::error::AddressError::InvalidPageSize {
                page_size: pages.page_size(),
                alignment: self.alignment,
            }));
        }
        let len = pages.total_len();
        let Iova(addr) = self.allocate(len)?;
        Ok(DmaSgList::single(DmaSg { addr, len }))
    }

    fn unmap(&mut self, list: &DmaSgList) -> Result<()> {
        let DmaSg { addr, .. } = list.runs()[0];
        let len = list.total_len();
        let mapping =
            Error::Addresses(crate::error::AddressError::IovaNotMapped { iova: Iova(addr), length: len });
        // In one piece, however it was cut into segments.
        if addr.checked_add(len).is_none() || *list != DmaSgList::single(DmaSg { addr, len }) {
            return Err(mapping);
        }
        self.release(Iova(addr), len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DmaMap, SegmentLimits, model};
    use super::*;
    use proptest::prelude::*;

    fn map(base: u64, size: u64, limits: SegmentLimits) -> DmaMap<IovaSpace> {
        DmaMap::new(IovaSpace::new(Iova(base), size, 4096).unwrap(), limits)
    }

    #[test]
    fn scattered_pages_become_one_run_and_its_segments_are_given_back_whole() {
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
        assert!(matches!(
            again,
            Err(Error::Addresses(crate::error::AddressError::IovaNotMapped {
                iova: Iova(0x1000),
                length: 0x5000
            }))
        ));
        let part = DmaSgList::from_runs(other.runs()[..1].iter().copied()).unwrap();
        assert!(matches!(
            map.unmap(&part),
            Err(Error::Addresses(crate::error::AddressError::IovaNotMapped { .. }))
        ));
        let holes = DmaSgList::concat([&other.to_owned(), &part]).unwrap();
        assert!(matches!(
            map.unmap(&holes),
            Err(Error::Addresses(crate::error::AddressError::IovaNotMapped { .. }))
        ));
        map.unmap(&other).unwrap();
        assert_eq!(map.translation().mapped(), 0);
        assert_eq!(map.map(&pages).unwrap(), list, "the same part again");
    }

    #[test]
    fn an_exhausted_space_says_what_is_left() {
        let mut map = map(0x1000, 0x4000, SegmentLimits::NONE);
        let pages = |n| PageList::from_pfns(4096, (0..n).map(|i| i * 2)).unwrap();
        let three = map.map(&pages(3)).unwrap();
        let refused = map.map(&pages(2));
        assert!(matches!(
            refused,
            Err(Error::Addresses(crate::error::AddressError::IovaExhausted {
                length: 0x2000,
                alignment: 0x1000,
                largest: 0x1000
            }))
        ));
        map.unmap(&three).unwrap();
        assert!(map.map(&pages(4)).is_ok());
        assert!(matches!(
            map.map(&pages(1)),
            Err(Error::Addresses(crate::error::AddressError::IovaExhausted { largest: 0, .. }))
        ));
    }

    #[test]
    fn a_space_that_is_none_is_refused() {
        assert!(matches!(IovaSpace::new(Iova(5), 0, 1), Err(Error::ZeroLength { .. })));
        assert!(matches!(IovaSpace::new(Iova(u64::MAX), 1, 1), Err(Error::IovaOverflow { .. })));
        assert!(matches!(
            IovaSpace::new(Iova(0), 4096, 3),
            Err(Error::Addresses(crate::error::AddressError::InvalidPageSize { page_size: 3, .. }))
        ));
        let mut space = IovaSpace::new(Iova(0), 1 << 20, 1024).unwrap();
        let refused = space.map(&PageList::from_pfns(4096, [1]).unwrap());
        assert!(matches!(
            refused,
            Err(Error::Addresses(crate::error::AddressError::InvalidPageSize {
                page_size: 4096,
                alignment: 1024
            }))
        ));
        assert!(matches!(space.allocate(0), Err(Error::ZeroLength { .. })));
    }

    proptest! {
        /// Against a bitmap of the space.
        #[test]
        fn parts_are_disjoint_aligned_and_come_back(
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
                        Err(Error::Addresses(crate::error::AddressError::IovaExhausted { .. })) => prop_assert_eq!(expected, None),
                        Err(other) => panic!("{other}"),
                    }
                } else {
                    let (iova, length) = held.swap_remove(which % held.len());
                    let wrong = space.release(iova, length + 1);
                    prop_assert!(wrong.is_err());
                    space.release(iova, length).unwrap();
                    taken[iova.0 as usize..][..length as usize].fill(false);
                    let twice = space.release(iova, length);
                    prop_assert!(matches!(twice, Err(Error::Addresses(crate::error::AddressError::IovaNotMapped { .. }))), "{twice:?}");
                }
            }
            for (iova, length) in held {
                space.release(iova, length).unwrap();
            }
            prop_assert_eq!(space.free, BTreeMap::from([(base, size)]), "all merged again");
        }

        #[test]
        fn any_space_and_length_are_answered(
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
