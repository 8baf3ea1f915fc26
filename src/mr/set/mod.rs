//! Many regions that behave as one.

mod builder;
mod chunks;

use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

pub use builder::{FdPolicy, Progress, RegionSetBuilder};

use super::{Access, MemoryRegion, Path, parallel, self_check};
use crate::dmabuf::{BufferId, DmaBuf};
use crate::sg::{DmaSg, DmaSgList};
use crate::transfer::{RemoteRegion, RemoteRun};
use crate::umem::{Iova, check_range};
use crate::verbs::{ProtectionDomain, Sge};
use crate::{Error, Result};

/// A range of any length, of one dma-buf or of several that follow each other, registered with one
/// device: as one region where the device takes it, else as chunks.
///
/// It has one length and one space of addresses, which its chunks cover without a gap. Dropping it
/// deregisters all chunks, in parallel; [`deregister`](Self::deregister) reports. The chunks hold what
/// they need, so it may outlive the buffers, the domain and the device's context.
#[derive(Debug)]
pub struct RegionSet {
    /// Never empty, in order of their offsets.
    chunks: Vec<MemoryRegion>,
    /// Where each begins in the set.
    starts: Vec<u64>,
    /// A descriptor for each chunk, with [`FdPolicy::PerChunk`].
    descriptors: Vec<DmaBuf>,
    length: u64,
    threads: usize,
}

/// Regions of a set that could not be deregistered, handed back with the reasons.
#[derive(Debug, thiserror::Error)]
#[error("{} regions of the set stay registered", .regions.len())]
pub struct DeregisterSetError {
    /// The regions, registered as before, in order.
    pub regions: Vec<MemoryRegion>,
    /// Why not, for each.
    pub errors: Vec<Error>,
}

impl RegionSet {
    /// Starts the registration of a buffer: by default all of it, for local reading only.
    pub fn builder(buffer: &DmaBuf) -> RegionSetBuilder<'_> {
        RegionSetBuilder::new(std::slice::from_ref(buffer))
    }

    /// Starts the registration of buffers as if they were one, in this order.
    pub fn of_buffers(buffers: &[DmaBuf]) -> RegionSetBuilder<'_> {
        RegionSetBuilder::new(buffers)
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range cannot be registered
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Address of the set's first byte; those of all others follow without a gap.
    pub fn iova(&self) -> Iova {
        self.first().iova()
    }

    /// What it may be used for.
    pub fn access(&self) -> Access {
        self.first().access()
    }

    /// The path that registered its first chunk; one device takes the same for all.
    pub fn path(&self) -> Path {
        self.first().path()
    }

    /// The protection domain that it is in.
    pub fn domain(&self) -> &ProtectionDomain {
        self.first().domain()
    }

    /// The buffer that it is of; the first one of several.
    pub fn buffer(&self) -> BufferId {
        self.first().umem().buffer()
    }

    /// The regions, in order of their offsets.
    pub fn chunks(&self) -> &[MemoryRegion] {
        &self.chunks
    }

    /// A chunk's own descriptor; `None` without [`FdPolicy::PerChunk`], or past the last chunk.
    pub fn descriptor(&self, chunk: usize) -> Option<BorrowedFd<'_>> {
        self.descriptors.get(chunk).map(DmaBuf::as_fd)
    }

    /// The region that has the byte at `offset`, and how far into it; `None` past the end.
    pub fn region_at(&self, offset: u64) -> Option<(&MemoryRegion, u64)> {
        let chunk = self.starts.partition_point(|start| *start <= offset).checked_sub(1)?;
        (offset < self.length).then(|| (&self.chunks[chunk], offset - self.starts[chunk]))
    }

    /// `length` bytes from `offset`, as elements for work requests: cut where a chunk ends, and where one
    /// would be longer than an element can be.
    ///
    /// # Errors
    /// [`Error::ZeroLength`], [`Error::OutOfRange`]: the range is empty or not inside the set.
    pub fn sges(&self, offset: u64, length: u64) -> Result<Vec<Sge<'_>>> {
        const LONGEST: u64 = u32::MAX as u64;
        check_range(offset, length, self.length)?;
        let (mut at, mut elements) = (offset, Vec::new());
        while let Some((region, inside)) = self.region_at(at).filter(|_| at < offset + length) {
            let bytes = (region.len() - inside).min(offset + length - at).min(LONGEST);
            elements.push(region.sge(inside, bytes)?);
            at += bytes;
        }
        Ok(elements)
    }

    /// The addresses that cover it, as one list: of one run, since they follow each other.
    pub fn sg(&self) -> DmaSgList {
        DmaSgList::single(DmaSg { addr: self.iova().0, len: self.length })
    }

    /// What a peer must know to read and write it: a run with its key for each chunk.
    pub fn remote(&self) -> RemoteRegion {
        let runs = self.chunks.iter().map(|chunk| RemoteRun {
            iova: chunk.iova(),
            length: chunk.len(),
            rkey: chunk.rkey(),
        });
        RemoteRegion::new(runs, self.access(), self.buffer())
            .expect("chunks are not empty and lie within the set's addresses, which were checked")
    }

    /// Checks by small transfers that the device reaches the first and the last byte of each chunk.
    ///
    /// One byte at a time is read, written with another value, read, and written back, through a queue
    /// pair that is connected to itself. Nothing else may use these bytes meanwhile. Where the access
    /// does not permit writing they are only read.
    ///
    /// # Errors
    /// As [`MemoryRegion::self_check`].
    pub fn self_check(&self) -> Result<()> {
        self_check::check(self.domain(), &self.chunks)
    }

    /// Deregisters all chunks, in parallel.
    ///
    /// # Errors
    /// [`DeregisterSetError`] with what the kernel refused ([`Error::Deregister`], `EBUSY`) and the regions
    /// that it was for; the others are gone.
    pub fn deregister(mut self) -> Result<(), DeregisterSetError> {
        let chunks = mem::take(&mut self.chunks);
        let (regions, errors): (Vec<_>, Vec<_>) = deregister(chunks, self.threads).into_iter().unzip();
        if errors.is_empty() { Ok(()) } else { Err(DeregisterSetError { regions, errors }) }
    }

    fn first(&self) -> &MemoryRegion {
        &self.chunks[0]
    }
}

impl Drop for RegionSet {
    fn drop(&mut self) {
        if self.chunks.len() > 1 {
            // What is left is tried once more as it is dropped, and logged.
            drop(deregister(mem::take(&mut self.chunks), self.threads));
        }
    }
}

/// Deregisters regions in parallel; returns those that stand, in order, with the reasons.
fn deregister(regions: Vec<MemoryRegion>, threads: usize) -> Vec<(MemoryRegion, Error)> {
    let slots: Vec<_> = regions.into_iter().map(|region| Mutex::new((Some(region), None))).collect();
    parallel::each(slots.len(), threads, |at| {
        let mut slot = slots[at].lock().unwrap_or_else(|poison| poison.into_inner());
        if let Some(Err(refused)) = slot.0.take().map(MemoryRegion::deregister) {
            *slot = (Some(*refused.region), Some(refused.error));
        }
        true
    });
    let left = slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(|poison| poison.into_inner()));
    left.filter_map(|(region, error)| region.zip(error)).collect()
}
