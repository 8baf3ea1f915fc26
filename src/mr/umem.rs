//! A checked range of a buffer with its iova.

use std::fmt;
use std::ops::RangeBounds;

use dma_sg::{DmaSg, Iova, Size, page_size, resolve_range};

use super::{Buffer, RegisterError};
use crate::dmabuf::BufferId;

/// A byte range of a [`Buffer`] with the [`Iova`] of its first byte, checked when it is created.
///
/// It is only a description: it holds neither a descriptor nor memory.
/// [`MemoryRegion`](super::MemoryRegion) holds both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(alias = "ib_umem")]
pub struct Umem {
    buffer: BufferId,
    offset: u64,
    length: u64,
    iova: Iova,
}

impl Umem {
    /// Describes a byte range of a buffer. A device will address its first byte as `iova`.
    ///
    /// # Errors
    /// - [`RegisterError::Range`]: the range is empty, inverted, or not inside the buffer.
    /// - [`RegisterError::IovaOverflow`]: `iova` plus the length does not fit in 64 bits.
    /// - [`RegisterError::IovaNotCongruent`]: `iova` and the offset differ modulo the page size, which uverbs
    ///   refuses (`drivers/infiniband/core/uverbs_std_types_mr.c`). In host memory that does not begin at a page, the
    ///   offset counts from that page.
    pub fn new<'a>(
        buffer: impl Into<Buffer<'a>>,
        range: impl RangeBounds<u64>,
        iova: Iova,
    ) -> Result<Self, RegisterError> {
        let buffer = buffer.into();
        let range = resolve_range(range, buffer.size())?;
        let (offset, length) = (range.start, range.end - range.start);
        if iova.0.checked_add(length).is_none() {
            return Err(RegisterError::IovaOverflow { iova, length });
        }
        let (page_size, from_page) = (page_size(), buffer.page_offset() + offset);
        if (iova.0 ^ from_page) & (page_size - 1) != 0 {
            return Err(RegisterError::IovaNotCongruent { iova, offset: from_page, page_size });
        }
        Ok(Self { buffer: buffer.id(), offset, length, iova })
    }

    /// A region of another library, whose buffer is unknown.
    pub(super) fn foreign(length: u64, iova: Iova) -> Result<Self, RegisterError> {
        resolve_range(..length, length)?;
        match iova.0.checked_add(length) {
            Some(_) => Ok(Self { buffer: BufferId::UNKNOWN, offset: 0, length, iova }),
            None => Err(RegisterError::IovaOverflow { iova, length }),
        }
    }

    /// The same range at the iova that was registered.
    pub(super) fn at(self, iova: Iova) -> Self {
        Self { iova, ..self }
    }

    /// A range of a buffer that does not exist, for tests. Its iova is its offset.
    #[cfg(test)]
    pub(super) fn fake(buffer: BufferId, range: std::ops::Range<u64>) -> Self {
        let std::ops::Range { start, end } = range;
        Self { buffer, offset: start, length: end - start, iova: Iova(start) }
    }

    /// The buffer.
    pub fn buffer(&self) -> BufferId {
        self.buffer
    }

    /// Offset of the range in the buffer, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length of the range in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range cannot be described
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Address of the first byte in work requests.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// The addresses that work requests use for the range: one run from its iova. A
    /// [`DeviceView`](dma_sg::device_view::DeviceView) shows the DMA addresses behind them.
    pub fn sg(&self) -> DmaSg {
        DmaSg { addr: self.iova.0, len: self.length }
    }
}

impl fmt::Display for Umem {
    /// For example "4 GiB at iova 0x0 (offset 0)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at iova {} (offset {})", Size(self.length), self.iova, self.offset)
    }
}
