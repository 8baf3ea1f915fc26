//! A range of a dma-buf as a device is to address it: the user-space twin of the kernel's `ib_umem`.

use std::fmt;
use std::sync::LazyLock;

use crate::dmabuf::{BufferId, DmaBuf};
use crate::sg::{Blocks, DmaSg, DmaSgList, PageSizes};
use crate::{Error, Result};

/// An I/O virtual address: what work requests and remote keys address a region by.
///
/// Not a pointer, and not an offset in the buffer, though by default it has the offset's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Iova(pub u64);

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A byte range of a [`DmaBuf`] with its [`Iova`] and the [`DmaSg`] list that covers it.
///
/// It is a description, checked when it is made, and holds neither a descriptor nor memory; the
/// [`MemoryRegion`](crate::mr::MemoryRegion) made for it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Umem {
    buffer: BufferId,
    offset: u64,
    /// Also says where the range begins and how long it is.
    sg: DmaSgList,
}

impl Umem {
    /// Describes `length` bytes from `offset` of a buffer, to be addressed from `iova`.
    ///
    /// The list is what a work request may name, so here it is the one run from `iova`; a device's own
    /// view of the same bytes can have many.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::OutOfRange`]: the range is empty or not inside the buffer.
    /// - [`Error::IovaOverflow`]: `iova + length` does not fit in 64 bits.
    /// - [`Error::IovaNotCongruent`]: `iova` and `offset` differ modulo the page size, which uverbs
    ///   refuses (`drivers/infiniband/core/uverbs_std_types_mr.c`).
    #[inline]
    pub fn new(buffer: &DmaBuf, offset: u64, length: u64, iova: Iova) -> Result<Self> {
        check_range(offset, length, buffer.size())?;
        if iova.0.checked_add(length).is_none() {
            return Err(Error::IovaOverflow { iova, length });
        }
        let page_size = page_size();
        if (iova.0 ^ offset) & (page_size - 1) != 0 {
            return Err(Error::IovaNotCongruent { iova, offset, page_size });
        }
        let sg = DmaSgList::single(DmaSg { addr: iova.0, len: length });
        Ok(Self { buffer: buffer.id(), offset, sg })
    }

    /// The buffer that the range is of.
    pub fn buffer(&self) -> BufferId {
        self.buffer
    }

    /// Offset of the range in the buffer, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length of the range in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range cannot be described
    #[inline]
    pub fn len(&self) -> u64 {
        self.sg.total_len()
    }

    /// Address of the range's first byte.
    #[inline]
    pub fn iova(&self) -> Iova {
        Iova(self.sg.runs()[0].addr)
    }

    /// The runs of addresses that cover the range, in order.
    pub fn sg(&self) -> &DmaSgList {
        &self.sg
    }

    /// How far into its first page of the system the range begins, in bytes.
    #[doc(alias = "ib_umem_offset")]
    pub fn page_offset(&self) -> u64 {
        self.offset % page_size()
    }

    /// How many pages of the system the range touches.
    #[doc(alias = "ib_umem_num_pages")]
    pub fn num_pages(&self) -> u64 {
        // A page size, and a range whose end was checked.
        self.num_dma_blocks(page_size()).unwrap_or_default()
    }

    /// How many blocks of `page_size` bytes the range touches, from its iova on.
    ///
    /// # Errors
    /// [`AddressError::InvalidPageSize`](crate::error::AddressError::InvalidPageSize): it is no power of two.
    #[doc(alias = "ib_umem_num_dma_blocks")]
    pub fn num_dma_blocks(&self, page_size: u64) -> Result<u64> {
        self.sg.num_blocks(page_size, self.iova())
    }

    /// How far into its first block of `page_size` bytes, a power of two, the range begins.
    #[doc(alias = "ib_umem_dma_offset")]
    pub fn dma_offset(&self, page_size: u64) -> u64 {
        self.sg.as_view().dma_offset(page_size)
    }

    /// The page size, of those supported, that maps the range best from its iova on.
    ///
    /// # Errors
    /// [`AddressError::NoPageSize`](crate::error::AddressError::NoPageSize): none of them fits.
    #[doc(alias = "ib_umem_find_best_pgsz")]
    pub fn best_page_size(&self, supported: PageSizes) -> Result<u64> {
        self.sg.best_page_size(supported, self.iova())
    }

    /// The addresses of the range's blocks of `page_size` bytes.
    ///
    /// # Errors
    /// [`AddressError::InvalidPageSize`](crate::error::AddressError::InvalidPageSize): it is no power of two, or larger than the list allows.
    #[doc(alias = "rdma_umem_for_each_dma_block")]
    pub fn dma_blocks(&self, page_size: u64) -> Result<Blocks<'_>> {
        self.sg.blocks(page_size, self.iova())
    }
}

impl fmt::Display for Umem {
    /// "4 GiB in 1 segment, best page size 4 GiB, at iova 0x0 (offset 0)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, at iova {} (offset {})", self.sg, self.iova(), self.offset)
    }
}

/// Checks that a range is not empty and lies within `size` bytes.
#[inline]
pub(crate) fn check_range(offset: u64, length: u64, size: u64) -> Result<()> {
    if length == 0 {
        return Err(Error::ZeroLength { offset });
    }
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::OutOfRange { offset, length, size }),
    }
}

/// The kernel's page size in bytes.
#[inline]
pub(crate) fn page_size() -> u64 {
    static PAGE_SIZE: LazyLock<u64> = LazyLock::new(|| {
        // SAFETY: sysconf takes no pointer and has no precondition.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(size).expect("every Linux has a page size")
    });
    *PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A range that begins and ends inside pages, against the kernel's definitions.
    #[test]
    fn pages_and_blocks_of_an_odd_range() {
        let (offset, length, iova) = (0x1ffe, 0x2004, Iova(0x7_0000_0ffe));
        let sg = DmaSgList::single(DmaSg { addr: iova.0, len: length });
        let umem = Umem { buffer: BufferId::UNKNOWN, offset, sg };
        assert_eq!(umem.page_offset(), 0xffe);
        assert_eq!(umem.num_pages(), 4);
        assert_eq!((umem.num_dma_blocks(0x1000).unwrap(), umem.num_dma_blocks(0x1_0000).unwrap()), (4, 1));
        assert_eq!((umem.dma_offset(0x800), umem.dma_offset(0x1_0000)), (0x7fe, 0xffe));
        let blocks: Vec<_> = umem.dma_blocks(0x1000).unwrap().collect();
        assert_eq!(blocks, [0x7_0000_0000, 0x7_0000_1000, 0x7_0000_2000, 0x7_0000_3000]);
        assert_eq!(umem.best_page_size(PageSizes::ALL).unwrap(), 0x4000);
        assert!(matches!(
            umem.best_page_size(PageSizes(0)),
            Err(Error::Addresses(crate::error::AddressError::NoPageSize { supported: 0, .. }))
        ));
        let shown = "8.0 KiB in 1 segment, best page size 16 KiB, at iova 0x700000ffe (offset 8190)";
        assert_eq!(umem.to_string(), shown);
    }

    #[test]
    fn ranges_are_checked_at_both_ends() {
        assert!(check_range(0, 4096, 4096).is_ok());
        assert!(check_range(4095, 1, 4096).is_ok());
        assert!(matches!(check_range(7, 0, 4096), Err(Error::ZeroLength { offset: 7 })));
        assert!(matches!(check_range(4096, 1, 4096), Err(Error::OutOfRange { .. })));
        assert!(matches!(check_range(0, 4097, 4096), Err(Error::OutOfRange { length: 4097, .. })));
        assert!(matches!(check_range(u64::MAX, 2, 4096), Err(Error::OutOfRange { offset: u64::MAX, .. })));
    }
}
