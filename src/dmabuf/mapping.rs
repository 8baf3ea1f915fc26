//! CPU access to a dma-buf.
//!
//! `unsafe` is here because devices and other processes can write the mapped memory at any time. The code
//! never forms a reference to it. It copies bytes in and out with atomic operations, and only between SYNC
//! start and SYNC end.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use dma_sg::check_range;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rdma_sys_ext::dma_buf as sys;

use super::copy::{copy_in, copy_out};
use super::{DmaBuf, Error, Result};
use crate::observe::HeldFd;

/// The direction of a CPU access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuAccess {
    /// The CPU reads what devices wrote.
    Read,
    /// The CPU writes what devices will read.
    Write,
    /// The CPU reads and writes.
    ReadWrite,
}

impl CpuAccess {
    pub(super) fn sync_flags(self) -> u64 {
        match self {
            Self::Read => sys::SYNC_READ,
            Self::Write => sys::SYNC_WRITE,
            Self::ReadWrite => sys::SYNC_RW,
        }
    }

    fn writes(self) -> bool {
        self != Self::Read
    }

    fn reads(self) -> bool {
        self != Self::Write
    }
}

/// A dma-buf mapped into this process, made by [`DmaBuf::map`].
///
/// The mapping covers the whole buffer and holds a descriptor of its own for the SYNC calls, so the
/// `DmaBuf` may be dropped first. Bytes are copied in and out and never borrowed, because a NIC may write
/// them at any time.
#[derive(Debug)]
pub struct Mapping {
    fd: OwnedFd,
    _held: HeldFd,
    start: NonNull<u8>,
    length: NonZeroUsize,
    writable: bool,
}

// SAFETY: the mapping belongs to the process and not to the thread that made it. All access is by atomic
// operations, so threads that use it at the same time do not race.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method returns a reference into the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) fn new(buffer: &DmaBuf) -> Result<Self> {
        let refused = |errno: nix::Error| Error::Map {
            exporter: buffer.exporter_name().unwrap_or_default(),
            size: buffer.size,
            source: errno.into(),
        };
        let length = usize::try_from(buffer.size).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or_else(|| refused(nix::Error::EINVAL))?;
        let mut protection = ProtFlags::PROT_READ;
        protection.set(ProtFlags::PROT_WRITE, buffer.writable);
        let fd = buffer.duplicate()?;
        // SAFETY: the kernel chooses a free address, so the new mapping replaces nothing.
        let start =
            unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &fd, 0) }.map_err(refused)?;
        Ok(Self { fd, _held: HeldFd::new(), start: start.cast(), length, writable: buffer.writable })
    }

    /// Length in bytes: the buffer's size.
    #[allow(clippy::len_without_is_empty)] // a dma-buf of 0 bytes cannot be mapped
    pub fn len(&self) -> u64 {
        self.length.get() as u64
    }

    /// Whether it can be written: as the buffer's descriptor.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Address of the first byte, for other languages and libraries. It is valid while the mapping lives. Access the
    /// memory between [`begin`](Self::begin) and [`CpuGuard::end`] only, and by atomic or volatile operations; never form
    /// a reference to it.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Begins CPU access. The exporter makes the CPU's caches coherent; most exporters also wait for the
    /// buffer's fences.
    ///
    /// # Errors
    /// - [`Error::ReadOnly`]: write access to a buffer whose fd is read-only.
    /// - [`Error::Sync`]: the exporter refused.
    #[doc(alias = "DMA_BUF_IOCTL_SYNC")]
    pub fn begin(&self, access: CpuAccess) -> Result<CpuGuard<'_>> {
        if access.writes() && !self.writable {
            return Err(Error::ReadOnly { access: "CPU write access" });
        }
        sys::sync(self.fd.as_fd(), sys::SYNC_START | access.sync_flags()).map_err(|source| Error::Sync {
            edge: "start",
            access,
            source,
        })?;
        Ok(CpuGuard { mapping: self, access, open: true })
    }

    /// Copies bytes out in one CPU access: [`begin`](Self::begin), [`read`](CpuGuard::read),
    /// [`end`](CpuGuard::end).
    ///
    /// # Errors
    /// As [`begin`](Self::begin), [`CpuGuard::read`] and [`CpuGuard::end`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let guard = self.begin(CpuAccess::Read)?;
        guard.read(offset, into)?;
        guard.end()
    }

    /// Copies bytes in, in one CPU access: [`begin`](Self::begin), [`write`](CpuGuard::write),
    /// [`end`](CpuGuard::end).
    ///
    /// # Errors
    /// As [`begin`](Self::begin), [`CpuGuard::write`] and [`CpuGuard::end`].
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let guard = self.begin(CpuAccess::Write)?;
        guard.write(offset, from)?;
        guard.end()
    }

    #[inline]
    fn at(&self, offset: u64, length: usize) -> Result<NonNull<u8>> {
        check_range(offset, length as u64, self.len())?;
        // SAFETY: `check_range` found the range inside the mapping, whose length fits in usize.
        Ok(unsafe { self.start.add(offset as usize) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and length are those of the mapping made in `new`, and nothing borrows from it.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.length.get()) } {
            tracing::warn!(%error, "cannot unmap a dma-buf");
        }
    }
}

/// CPU access to a mapping, from SYNC start to SYNC end.
///
/// Dropping it ends the access and logs a failure; [`end`](Self::end) returns the failure instead.
#[derive(Debug)]
pub struct CpuGuard<'m> {
    mapping: &'m Mapping,
    access: CpuAccess,
    open: bool,
}

impl CpuGuard<'_> {
    /// Copies `into.len()` bytes out, from `offset` of the buffer.
    ///
    /// An aligned group of 8 bytes is read with one load, so the CPU never reads half of a 64-bit value that a
    /// peer writes at once. A read of a single aligned word (1, 2, 4 or 8 bytes) has acquire semantics: poll a
    /// number that the writer wrote last, then read the payload that it wrote before.
    ///
    /// # Errors
    /// - [`Error::CpuAccessDirection`]: the access was begun for writing only.
    /// - [`Error::Range`]: the range is empty or not inside the buffer.
    #[inline]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        if !self.access.reads() {
            return Err(Error::CpuAccessDirection { access: self.access });
        }
        let from = self.mapping.at(offset, into.len())?;
        // SAFETY: `at` checked the range. Only `copy_out` and `copy_in` access mappings, and devices.
        unsafe { copy_out(from.as_ptr(), into) };
        Ok(())
    }

    /// Copies `from` in, to `offset` of the buffer.
    ///
    /// An aligned group of 8 bytes is written with one store. A write of a single aligned word (1, 2, 4 or 8
    /// bytes) has release semantics: a thread or process that [`read`](Self::read)s the word sees all that was
    /// written before it.
    ///
    /// # Errors
    /// - [`Error::CpuAccessDirection`]: the access was begun for reading only.
    /// - [`Error::Range`]: the range is empty or not inside the buffer.
    #[inline]
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        if !self.access.writes() {
            return Err(Error::CpuAccessDirection { access: self.access });
        }
        let into = self.mapping.at(offset, from.len())?;
        // SAFETY: `at` checked the range, and `begin` found it mapped for writing; otherwise as in `read`.
        unsafe { copy_in(from, into.as_ptr()) };
        Ok(())
    }

    /// Ends the access. Afterwards devices see what the CPU wrote.
    ///
    /// # Errors
    /// [`Error::Sync`]: the exporter refused.
    pub fn end(mut self) -> Result<()> {
        self.close()
    }

    fn close(&mut self) -> Result<()> {
        let was_open = std::mem::replace(&mut self.open, false);
        if !was_open {
            return Ok(());
        }
        sys::sync(self.mapping.fd.as_fd(), sys::SYNC_END | self.access.sync_flags())
            .map_err(|source| Error::Sync { edge: "end", access: self.access, source })
    }
}

impl Drop for CpuGuard<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "cannot end CPU access to a dma-buf");
        }
    }
}
