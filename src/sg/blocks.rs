//! Page sizes and blocks: what a driver does with an `ib_umem` to fill a device's page table.
//!
//! The answers are those of `drivers/infiniband/core/umem.c` and `iter.c` since Linux 6.15, where runs
//! that continue one another count as one however the list is cut.

use std::iter::FusedIterator;

use super::view::Spans;
use super::{DmaSgList, DmaSgView};
use crate::umem::Iova;
use crate::{Error, Result};

/// The page sizes that a device supports: bit n stands for 2^n bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSizes(pub u64);

impl PageSizes {
    /// Every size from 4 KiB on.
    pub const ALL: Self = Self(!0xfff);

    /// The sizes given.
    ///
    /// # Errors
    /// [`AddressError::InvalidPageSize`](crate::error::AddressError::InvalidPageSize): one is no power of two.
    pub fn of(sizes: &[u64]) -> Result<Self> {
        match sizes.iter().find(|size| !size.is_power_of_two()) {
            Some(&page_size) => Err(Error::Addresses(crate::error::AddressError::InvalidPageSize {
                page_size,
                alignment: 1 << 63,
            })),
            None => Ok(Self(sizes.iter().fold(0, |all, size| all | size))),
        }
    }
}

impl<'a> DmaSgView<'a> {
    /// The page size with which a device maps the range from `iova` on, of those it supports: the
    /// largest with which every page of iovas is one run of addresses, and no larger than the smallest
    /// that holds the range in a single page.
    ///
    /// One pass over the runs, nothing allocated.
    ///
    /// # Errors
    /// - [`AddressError::NoPageSize`](crate::error::AddressError::NoPageSize): no supported size is small enough for the list and this iova, or none
    ///   is supported at all (the kernel answers 0).
    /// - [`Error::IovaOverflow`]: the range's last iova does not fit in 64 bits.
    #[doc(alias = "ib_umem_find_best_pgsz")]
    pub fn best_page_size(&self, supported: PageSizes, iova: Iova) -> Result<u64> {
        let last = last(iova, self.total_len())?;
        // Sizes that hold the whole range in one page; a larger one than the smallest gains nothing.
        // The kernel counts at least one bit, so that one byte too has a page of two.
        let bits = 64 - ((iova.0 ^ last) | 1).leading_zeros();
        let single = u64::MAX.checked_shl(bits).map_or(0, |sizes| supported.0 & sizes);
        let conflict = conflict(self, iova);
        let most = (conflict | single).trailing_zeros().min(63);
        match supported.0 & (u64::MAX >> (63 - most)) {
            0 => Err(Error::Addresses(crate::error::AddressError::NoPageSize {
                supported: supported.0,
                alignment: alignment(conflict),
            })),
            fitting => Ok(1 << fitting.ilog2()),
        }
    }

    /// How many pages of `page_size` bytes the range touches when it is mapped from `iova` on.
    ///
    /// # Errors
    /// [`AddressError::InvalidPageSize`](crate::error::AddressError::InvalidPageSize): it is no power of two; [`Error::IovaOverflow`]: the range's last
    /// iova does not fit in 64 bits.
    #[doc(alias = "ib_umem_num_dma_blocks")]
    pub fn num_blocks(&self, page_size: u64, iova: Iova) -> Result<u64> {
        count(self.total_len(), page_size, iova)
    }

    /// The addresses of the blocks that the range consists of when it is mapped from `iova` on: each a
    /// multiple of `page_size`, the first and the last also when the range begins or ends inside them.
    ///
    /// As many as [`num_blocks`](Self::num_blocks) says. One pass over the runs to check the size.
    ///
    /// # Errors
    /// [`AddressError::InvalidPageSize`](crate::error::AddressError::InvalidPageSize): not a power of two, or larger than the runs and `iova` allow: take
    /// it from [`best_page_size`](Self::best_page_size). [`Error::IovaOverflow`] as there.
    #[doc(alias("rdma_umem_for_each_dma_block", "rdma_for_each_block"))]
    pub fn blocks(&self, page_size: u64, iova: Iova) -> Result<Blocks<'a>> {
        let left = count(self.total_len(), page_size, iova)?;
        let conflict = conflict(self, iova);
        if conflict & (page_size - 1) != 0 {
            return Err(Error::Addresses(crate::error::AddressError::InvalidPageSize {
                page_size,
                alignment: alignment(conflict),
            }));
        }
        Ok(Blocks { spans: Spans::new(*self), page_size, next: 0, here: 0, later: left })
    }

    /// How far into its first block of `page_size` bytes, a power of two, the range begins.
    #[doc(alias = "ib_umem_dma_offset")]
    pub fn dma_offset(&self, page_size: u64) -> u64 {
        self.start() & (page_size.wrapping_sub(1))
    }
}

impl DmaSgList {
    /// Of all of it: see [`DmaSgView::num_blocks`].
    ///
    /// # Errors
    /// As there.
    pub fn num_blocks(&self, page_size: u64, iova: Iova) -> Result<u64> {
        self.as_view().num_blocks(page_size, iova)
    }
}

fn count(length: u64, page_size: u64, iova: Iova) -> Result<u64> {
    if !page_size.is_power_of_two() {
        return Err(Error::Addresses(crate::error::AddressError::InvalidPageSize {
            page_size,
            alignment: 1 << 63,
        }));
    }
    let shift = page_size.trailing_zeros();
    // Of 2^64 pages of one byte there is one fewer than counts, since a list is shorter than that.
    Ok((last(iova, length)? >> shift) - (iova.0 >> shift) + 1)
}

fn last(iova: Iova, length: u64) -> Result<u64> {
    iova.0.checked_add(length - 1).ok_or(Error::IovaOverflow { iova, length })
}

/// The address bits that keep a page from being one run: those in which a run's address and its iova
/// differ, and those of the iova at which one run ends and another begins.
fn conflict(view: &DmaSgView<'_>, iova: Iova) -> u64 {
    let (runs, skip) = view.touched();
    let mut bits = view.start() ^ iova.0;
    // Of the first run's first byte, which may lie before the range.
    let (mut va, mut end) = (iova.0.wrapping_sub(skip), runs[0].addr);
    for run in runs {
        if run.addr != end {
            bits |= (run.addr ^ va) | va;
        }
        va = va.wrapping_add(run.len);
        end = run.addr + run.len;
    }
    bits
}

/// The largest page size that such bits allow.
fn alignment(conflict: u64) -> u64 {
    1 << conflict.trailing_zeros().min(63)
}

/// Addresses of blocks of one size; see [`DmaSgView::blocks`].
#[derive(Debug, Clone)]
pub struct Blocks<'a> {
    spans: Spans<'a>,
    page_size: u64,
    /// Address of the next block.
    next: u64,
    /// Blocks left in this span, and in those after it.
    here: u64,
    later: u64,
}

impl Blocks<'_> {
    /// Goes to the next span. Spans begin and end at blocks but for the ends of the range, which the
    /// page size was checked for.
    #[inline]
    fn advance(&mut self) -> bool {
        let Some(span) = self.spans.next() else { return false };
        let shift = self.page_size.trailing_zeros();
        let first = span.addr >> shift;
        self.next = first << shift;
        self.here = ((span.addr + (span.len - 1)) >> shift) - first + 1;
        self.later -= self.here;
        true
    }
}

impl Iterator for Blocks<'_> {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        if self.here == 0 && !self.advance() {
            return None;
        }
        self.here -= 1;
        let block = self.next;
        // The last block may end where the addresses do.
        self.next = block.wrapping_add(self.page_size);
        Some(block)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = (self.here + self.later) as usize;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Blocks<'_> {}
impl FusedIterator for Blocks<'_> {}

#[cfg(test)]
mod tests {
    use super::super::{DmaSg, model};
    use super::*;
    use proptest::prelude::*;

    fn list(runs: &[(u64, u64)]) -> DmaSgList {
        DmaSgList::from_runs(runs.iter().map(|&(addr, len)| DmaSg { addr, len })).unwrap()
    }

    /// Cases worked out by hand from the kernel's function.
    #[test]
    fn best_page_size_of_known_cases() {
        const K4_M2: PageSizes = PageSizes(0x1000 | 0x20_0000);
        let best =
            |runs: &[(u64, u64)], supported, iova| list(runs).best_page_size(supported, Iova(iova)).unwrap();
        // One page of 128 KiB spans what two of 32 KiB would.
        assert_eq!(best(&[(0xa000, 0x7000)], PageSizes::ALL, 0xa000), 0x2_0000);
        // All sizes hold it: the smallest.
        assert_eq!(best(&[(0x4000, 0x1000)], PageSizes(0x1000 | 1 << 40), 0x4000), 0x1000);
        assert_eq!(best(&[(0, 4 << 30)], K4_M2, 0), 0x20_0000);
        // The iova is not congruent to 2 MiB.
        assert_eq!(best(&[(0, 4 << 30)], K4_M2, 0x1000), 0x1000);
        // Inner ends count, outer do not.
        assert_eq!(best(&[(0x10_0000, 0x10_0000), (0x80_0000, 0x1234)], K4_M2, 0x10_0000), 0x20_0000);
        assert_eq!(best(&[(0x10_0000, 0xff000), (0x80_0000, 0x1234)], K4_M2, 0x10_0000), 0x1000);
        // One byte: two bytes is the least that the kernel counts as holding it.
        assert_eq!(best(&[(7, 1)], PageSizes(0x1003), 7), 2);
        // A page of half of all addresses.
        assert_eq!(best(&[(1, u64::MAX - 1)], PageSizes(1 << 63), 1), 1 << 63);
    }

    #[test]
    fn unfit_page_sizes_are_refused_by_name() {
        let list = list(&[(0x1000, 0x1000), (0x3800, 0x800)]);
        let refused = |supported, iova| list.best_page_size(PageSizes(supported), Iova(iova)).unwrap_err();
        assert!(matches!(
            refused(0, 0x1000),
            Error::Addresses(crate::error::AddressError::NoPageSize { supported: 0, alignment: 0x800 })
        ));
        assert!(matches!(
            refused(0x3000, 0),
            Error::Addresses(crate::error::AddressError::NoPageSize { supported: 0x3000, alignment: 0x800 })
        ));
        assert!(matches!(
            refused(0x1000, 1),
            Error::Addresses(crate::error::AddressError::NoPageSize { alignment: 1, .. })
        ));
        assert!(matches!(refused(1, u64::MAX), Error::IovaOverflow { iova: Iova(u64::MAX), length: 0x1800 }));
        for size in [0, 3, 0x1800, u64::MAX] {
            assert!(
                matches!(list.blocks(size, Iova(0)), Err(Error::Addresses(crate::error::AddressError::InvalidPageSize { page_size, .. })) if page_size == size)
            );
            assert!(matches!(
                list.num_blocks(size, Iova(0)),
                Err(Error::Addresses(crate::error::AddressError::InvalidPageSize { .. }))
            ));
            assert!(matches!(
                PageSizes::of(&[0x1000, size]),
                Err(Error::Addresses(crate::error::AddressError::InvalidPageSize { .. }))
            ));
        }
        let refused = list.blocks(0x1000, Iova(0x1000)).unwrap_err();
        assert!(matches!(
            refused,
            Error::Addresses(crate::error::AddressError::InvalidPageSize {
                page_size: 0x1000,
                alignment: 0x800
            })
        ));
        assert_eq!(PageSizes::of(&[0x1000, 0x20_0000]).unwrap(), PageSizes(0x20_1000));
        assert_eq!(list.as_view().dma_offset(0), 0x1000, "no panic");
    }

    #[test]
    fn a_tebibyte_has_2_to_the_28_pages() {
        let list = list(&[(0, 1 << 40)]);
        assert_eq!(list.num_blocks(4096, Iova(0)).unwrap(), 1 << 28);
        let mut blocks = list.blocks(4096, Iova(0)).unwrap();
        assert_eq!(blocks.len(), 1 << 28);
        assert_eq!((blocks.next(), blocks.len()), (Some(0), (1 << 28) - 1));
    }

    proptest! {
        /// Against every byte's address, for all sizes.
        #[test]
        fn page_sizes_and_blocks_agree_with_counting_bytes(
            (list, offset, length) in model::range(), supported in 0..512_u64, congruent in 0..10_u32, high in 0..8_u64
        ) {
            let view = list.view(offset, length).unwrap();
            // Most random iovas would allow pages of one byte only.
            let iova = (high << congruent) + (view.start() & ((1 << congruent) - 1));
            let pages = model::Pages { bytes: &model::bytes(view), iova };
            match view.best_page_size(PageSizes(supported), Iova(iova)) {
                Ok(size) => prop_assert_eq!(Some(size), pages.best(supported)),
                Err(Error::Addresses(crate::error::AddressError::NoPageSize { .. })) => prop_assert_eq!(None, pages.best(supported)),
                Err(other) => panic!("{other}"),
            }
            for size in (0..10).map(|bit| 1_u64 << bit) {
                prop_assert_eq!(view.num_blocks(size, Iova(iova)).unwrap(), pages.count(size));
                prop_assert_eq!(view.dma_offset(size), view.start() % size);
                match (view.blocks(size, Iova(iova)), pages.blocks(size)) {
                    (Ok(blocks), Some(expected)) => {
                        prop_assert_eq!(blocks.len(), expected.len());
                        prop_assert_eq!(blocks.collect::<Vec<_>>(), expected);
                    }
                    (Err(Error::Addresses(crate::error::AddressError::InvalidPageSize { .. })), None) => {}
                    (seen, expected) => panic!("{seen:?}, expected {expected:x?}"),
                }
            }
        }

        /// Against the kernel's way of computing it, at addresses of any size.
        #[test]
        fn page_sizes_agree_with_the_kernels_formula(
            runs in prop::collection::vec((0..40_u32, 0..1000_u64, 0..30_u32, 1..5_u64), 1..6),
            supported in any::<u64>(), iova in model::edge(),
        ) {
            let runs = runs.into_iter().map(|(shift, at, size, n)| DmaSg { addr: at << shift, len: n << size });
            let list = DmaSgList::from_runs(runs).unwrap();
            let answer = list.best_page_size(PageSizes(supported), Iova(iova));
            prop_assert_eq!(answer.unwrap_or(0), model::kernel_best(&list, supported, iova));
        }

        #[test]
        fn any_page_size_and_iova_are_answered(list in model::list(), size in model::edge(), iova in model::edge()) {
            let _ = list.best_page_size(PageSizes(size), Iova(iova));
            let _ = list.num_blocks(size, Iova(iova));
            let _ = list.as_view().dma_offset(size);
            if let Ok(blocks) = list.blocks(size, Iova(iova)) {
                prop_assert_eq!(blocks.len(), blocks.count());
            }
        }
    }
}
