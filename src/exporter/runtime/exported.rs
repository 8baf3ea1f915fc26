//! Exported device memory, and how much of it an export covers.

use std::fmt;
use std::ops::{Range, RangeBounds};
use std::sync::Arc;

use dma_sg::{RangeError, resolve_range};

use crate::dmabuf::DmaBuf;

/// How much of an allocation one export covers.
///
/// | memory | `Range` | `Allocation` |
/// |---|---|---|
/// | CUDA, `cudaMalloc` | the pages around the range | the allocation |
/// | CUDA, mapped into reserved addresses | the pages around the range, across mappings | all mappings around the address, up to the next gap |
/// | ROCm, Level Zero | the allocation: these export nothing smaller | the allocation |
///
/// A driver may refuse either. Then the export tries the other, and at last one dma-buf for each mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Extent {
    /// What was requested, in whole pages: the default of an export. A GPU maps what a NIC imports through a window
    /// (BAR1) that may be smaller than its memory, and one tensor should not take the window of a whole arena.
    #[default]
    Range,
    /// The allocation: the default of a cache. One export and one registration serve all later requests.
    Allocation,
}

/// Options of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportOptions {
    /// How much one export covers. Default [`Extent::Range`].
    pub extent: Extent,
    /// Whether to request the mapping through the GPU's PCIe BAR although a nearer path exists, such as NVLink to the
    /// CPU. Only [`Path::DataDirect`](crate::mr::Path::DataDirect) registers it, and that path needs it. If the driver
    /// refuses, the export has the driver's own mapping; [`ExportedRange::pcie`] says which. Default: no.
    #[doc(alias = "CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE")]
    pub pcie: bool,
    /// Whether to make CUDA's synchronous memory operations on the memory always synchronize. Otherwise a copy may
    /// still write after its call has returned, and a NIC may send older bytes. For memory whose driver takes this
    /// only for a context, it is set for the whole context. Default: yes.
    #[doc(alias("CU_POINTER_ATTRIBUTE_SYNC_MEMOPS", "CU_CTX_SYNC_MEMOPS"))]
    pub sync_memops: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { extent: Extent::Range, pcie: false, sync_memops: true }
    }
}

setters!(ExportOptions { extent: Extent, pcie: bool, sync_memops: bool });

/// Tells whether addresses still have the memory that was exported.
pub(in crate::exporter) trait Witness: fmt::Debug + Send + Sync {
    /// Whether these addresses still have the memory that they had at the export. Asks the runtime.
    fn is_current(&self, addresses: Range<u64>) -> bool;
}

/// The bytes of a dma-buf that are exported memory: all of it, or a part if it spans several allocations.
#[derive(Debug)]
#[non_exhaustive]
pub struct ExportedRange {
    /// The buffer. It may begin before the exported memory and end after it.
    pub dmabuf: DmaBuf,
    /// Whether the driver maps the memory through the PCIe BAR although a nearer path exists;
    /// see [`ExportOptions::pcie`].
    pub pcie: bool,
    /// Whether CUDA's synchronous memory operations on the memory always synchronize; see
    /// [`ExportOptions::sync_memops`]. False for runtimes without such a switch.
    pub sync_memops: bool,
    range: Range<u64>,
    memory: Range<u64>,
    witness: Option<Arc<dyn Witness>>,
}

impl ExportedRange {
    /// A range of a dma-buf.
    ///
    /// # Errors
    /// [`RangeError`]: the range is empty or not inside the buffer.
    pub fn new(dmabuf: DmaBuf, range: impl RangeBounds<u64>) -> Result<Self, RangeError> {
        let range = resolve_range(range, dmabuf.size())?;
        let memory = range.clone();
        Ok(Self { dmabuf, range, memory, pcie: false, sync_memops: false, witness: None })
    }

    /// Sets the bytes of the buffer that belong to the same allocation, or to mappings side by side, as the range.
    ///
    /// # Errors
    /// [`RangeError`]: it is not inside the buffer, or does not contain the range.
    pub fn with_memory(self, memory: Range<u64>) -> Result<Self, RangeError> {
        let memory = resolve_range(memory, self.dmabuf.size())?;
        if self.range.start < memory.start || memory.end < self.range.end {
            let Range { start: offset, end } = self.range;
            return Err(RangeError::OutOfRange { offset, length: end - offset, size: memory.end });
        }
        Ok(Self { memory, ..self })
    }

    /// As if a runtime had a witness that the memory is what it was.
    #[cfg(test)]
    pub(crate) fn with_test_witness(self, current: bool) -> Self {
        #[derive(Debug)]
        struct Fixed(bool);
        impl Witness for Fixed {
            fn is_current(&self, _: Range<u64>) -> bool {
                self.0
            }
        }
        Self { witness: Some(Arc::new(Fixed(current))), ..self }
    }

    #[cfg(feature = "cuda")]
    pub(in crate::exporter) fn with_witness(self, witness: Option<Arc<dyn Witness>>) -> Self {
        Self { witness, ..self }
    }

    /// The bytes of the buffer that are the exported memory.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The bytes of the buffer that belong to the same allocation as the range, or to mappings side by side. Pages
    /// around them may have bytes of other allocations.
    pub fn memory(&self) -> Range<u64> {
        self.memory.clone()
    }

    /// Length of the range in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range is refused
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether these addresses still have the memory that was exported. True without a call for memory whose
    /// [`PointerInfo::id`](super::PointerInfo::id) tells that; for memory mapped into reserved addresses, asks the
    /// runtime about each mapping.
    pub(crate) fn is_current(&self, addresses: Range<u64>) -> bool {
        self.witness.as_ref().is_none_or(|witness| witness.is_current(addresses))
    }

    /// Whether [`is_current`](Self::is_current) asks the runtime.
    pub(crate) fn is_watched(&self) -> bool {
        self.witness.is_some()
    }
}
