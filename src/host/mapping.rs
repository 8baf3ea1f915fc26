//! Mappings of anonymous memory and of files.
//!
//! `unsafe` is here for mmap, munmap and madvise.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::exporter::{PageKind, transparent_page_size};
use crate::observe::Process;

/// A mapping of this process. A child of `fork` does not inherit it, and there `drop` does nothing.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    length: NonZeroUsize,
    creator: Process,
}

// SAFETY: the mapping belongs to the process and not to a thread; this type reads and writes nothing.
unsafe impl Send for Mapping {}
// SAFETY: as above; `start` is returned only as a raw pointer.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps zeroed memory. `size` is a multiple of the pages' size, which is a power of two.
    pub(super) fn anonymous(size: NonZeroUsize, pages: PageKind) -> Result<Self, Errno> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let mut flags = MapFlags::MAP_PRIVATE;
        if let PageKind::Huge { size } = pages {
            // The kernel expects log2 of the page size in the bits from MAP_HUGE_SHIFT (26) on.
            flags |= MapFlags::MAP_HUGETLB | MapFlags::from_bits_retain((size.trailing_zeros() << 26) as i32);
        }
        // The kernel takes huge pages only for whole ones of the mapping, so it has to begin with one.
        let huge = transparent_page_size();
        let padding = if pages == PageKind::Transparent && huge <= size.get() { huge } else { 0 };
        let padded = size.checked_add(padding).ok_or(Errno::ENOMEM)?;
        // SAFETY: the kernel chooses a free address, so the new mapping replaces nothing.
        let start = unsafe { mmap_anonymous(None, padded, protection, flags)? };
        let mut mapping = Self::of(start.cast(), padded);
        if padding > 0 {
            mapping.trim(size, huge)?;
        }
        if pages == PageKind::Transparent {
            mapping.advise(MmapAdvise::MADV_HUGEPAGE)?;
        }
        mapping.not_inherited()
    }

    /// Maps a part of a file, shared. `offset` is a multiple of the file's page size.
    pub(super) fn of_file(
        file: &OwnedFd,
        offset: i64,
        length: NonZeroUsize,
        writable: bool,
    ) -> Result<Self, Errno> {
        let mut protection = ProtFlags::PROT_READ;
        protection.set(ProtFlags::PROT_WRITE, writable);
        // SAFETY: the kernel chooses a free address, so the new mapping replaces nothing.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, offset)? };
        Self::of(start.cast(), length).not_inherited()
    }

    fn of(start: NonNull<u8>, length: NonZeroUsize) -> Self {
        Self { start, length, creator: Process::current() }
    }

    /// Cuts the mapping of `size + align` bytes down to `size` from the first multiple of `align` on.
    fn trim(&mut self, size: NonZeroUsize, align: usize) -> Result<(), Errno> {
        let head = self.start.as_ptr().align_offset(align);
        // SAFETY: `align` is what the mapping exceeds `size` by, so both parts lie in it. Nothing has used them yet.
        // The fields shrink with each part, so `drop` never unmaps what another thread maps there.
        unsafe {
            let end = self.start.add(head + size.get());
            if let Some(tail) = NonZeroUsize::new(self.length.get() - head - size.get()) {
                munmap(end.cast(), tail.get())?;
                self.length = size.saturating_add(head);
            }
            if head > 0 {
                munmap(self.start.cast(), head)?;
                (self.start, self.length) = (self.start.add(head), size);
            }
        }
        Ok(())
    }

    /// A child of `fork` gets no copy. Otherwise a write of the parent could give the parent a new page, while the
    /// device keeps the old one; and the kernel would copy all pinned pages for the child.
    fn not_inherited(self) -> Result<Self, Errno> {
        self.advise(MmapAdvise::MADV_DONTFORK)?;
        Ok(self)
    }

    fn advise(&self, advice: MmapAdvise) -> Result<(), Errno> {
        // SAFETY: the range belongs to this mapping, and no advice used here changes its contents.
        unsafe { madvise(self.start.cast(), self.length.get(), advice) }
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // In a child, other memory may have got this address.
        if !self.creator.is_current() {
            return;
        }
        // SAFETY: start and length are those of the mapping, and nothing borrows from it.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.length.get()) } {
            tracing::warn!(%error, "cannot unmap host memory");
        }
    }
}
