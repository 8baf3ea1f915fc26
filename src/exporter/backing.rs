//! The host pages behind a udmabuf, which stay ours: the memfds and one mapping of all of them.
//!
//! `unsafe` is here for mmap: several memfds are laid side by side in one reserved range of addresses.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::stat::fstat;

use crate::dmabuf::BufferId;

/// A range of a memfd.
#[derive(Debug)]
pub struct Piece {
    /// The memfd; it needs to be sealable.
    pub memfd: OwnedFd,
    /// First byte, a multiple of the page size (of the huge page size for a hugetlb memfd).
    pub offset: u64,
    /// Length in bytes, a multiple likewise.
    pub length: u64,
}

/// The memfds behind a udmabuf and their mapping in this process; clones share both.
///
/// This is what a `HostMapping` registration pins, and where host code may look at the bytes. A device
/// may write them any time, so go by the pointer with volatile or atomic access and never make a
/// reference of it; [`DmaBuf::map`](crate::DmaBuf::map) does that safely.
#[derive(Debug, Clone)]
pub struct Backing {
    pages: Arc<HostPages>,
    buffer: BufferId,
}

impl Backing {
    pub(super) fn new(pages: HostPages, buffer: BufferId) -> Self {
        Self { pages: Arc::new(pages), buffer }
    }

    /// The dma-buf that these pages are behind.
    pub fn buffer(&self) -> BufferId {
        self.buffer
    }

    /// The memfds, in the order of their bytes in the buffer.
    pub fn memfds(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'_>> {
        self.pages.pieces.iter().map(|piece| piece.memfd.as_fd())
    }

    /// Where the buffer's first byte is mapped, readable and writable, as long as a clone of this lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.pages.start.as_ptr()
    }

    /// Length of the mapping in bytes: that of the buffer.
    #[allow(clippy::len_without_is_empty)] // there is no udmabuf of 0 bytes
    pub fn len(&self) -> u64 {
        self.pages.length as u64
    }
}

/// Memfds mapped side by side.
#[derive(Debug)]
pub(super) struct HostPages {
    pub(super) pieces: Vec<Piece>,
    /// The pages, inside the reservation.
    start: NonNull<u8>,
    length: usize,
    reservation: NonNull<u8>,
    reserved: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process, not to a thread; nothing here reads or writes through it.
unsafe impl Send for HostPages {}
// SAFETY: as above; `start` is only handed out as a raw pointer.
unsafe impl Sync for HostPages {}

impl HostPages {
    /// Maps pieces whose total length the caller has checked to be neither 0 nor beyond `isize::MAX`.
    pub(super) fn map(pieces: Vec<Piece>) -> Result<Self, Errno> {
        let length: usize = pieces.iter().map(|piece| piece.length as usize).sum();
        // Transparent huge pages come only where address and offset are alike in them. The block size of
        // a memfd does not say so while huge pages are by advice.
        let mut align = Some(transparent_page_size()).filter(|size| *size <= length).unwrap_or(1);
        // It is the page size of hugetlb, which its mapping must be aligned to.
        for piece in &pieces {
            align = align.max(fstat(&piece.memfd)?.st_blksize as usize);
        }
        let reserved = length.checked_add(align).and_then(NonZeroUsize::new).ok_or(Errno::ENOMEM)?;
        // SAFETY: a new range at an address of the kernel's choice, not accessible as yet.
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
        // From here on dropping it unmaps the reservation with whatever lies in it.
        let pages = Self { pieces, start, length, reservation, reserved };
        let mut at = start;
        for piece in &pages.pieces {
            let address = NonZeroUsize::new(at.as_ptr().addr());
            let length = NonZeroUsize::new(piece.length as usize).ok_or(Errno::EINVAL)?;
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: MAP_FIXED replaces a part of the reservation above, which nobody else knows.
            unsafe { mmap(address, length, protection, flags, &piece.memfd, piece.offset as i64)? };
            // SAFETY: the pieces' lengths sum to `length`, so this stays in the reservation.
            at = unsafe { at.add(length.get()) };
        }
        Ok(pages)
    }

    /// Asks for transparent huge pages and brings all pages in, so that they are such.
    pub(super) fn populate_huge(&self) -> Result<(), Errno> {
        for advice in [MmapAdvise::MADV_HUGEPAGE, MmapAdvise::MADV_POPULATE_WRITE] {
            // SAFETY: the range is this mapping's own, and neither advice changes its contents.
            unsafe { madvise(self.start.cast(), self.length, advice)? };
        }
        Ok(())
    }
}

/// Bytes of a transparent huge page; 1 on a kernel without them.
fn transparent_page_size() -> usize {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    text.ok()
        .and_then(|text| text.trim().parse().ok())
        .filter(|size: &usize| size.is_power_of_two())
        .unwrap_or(1)
}

impl Drop for HostPages {
    fn drop(&mut self) {
        // SAFETY: the whole reservation is this object's own, and no reference into it was made.
        if let Err(error) = unsafe { munmap(self.reservation.cast(), self.reserved.get()) } {
            tracing::warn!(%error, "cannot unmap the pages behind a udmabuf");
        }
    }
}
