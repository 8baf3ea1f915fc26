//! Device memory that this library allocated.

use std::fmt;
use std::sync::Arc;

use crate::Result;
use crate::umem::check_range;

/// What memory of a runtime goes back to.
pub(super) trait Heap: fmt::Debug + Send + Sync {
    /// Frees what [`DeviceMemory`] holds; a failure is logged.
    fn free(&self, address: u64);

    /// Sets each of `count` words from `address` on, and waits until that is done.
    fn fill(&self, address: u64, word: u32, count: usize) -> Result<()>;
}

/// Memory of a device, freed when dropped.
///
/// A dma-buf of it holds the memory by itself, so this may go once it is exported.
#[derive(Debug)]
pub struct DeviceMemory {
    address: u64,
    size: u64,
    heap: Arc<dyn Heap>,
}

impl DeviceMemory {
    pub(super) fn new(address: u64, size: u64, heap: Arc<dyn Heap>) -> Self {
        Self { address, size, heap }
    }

    /// The device's address of the first byte, as the runtime's functions take it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Has the device set each 32-bit word of `length` bytes from `offset` on, and waits for it. Both are
    /// multiples of 4; what is beyond a multiple is left out.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`](crate::Error::ZeroLength), [`Error::OutOfRange`](crate::Error::OutOfRange).
    /// - [`ExporterError::RuntimeCall`](crate::error::ExporterError::RuntimeCall).
    pub fn fill(&self, offset: u64, length: u64, word: u32) -> Result<()> {
        check_range(offset, length, self.size)?;
        self.heap.fill(self.address + offset - offset % 4, word, (length / 4) as usize)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.heap.free(self.address);
    }
}
