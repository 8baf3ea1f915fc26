//! Device memory that this library allocated from a runtime.

use std::fmt;
use std::ops::RangeBounds;
use std::sync::Arc;

use dma_sg::resolve_range;

use super::runtime::Runtime;
use super::{Allocation, PointerError, Result, whole_words};
use crate::observe::Process;

/// The allocator of a runtime's device memory.
pub(super) trait Heap: fmt::Debug + Send + Sync {
    /// Frees the memory at an address; logs a failure.
    fn free(&self, address: u64);

    /// Sets `count` words from `address` on, and waits for the device to finish.
    fn fill(&self, address: u64, word: u32, count: usize) -> Result<(), PointerError>;
}

/// Memory of a device, freed when dropped.
///
/// A dma-buf of the memory keeps it allocated, so this may be dropped after the export.
#[derive(Debug)]
pub struct DeviceMemory {
    address: u64,
    size: u64,
    heap: Arc<dyn Heap>,
    creator: Process,
}

impl DeviceMemory {
    pub(super) fn new(address: u64, size: u64, heap: Arc<dyn Heap>) -> Self {
        Self { address, size, heap, creator: Process::current() }
    }

    /// Device address of the first byte, as the runtime's functions take it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Has the device set every aligned 32-bit word inside the range, and waits for it.
    ///
    /// # Errors
    /// - [`Error::Range`](super::Error::Range): the range is empty, not inside the memory, or contains no such
    ///   word.
    /// - [`PointerError::RuntimeCall`].
    pub fn fill(&self, range: impl RangeBounds<u64>, word: u32) -> Result<()> {
        let words = whole_words(resolve_range(range, self.size)?)?;
        let count = (words.end - words.start) / 4;
        Ok(self.heap.fill(self.address + words.start, word, count as usize)?)
    }

    /// Zeroes the memory and exports all of it as one dma-buf, which keeps it allocated.
    pub(super) fn into_allocation(self, runtime: &dyn Runtime) -> Result<Allocation> {
        self.fill(.., 0)?;
        let mut ranges = runtime.export_at(self.address, self.size)?;
        let remedy = "a new allocation came as several dma-bufs, and an exporter returns one";
        let range = ranges.pop().filter(|_| ranges.is_empty());
        let range = range.ok_or(PointerError::NotExportable { runtime: runtime.name(), remedy })?;
        Ok(Allocation { dmabuf: range.dmabuf, backing: None })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.creator.is_current() {
            self.heap.free(self.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Debug, Default)]
    struct Freed(AtomicU32);

    impl Heap for Freed {
        fn free(&self, _: u64) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn fill(&self, _: u64, _: u32, _: usize) -> Result<(), PointerError> {
            Ok(())
        }
    }

    #[test]
    fn a_child_of_fork_frees_nothing() {
        let heap = Arc::new(Freed::default());
        let freed = || heap.0.load(Ordering::Relaxed);
        let mut memory = Some(DeviceMemory::new(4096, 4096, heap.clone()));
        assert!(crate::observe::in_a_child(|| {
            memory = None;
            freed() == 0
        }));
        drop(memory.take());
        assert_eq!(freed(), 1);
    }
}
