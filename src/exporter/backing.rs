//! The host pages behind a udmabuf: the memfds, and one mapping of all of them.
//!
//! `unsafe` is here for mmap, which places the memfds side by side in one reserved range of addresses.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::stat::fstat;

use crate::dmabuf::BufferId;

/// A byte range of a memfd.
#[derive(Debug)]
pub(super) struct MemfdRange {
    pub(super) memfd: OwnedFd,
    pub(super) range: Range<u64>,
}

impl MemfdRange {
    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// The memfds behind a udmabuf and their mapping in this process; clones share both.
///
/// A `HostMapping` registration pins this mapping. A device may write the bytes at any time, so access them
/// with volatile or atomic operations and never form a reference. [`DmaBuf::map`](crate::dmabuf::DmaBuf::map)
/// is the safe way.
#[derive(Debug, Clone)]
pub struct Backing {
    pages: Arc<HostPages>,
    buffer: BufferId,
}

impl Backing {
    pub(super) fn new(pages: HostPages, buffer: BufferId) -> Self {
        Self { pages: Arc::new(pages), buffer }
    }

    /// The dma-buf that consists of these pages.
    pub fn buffer(&self) -> BufferId {
        self.buffer
    }

    /// The memfds, in the order of their bytes in the buffer.
    pub fn memfds(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'_>> {
        self.pages.ranges.iter().map(|range| range.memfd.as_fd())
    }

    /// Address of the buffer's first byte, readable and writable. It is valid while a clone of this lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.pages.start.as_ptr()
    }

    /// Length of the mapping in bytes: the buffer's size.
    #[allow(clippy::len_without_is_empty)] // no udmabuf has 0 bytes
    pub fn len(&self) -> u64 {
        self.pages.length as u64
    }

    /// The physical pages of the buffer, which every importer gets. The udmabuf pins them, so the list
    /// stays true while the buffer lives.
    ///
    /// This needs `CAP_SYS_ADMIN` in the initial user namespace: root, outside containers.
    ///
    /// # Errors
    /// - [`dma_sg::Error::FramesHidden`]: this process lacks `CAP_SYS_ADMIN`.
    /// - [`dma_sg::Error::Pagemap`]: /proc/self/pagemap cannot be opened or read.
    pub fn page_list(&self) -> Result<dma_sg::PageList, dma_sg::Error> {
        dma_sg::pagemap::shared_range(self.as_ptr(), self.len())
    }
}

/// Memfds mapped side by side.
#[derive(Debug)]
pub(super) struct HostPages {
    pub(super) ranges: Vec<MemfdRange>,
    /// First page, inside the reservation.
    start: NonNull<u8>,
    length: usize,
    reservation: NonNull<u8>,
    reserved: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process and not to a thread; this type reads and writes nothing.
unsafe impl Send for HostPages {}
// SAFETY: as above; `start` is returned only as a raw pointer.
unsafe impl Sync for HostPages {}

impl HostPages {
    /// Maps ranges. The caller has checked that their total length is neither 0 nor beyond `isize::MAX`.
    pub(super) fn map(ranges: Vec<MemfdRange>) -> Result<Self, Errno> {
        let length: usize = ranges.iter().map(|range| range.len() as usize).sum();
        // The kernel uses transparent huge pages only if address and offset are equal modulo their size. The
        // block size of a memfd does not tell this size while huge pages are by advice (madvise).
        let mut align = Some(transparent_page_size()).filter(|size| *size <= length).unwrap_or(1);
        // The block size of a hugetlb memfd is its page size, to which the mapping must be aligned.
        for range in &ranges {
            align = align.max(fstat(&range.memfd)?.st_blksize as usize);
        }
        let reserved = length.checked_add(align).and_then(NonZeroUsize::new).ok_or(Errno::ENOMEM)?;
        // SAFETY: the kernel chooses a free range, and PROT_NONE makes it inaccessible.
        let reservation = unsafe {
            mmap_anonymous(
                None,
                reserved,
                ProtFlags::PROT_NONE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )?
        };
        let reservation = reservation.cast::<u8>();
        let padding = reservation.as_ptr().align_offset(align);
        // SAFETY: the padding is less than `align`, by which the reservation exceeds `length`.
        let start = unsafe { reservation.add(padding) };
        // From here on, dropping `pages` unmaps the reservation with everything in it.
        let pages = Self { ranges, start, length, reservation, reserved };
        let mut at = start;
        for range in &pages.ranges {
            let address = NonZeroUsize::new(at.as_ptr().addr());
            let length = NonZeroUsize::new(range.len() as usize).ok_or(Errno::EINVAL)?;
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: MAP_FIXED replaces a part of the reservation above, which only this function knows.
            unsafe { mmap(address, length, protection, flags, &range.memfd, range.range.start as i64)? };
            // SAFETY: the lengths of the ranges sum to `length`, so this stays in the reservation.
            at = unsafe { at.add(length.get()) };
        }
        Ok(pages)
    }

    /// Requests transparent huge pages, and populates the mapping so that the kernel allocates them now.
    pub(super) fn populate_huge(&self) -> Result<(), Errno> {
        for advice in [MmapAdvise::MADV_HUGEPAGE, MmapAdvise::MADV_POPULATE_WRITE] {
            // SAFETY: the range belongs to this mapping, and neither advice changes its contents.
            unsafe { madvise(self.start.cast(), self.length, advice)? };
        }
        Ok(())
    }
}

/// Bytes of a transparent huge page; 1 on a kernel without them.
pub(crate) fn transparent_page_size() -> usize {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    text.ok()
        .and_then(|text| text.trim().parse().ok())
        .filter(|size: &usize| size.is_power_of_two())
        .unwrap_or(1)
}

impl Drop for HostPages {
    fn drop(&mut self) {
        // SAFETY: the reservation belongs to this object, and no reference into it exists.
        if let Err(error) = unsafe { munmap(self.reservation.cast(), self.reserved.get()) } {
            tracing::warn!(%error, "cannot unmap the pages behind a udmabuf");
        }
    }
}
