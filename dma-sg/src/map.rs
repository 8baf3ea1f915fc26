//! Maps pages to the addresses that a device uses, as the kernel's `dma_map_sg` does.

use crate::view::Spans;
use crate::{DmaSg, DmaSgBuilder, DmaSgList, Error, PageList, Result};

/// How a device's addresses follow from physical ones.
pub trait Translation {
    /// Maps `pages`: returns the addresses by which the device reaches them, in the same order and of the
    /// same length.
    ///
    /// # Errors
    /// Depends on the translation. If it returns an error, nothing is mapped.
    fn map(&mut self, pages: &PageList) -> Result<DmaSgList>;

    /// Unmaps a list that [`map`](Self::map) returned. The default is for a translation without state: it
    /// does nothing.
    ///
    /// # Errors
    /// [`Error::IovaNotMapped`]: the list is not a mapping.
    fn unmap(&mut self, list: &DmaSgList) -> Result<()> {
        let _ = list;
        Ok(())
    }
}

/// Device addresses equal physical ones: there is no IOMMU, or it passes addresses through.
#[derive(Debug, Clone, Copy, Default)]
pub struct Identity;

impl Translation for Identity {
    fn map(&mut self, pages: &PageList) -> Result<DmaSgList> {
        DmaSgList::from_runs(pages.physical())
    }
}

/// Device addresses differ from physical ones by a constant: behind a host bridge with an offset, or for a
/// BAR whose bus address is not its CPU address.
#[derive(Debug, Clone, Copy)]
pub struct BusOffset {
    /// Bus address minus physical address, in bytes; may be negative.
    pub offset: i64,
}

impl Translation for BusOffset {
    /// Maps each run at its bus address.
    ///
    /// # Errors
    /// [`Error::AddressOverflow`]: a bus address is below 0 or does not fit in 64 bits.
    fn map(&mut self, pages: &PageList) -> Result<DmaSgList> {
        let mut builder = DmaSgBuilder::new();
        for DmaSg { addr, len } in pages.physical() {
            let refused = Error::AddressOverflow { addr, length: len };
            let addr = addr.checked_add_signed(self.offset).ok_or(refused)?;
            builder.push(DmaSg { addr, len })?;
        }
        builder.finish()
    }
}

/// A device's limits on the segments of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentLimits {
    /// Longest segment in bytes, at least a page. It is rounded down to whole pages.
    #[doc(alias = "dma_set_max_seg_size")]
    pub max_size: u64,
    /// No segment crosses a multiple of `boundary_mask + 1`, a power of two of at least a page.
    #[doc(alias = "dma_set_seg_boundary")]
    pub boundary_mask: u64,
}

impl SegmentLimits {
    /// No limits.
    pub const NONE: Self = Self { max_size: u64::MAX, boundary_mask: u64::MAX };
    /// The kernel's limits for a device that sets none (`include/linux/dma-mapping.h`).
    pub const KERNEL_DEFAULT: Self = Self { max_size: 64 << 10, boundary_mask: 0xffff_ffff };

    fn check(&self, page_size: u64) -> Result<()> {
        let Self { max_size, boundary_mask } = *self;
        let refused = |limit, value| Err(Error::InvalidLimit { limit, value });
        if max_size < page_size {
            refused("max_size", max_size)
        } else if boundary_mask < page_size - 1 || boundary_mask & boundary_mask.wrapping_add(1) != 0 {
            refused("boundary_mask", boundary_mask)
        } else {
            Ok(())
        }
    }

    /// Cuts the list into segments within the limits.
    fn cut(&self, list: DmaSgList, page_size: u64) -> Result<DmaSgList> {
        let max_size = self.max_size & !(page_size - 1);
        // How long a segment at an address may be.
        let room =
            |addr: u64| max_size.min((self.boundary_mask - (addr & self.boundary_mask)).saturating_add(1));
        if list.runs().iter().all(|run| run.len <= room(run.addr)) {
            return Ok(list);
        }
        let mut builder = DmaSgBuilder::new();
        for mut span in Spans::new(list.as_view()) {
            while span.len > 0 {
                let len = span.len.min(room(span.addr));
                builder.push_unmerged(DmaSg { addr: span.addr, len })?;
                span = DmaSg { addr: span.addr + len, len: span.len - len };
            }
        }
        builder.finish()
    }
}

/// Maps pages for one device, by its translation and its segment limits.
#[derive(Debug, Clone)]
pub struct DmaMap<T> {
    translation: T,
    limits: SegmentLimits,
}

impl<T: Translation> DmaMap<T> {
    /// Makes a map for a device with this translation and these limits.
    pub fn new(translation: T, limits: SegmentLimits) -> Self {
        Self { translation, limits }
    }

    /// Maps `pages` and returns the device's addresses. Contiguous runs share a segment as far as the limits
    /// allow.
    ///
    /// # Errors
    /// - [`Error::InvalidLimit`]: a limit is below the page size, or the boundary mask is not 2^n - 1.
    /// - An error of the translation: [`Error::AddressOverflow`], [`Error::IovaExhausted`],
    ///   [`Error::InvalidPageSize`].
    #[doc(alias("dma_map_sg", "dma_map_sgtable"))]
    pub fn map(&mut self, pages: &PageList) -> Result<DmaSgList> {
        // Checked first, so that nothing stays mapped after an error.
        self.limits.check(pages.page_size())?;
        let list = self.translation.map(pages)?;
        self.limits.cut(list, pages.page_size())
    }

    /// Unmaps a list that [`map`](Self::map) returned.
    ///
    /// # Errors
    /// [`Error::IovaNotMapped`]: the list was unmapped before, or never mapped here.
    #[doc(alias("dma_unmap_sg", "dma_unmap_sgtable"))]
    pub fn unmap(&mut self, list: &DmaSgList) -> Result<()> {
        self.translation.unmap(list)
    }

    /// The translation.
    pub fn translation(&self) -> &T {
        &self.translation
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PageRun, model};
    use proptest::prelude::*;

    fn pages(runs: &[(u64, u64)]) -> PageList {
        PageList::from_runs(4096, runs.iter().map(|&(pfn, count)| PageRun { pfn, count })).unwrap()
    }

    #[test]
    fn identity_and_offset() {
        let pages = pages(&[(1, 2), (7, 1)]);
        let list = DmaMap::new(Identity, SegmentLimits::NONE).map(&pages).unwrap();
        assert_eq!(list.runs(), [DmaSg { addr: 0x1000, len: 0x2000 }, DmaSg { addr: 0x7000, len: 0x1000 }]);
        let mut map = DmaMap::new(BusOffset { offset: -0x1000 }, SegmentLimits::NONE);
        let list = map.map(&pages).unwrap();
        assert_eq!(list.runs(), [DmaSg { addr: 0, len: 0x2000 }, DmaSg { addr: 0x6000, len: 0x1000 }]);
        map.unmap(&list).unwrap();
        for offset in [-0x1001, i64::MIN] {
            let refused = DmaMap::new(BusOffset { offset }, SegmentLimits::NONE).map(&pages);
            assert!(matches!(refused, Err(Error::AddressOverflow { addr: 0x1000, length: 0x2000 })));
        }
    }

    #[test]
    fn unfit_limits_are_refused() {
        let with = |max_size, boundary_mask| {
            DmaMap::new(Identity, SegmentLimits { max_size, boundary_mask }).map(&pages(&[(1, 2)]))
        };
        assert!(matches!(with(4095, u64::MAX), Err(Error::InvalidLimit { limit: "max_size", value: 4095 })));
        for mask in [0, 0xffe, 0xfff0, 0x7ff, u64::MAX - 1] {
            let refused = with(4096, mask);
            assert!(
                matches!(refused, Err(Error::InvalidLimit { limit: "boundary_mask", value }) if value == mask)
            );
        }
        assert_eq!(with(4097, 0xfff).unwrap().runs().len(), 2);
    }

    #[test]
    fn the_kernels_default_limit_is_64_kib() {
        let list = DmaMap::new(Identity, SegmentLimits::KERNEL_DEFAULT).map(&pages(&[(1, 33)])).unwrap();
        let lens: Vec<_> = list.runs().iter().map(|run| run.len >> 12).collect();
        assert_eq!(lens, [16, 16, 1]);
        assert_eq!(list, DmaMap::new(Identity, SegmentLimits::NONE).map(&pages(&[(1, 33)])).unwrap());
    }

    proptest! {
        /// The segments cover the same bytes, meet the limits, and none could be longer.
        #[test]
        fn segments_meet_the_limits_and_cover_the_pages(
            runs in prop::collection::vec((0..64_u64, 1..20_u64), 1..8), max in 1..40_u64, boundary in 0..7_u32
        ) {
            let runs = runs.into_iter().map(|(pfn, count)| PageRun { pfn, count });
            let pages = PageList::from_runs(4, runs).unwrap();
            let limits = SegmentLimits { max_size: max * 4 - max % 4 + 3, boundary_mask: (4 << boundary) - 1 };
            let whole = DmaMap::new(Identity, SegmentLimits::NONE).map(&pages).unwrap();
            let list = DmaMap::new(Identity, limits).map(&pages).unwrap();
            prop_assert_eq!(model::bytes(list.as_view()), model::bytes(whole.as_view()));
            let fits = |run: &DmaSg| {
                run.len <= limits.max_size && run.addr / (4 << boundary) == (run.addr + run.len - 1) / (4 << boundary)
            };
            prop_assert!(list.runs().iter().all(fits), "{:?} {:?}", limits, list);
            for pair in list.runs().windows(2) {
                let longer = DmaSg { addr: pair[0].addr, len: pair[0].len + 4 };
                prop_assert!(pair[0].addr + pair[0].len != pair[1].addr || !fits(&longer), "{:?} {:?}", limits, list);
                prop_assert_eq!(pair[0].len % 4, 0);
            }
        }
    }
}
