//! Page sizes and blocks: the arithmetic with which a driver fills a device's page table from an `ib_umem`.
//!
//! The results equal those of `drivers/infiniband/core/umem.c` and `iter.c` since Linux 6.15, where contiguous
//! runs count as one, however the list is cut.

use std::iter::FusedIterator;

use crate::view::Spans;
use crate::{DmaSgView, Error, Iova, Result};

/// A bitmap of the page sizes that a device supports: bit n stands for 2^n bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSizes(pub u64);

impl PageSizes {
    /// Every size from 4 KiB.
    pub const ALL: Self = Self(!0xfff);

    /// Makes a bitmap of `sizes` in bytes.
    ///
    /// # Errors
    /// [`Error::InvalidPageSize`]: a size is not a power of two.
    pub fn of(sizes: &[u64]) -> Result<Self> {
        match sizes.iter().find(|size| !size.is_power_of_two()) {
            Some(&page_size) => Err(Error::InvalidPageSize { page_size, alignment: 1 << 63 }),
            None => Ok(Self(sizes.iter().fold(0, |all, size| all | size))),
        }
    }
}

impl<'a> DmaSgView<'a> {
    /// The best page size to map the range at `iova`, in bytes.
    ///
    /// It is the largest supported size with which every page of iovas is one contiguous run of addresses,
    /// aligned like the page, but no larger than the smallest that holds the range in a single page. This
    /// takes one pass over the runs and allocates nothing.
    ///
    /// # Errors
    /// - [`Error::NoPageSize`]: every supported size is too large for the list and this iova, or none is
    ///   supported. The kernel returns 0.
    /// - [`Error::IovaOverflow`]: the range's last iova does not fit in 64 bits.
    #[doc(alias = "ib_umem_find_best_pgsz")]
    pub fn best_page_size(&self, supported: PageSizes, iova: Iova) -> Result<u64> {
        let last = last_iova(iova, self.total_len())?;
        // The sizes that hold the whole range in one page; none larger than the smallest of them is useful.
        // The kernel counts at least one bit, so even a single byte gets a page of two.
        let bits = 64 - ((iova.0 ^ last) | 1).leading_zeros();
        let single = u64::MAX.checked_shl(bits).map_or(0, |sizes| supported.0 & sizes);
        let conflict = conflict(self, iova);
        let most = (conflict | single).trailing_zeros().min(63);
        match supported.0 & (u64::MAX >> (63 - most)) {
            0 => Err(Error::NoPageSize { supported: supported.0, alignment: alignment(conflict) }),
            fitting => Ok(1 << fitting.ilog2()),
        }
    }

    /// The number of pages of `page_size` bytes that the range touches when it is mapped at `iova`.
    ///
    /// # Errors
    /// - [`Error::InvalidPageSize`]: `page_size` is not a power of two.
    /// - [`Error::IovaOverflow`]: the range's last iova does not fit in 64 bits.
    #[doc(alias = "ib_umem_num_dma_blocks")]
    pub fn num_blocks(&self, page_size: u64, iova: Iova) -> Result<u64> {
        if !page_size.is_power_of_two() {
            return Err(Error::InvalidPageSize { page_size, alignment: 1 << 63 });
        }
        let shift = page_size.trailing_zeros();
        // Cannot overflow: a list is shorter than 2^64 bytes, so it has fewer than 2^64 pages of one byte.
        Ok((last_iova(iova, self.total_len())? >> shift) - (iova.0 >> shift) + 1)
    }

    /// The addresses of the blocks behind the pages of `page_size` bytes, when the range is mapped at `iova`.
    ///
    /// Each address is a multiple of `page_size`, even if the range begins or ends inside its block. The
    /// iterator has [`num_blocks`](Self::num_blocks) items. One pass over the runs checks the size first.
    ///
    /// # Errors
    /// - [`Error::InvalidPageSize`]: `page_size` is not a power of two, or larger than the runs and `iova`
    ///   allow. [`best_page_size`](Self::best_page_size) returns one that fits.
    /// - [`Error::IovaOverflow`]: the range's last iova does not fit in 64 bits.
    #[doc(alias("rdma_umem_for_each_dma_block", "rdma_for_each_block"))]
    pub fn blocks(&self, page_size: u64, iova: Iova) -> Result<Blocks<'a>> {
        let count = self.num_blocks(page_size, iova)?;
        let conflict = conflict(self, iova);
        if conflict & (page_size - 1) != 0 {
            return Err(Error::InvalidPageSize { page_size, alignment: alignment(conflict) });
        }
        Ok(Blocks { spans: Spans::new(*self), page_size, next: 0, here: 0, later: count })
    }

    /// The offset of the range in its first block of `page_size` bytes, a power of two.
    #[doc(alias = "ib_umem_dma_offset")]
    pub fn dma_offset(&self, page_size: u64) -> u64 {
        self.start_addr() & (page_size.wrapping_sub(1))
    }
}

fn last_iova(iova: Iova, length: u64) -> Result<u64> {
    iova.0.checked_add(length - 1).ok_or(Error::IovaOverflow { iova, length })
}

/// The address bits that keep a page from being contiguous: those in which a run's address and its iova
/// differ, and those of each iova at which one run ends and another begins.
fn conflict(view: &DmaSgView<'_>, iova: Iova) -> u64 {
    let (runs, skip) = view.touched();
    let mut bits = view.start_addr() ^ iova.0;
    // The iova of the first run's first byte, which may lie before the range.
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

/// The largest page size that these conflicting bits allow.
fn alignment(conflict: u64) -> u64 {
    1 << conflict.trailing_zeros().min(63)
}

/// The addresses of blocks of one size; see [`DmaSgView::blocks`].
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
    /// Goes to the next span. The page size was checked, so spans begin and end at block borders, except at
    /// both ends of the range.
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
        // Wraps after a block that ends at 2^64.
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
    use super::*;
    use crate::{DmaSg, DmaSgList, model};
    use proptest::prelude::*;

    fn list(runs: &[(u64, u64)]) -> DmaSgList {
        DmaSgList::from_runs(runs.iter().map(|&(addr, len)| DmaSg { addr, len })).unwrap()
    }

    /// Computed by hand from the kernel's function.
    #[test]
    fn best_page_size_of_known_cases() {
        const K4_M2: PageSizes = PageSizes(0x1000 | 0x20_0000);
        let best =
            |runs: &[(u64, u64)], supported, iova| list(runs).best_page_size(supported, Iova(iova)).unwrap();
        // One page of 128 KiB instead of two of 32 KiB.
        assert_eq!(best(&[(0xa000, 0x7000)], PageSizes::ALL, 0xa000), 0x2_0000);
        // Both sizes hold it: the smaller one.
        assert_eq!(best(&[(0x4000, 0x1000)], PageSizes(0x1000 | 1 << 40), 0x4000), 0x1000);
        assert_eq!(best(&[(0, 4 << 30)], K4_M2, 0), 0x20_0000);
        // The iova is not congruent to 2 MiB.
        assert_eq!(best(&[(0, 4 << 30)], K4_M2, 0x1000), 0x1000);
        // Only borders inside the list count.
        assert_eq!(best(&[(0x10_0000, 0x10_0000), (0x80_0000, 0x1234)], K4_M2, 0x10_0000), 0x20_0000);
        assert_eq!(best(&[(0x10_0000, 0xff000), (0x80_0000, 0x1234)], K4_M2, 0x10_0000), 0x1000);
        // The kernel counts no page below two bytes as holding a single byte.
        assert_eq!(best(&[(7, 1)], PageSizes(0x1003), 7), 2);
        // A page of half the address space.
        assert_eq!(best(&[(1, u64::MAX - 1)], PageSizes(1 << 63), 1), 1 << 63);
    }

    #[test]
    fn unfit_page_sizes_are_refused() {
        let list = list(&[(0x1000, 0x1000), (0x3800, 0x800)]);
        let refused = |supported, iova| list.best_page_size(PageSizes(supported), Iova(iova)).unwrap_err();
        assert!(matches!(refused(0, 0x1000), Error::NoPageSize { supported: 0, alignment: 0x800 }));
        assert!(matches!(refused(0x3000, 0), Error::NoPageSize { supported: 0x3000, alignment: 0x800 }));
        assert!(matches!(refused(0x1000, 1), Error::NoPageSize { alignment: 1, .. }));
        assert!(matches!(refused(1, u64::MAX), Error::IovaOverflow { iova: Iova(u64::MAX), length: 0x1800 }));
        for size in [0, 3, 0x1800, u64::MAX] {
            assert!(
                matches!(list.blocks(size, Iova(0)), Err(Error::InvalidPageSize { page_size, .. }) if page_size == size)
            );
            assert!(matches!(list.num_blocks(size, Iova(0)), Err(Error::InvalidPageSize { .. })));
            assert!(matches!(PageSizes::of(&[0x1000, size]), Err(Error::InvalidPageSize { .. })));
        }
        let refused = list.blocks(0x1000, Iova(0x1000)).unwrap_err();
        assert!(matches!(refused, Error::InvalidPageSize { page_size: 0x1000, alignment: 0x800 }));
        assert_eq!(PageSizes::of(&[0x1000, 0x20_0000]).unwrap(), PageSizes(0x20_1000));
        assert_eq!(list.as_view().dma_offset(0), 0x1000, "dma_offset takes 0");
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
        /// Compared with the address of every byte, for all sizes.
        #[test]
        fn page_sizes_and_blocks_agree_with_a_count_of_bytes(
            (list, offset, length) in model::range(), supported in 0..512_u64, congruent in 0..10_u32, high in 0..8_u64
        ) {
            let view = list.view(offset..offset + length).unwrap();
            // A random iova would mostly allow pages of one byte only.
            let iova = (high << congruent) + (view.start_addr() & ((1 << congruent) - 1));
            let pages = model::MappedBytes { bytes: &model::bytes(view), iova };
            match view.best_page_size(PageSizes(supported), Iova(iova)) {
                Ok(size) => prop_assert_eq!(Some(size), pages.best(supported)),
                Err(Error::NoPageSize { .. }) => prop_assert_eq!(None, pages.best(supported)),
                Err(other) => panic!("{other}"),
            }
            for size in (0..10).map(|bit| 1_u64 << bit) {
                prop_assert_eq!(view.num_blocks(size, Iova(iova)).unwrap(), pages.count(size));
                prop_assert_eq!(view.dma_offset(size), view.start_addr() % size);
                match (view.blocks(size, Iova(iova)), pages.blocks(size)) {
                    (Ok(blocks), Some(expected)) => {
                        prop_assert_eq!(blocks.len(), expected.len());
                        prop_assert_eq!(blocks.collect::<Vec<_>>(), expected);
                    }
                    (Err(Error::InvalidPageSize { .. }), None) => {}
                    (seen, expected) => panic!("{seen:?}, expected {expected:x?}"),
                }
            }
        }

        /// Compared with the kernel's formula, at addresses of any size.
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
        fn any_page_size_and_iova_are_accepted_or_refused(list in model::list(), size in model::edge(), iova in model::edge()) {
            let _ = list.best_page_size(PageSizes(size), Iova(iova));
            let _ = list.num_blocks(size, Iova(iova));
            let _ = list.as_view().dma_offset(size);
            if let Ok(blocks) = list.blocks(size, Iova(iova)) {
                prop_assert_eq!(blocks.len(), blocks.count());
            }
        }
    }
}
