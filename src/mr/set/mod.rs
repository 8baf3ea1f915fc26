//! Many regions that behave as one.

mod builder;
mod chunks;

use std::fmt;
use std::mem;
use std::ops::RangeBounds;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

pub use builder::RegionSetBuilder;

use dma_sg::{Iova, RangeError};

use super::{
    Access, Buffer, DeregisterError, MemoryRegion, Path, RegionSlice, RemoteRegion, SelfCheckError, parallel,
    self_check,
};
use crate::dmabuf::{BufferId, DmaBuf};
use crate::verbs::ProtectionDomain;

/// A registered range of any length, of one buffer or of several in a row, on one device: one region if the
/// device permits it, otherwise chunks.
///
/// Its chunks have consecutive addresses without a gap. Like a [`MemoryRegion`] it is a handle: clones and
/// [slices](Self::slice) share the set, and dropping the last of them deregisters all chunks in parallel.
/// [`deregister`](Self::deregister) reports failures.
#[derive(Clone)]
pub struct RegionSet {
    inner: Arc<Inner>,
}

struct Inner {
    /// At least one, in the order of their offsets.
    chunks: Vec<MemoryRegion>,
    /// Offset of each chunk in the set.
    starts: Vec<u64>,
    /// For each chunk its descriptor with [`own_descriptors`](RegionSetBuilder::own_descriptors), else `None`.
    descriptors: Vec<Option<DmaBuf>>,
    length: u64,
    threads: usize,
}

impl RegionSet {
    /// Starts the registration of a buffer. The defaults are the whole buffer and no access flags: the device may
    /// read. The protection domain comes last, with [`register`](RegionSetBuilder::register), or several with
    /// [`register_on`](RegionSetBuilder::register_on).
    pub fn builder<'a>(buffer: impl Into<Buffer<'a>>) -> RegionSetBuilder<'a> {
        RegionSetBuilder::new(vec![buffer.into()])
    }

    /// Starts the registration of several buffers in a row, in this order: dma-bufs, host memory, or both. Each buffer
    /// but the first must begin at a page, and each but the last end at one, which only host memory may not.
    pub fn of_buffers<'a>(buffers: impl IntoIterator<Item = impl Into<Buffer<'a>>>) -> RegionSetBuilder<'a> {
        RegionSetBuilder::new(buffers.into_iter().map(Into::into).collect())
    }

    /// `chunks` is not empty, and the addresses of the chunks are consecutive.
    fn new(chunks: Vec<MemoryRegion>, descriptors: Vec<Option<DmaBuf>>, threads: usize) -> Self {
        let (mut starts, mut length) = (Vec::with_capacity(chunks.len()), 0);
        for chunk in &chunks {
            starts.push(length);
            length += chunk.len();
        }
        Self { inner: Arc::new(Inner { chunks, starts, descriptors, length, threads }) }
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range cannot be registered
    pub fn len(&self) -> u64 {
        self.inner.length
    }

    /// Address of the first byte in work requests; the addresses of all other bytes follow without a gap.
    pub fn iova(&self) -> Iova {
        self.first().iova()
    }

    /// The access flags of the set.
    pub fn access(&self) -> Access {
        self.first().access()
    }

    /// The path that registered the first chunk, and in practice all others on the same device.
    pub fn path(&self) -> Path {
        self.first().path()
    }

    /// The protection domain of the set.
    pub fn domain(&self) -> &ProtectionDomain {
        self.first().domain()
    }

    /// The first buffer of the set.
    pub fn buffer(&self) -> BufferId {
        self.first().umem().buffer()
    }

    /// The regions, in the order of their offsets.
    pub fn chunks(&self) -> &[MemoryRegion] {
        &self.inner.chunks
    }

    /// The descriptor of a chunk; `None` without [`own_descriptors`](RegionSetBuilder::own_descriptors), for host
    /// memory, or if there is no such chunk.
    pub fn descriptor(&self, chunk: usize) -> Option<BorrowedFd<'_>> {
        self.inner.descriptors.get(chunk)?.as_ref().map(DmaBuf::as_fd)
    }

    /// A byte range of the set, for a transfer, a work request or a peer. The slice is a handle: it keeps the set
    /// registered.
    ///
    /// # Errors
    /// [`RangeError`]: the range is empty, inverted, or not inside the set.
    pub fn slice(&self, range: impl RangeBounds<u64>) -> Result<RegionSlice, RangeError> {
        RegionSlice::from(self).slice(range)
    }

    /// The description that a peer needs to access the set: one run for each chunk, with its remote key. To
    /// describe a part, call [`RegionSlice::remote`].
    pub fn remote(&self) -> RemoteRegion {
        RegionSlice::from(self).remote()
    }

    /// Checks that the device reaches the first and the last byte of each chunk; see
    /// [`MemoryRegion::self_check`].
    ///
    /// # Errors
    /// As [`MemoryRegion::self_check`].
    pub fn self_check(&self) -> Result<(), SelfCheckError> {
        self_check::check(self.domain(), self.chunks())
    }

    /// Deregisters all chunks, in parallel.
    ///
    /// # Errors
    /// - [`DeregisterError::SetInUse`]: other handles of the set live; dropping the last one deregisters it.
    /// - [`DeregisterError::Chunks`]: some chunks stay registered, because the kernel refused (`EBUSY`) or because
    ///   other handles of a chunk live. The others were deregistered.
    pub fn deregister(self) -> Result<(), DeregisterError> {
        let others = Arc::strong_count(&self.inner) - 1;
        let mut inner = match Arc::try_unwrap(self.inner) {
            Ok(inner) => inner,
            // Another thread may have dropped its handle after the count.
            Err(inner) => {
                return Err(DeregisterError::SetInUse { set: Self { inner }, handles: others.max(1) });
            }
        };
        let chunks = mem::take(&mut inner.chunks);
        let count = chunks.len();
        let mut errors = deregister(chunks, inner.threads);
        if errors.is_empty() {
            return Ok(());
        }
        let source = Box::new(errors.remove(0));
        Err(DeregisterError::Chunks { source, others: errors, chunks: count })
    }

    /// Whether other handles of the set or of a chunk live.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.inner) > 1 || self.inner.chunks.iter().any(MemoryRegion::is_shared)
    }

    /// The index of the chunk with the byte at `offset`, and the offset of that chunk in the set.
    pub(super) fn find(&self, offset: u64) -> (usize, u64) {
        let starts = &self.inner.starts;
        let index = starts.partition_point(|start| *start <= offset) - 1;
        (index, starts[index])
    }

    fn first(&self) -> &MemoryRegion {
        &self.inner.chunks[0]
    }
}

impl fmt::Debug for RegionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { chunks, length, .. } = &*self.inner;
        f.debug_struct("RegionSet").field("length", length).field("chunks", chunks).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.chunks.len() > 1 {
            let inherited = self.chunks[0].is_inherited();
            let chunks = mem::take(&mut self.chunks);
            let chunks: Vec<_> = chunks.into_iter().map(|chunk| Mutex::new(Some(chunk))).collect();
            // In a child of `fork` there is nothing to deregister, so start no thread.
            let threads = if inherited { 1 } else { self.threads };
            // Dropping the last handle of a chunk deregisters it and logs a failure.
            parallel::each(chunks.len(), threads, |at| {
                drop(chunks[at].lock().unwrap_or_else(PoisonError::into_inner).take());
                true
            });
        }
    }
}

/// Deregisters regions in parallel. Returns the errors, in order.
fn deregister(regions: Vec<MemoryRegion>, threads: usize) -> Vec<DeregisterError> {
    let slots: Vec<_> = regions.into_iter().map(|region| Mutex::new((Some(region), None))).collect();
    parallel::each(slots.len(), threads, |at| {
        let mut slot = slots[at].lock().unwrap_or_else(PoisonError::into_inner);
        slot.1 = slot.0.take().and_then(|region| region.deregister().err());
        true
    });
    let slots = slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner));
    slots.filter_map(|(_, error)| error).collect()
}
