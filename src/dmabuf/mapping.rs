//! A dma-buf as the CPU sees it.
//!
//! `unsafe` is here because the memory behind a mapping belongs to others too: devices and other
//! processes write it at any time. So no reference to it is ever formed; bytes are copied in and out
//! with volatile access, and only between the kernel's SYNC start and end.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rdma_sys_ext::dma_buf as sys;

use super::DmaBuf;
use crate::observe::HeldFd;
use crate::umem::check_range;
use crate::{Error, Result};

/// What the CPU wants of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuAccess {
    /// Look at what devices wrote.
    Read,
    /// Write what devices will read.
    Write,
    /// Both.
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

/// The whole of a dma-buf in this process's address space, made by [`DmaBuf::map`].
///
/// It holds a descriptor of its own for the SYNC calls, so the `DmaBuf` may be dropped before it. The
/// memory is copied in and out, never borrowed: what a NIC may write any time is no `&[u8]`.
#[derive(Debug)]
pub struct Mapping {
    fd: OwnedFd,
    _held: HeldFd,
    start: NonNull<u8>,
    length: NonZeroUsize,
    writable: bool,
}

// SAFETY: the mapping is plain memory of the process, not tied to the thread that made it, and all
// access to it is by volatile copies that assume that others write it at the same time.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a reference into the memory.
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
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing that exists.
        let start =
            unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &fd, 0) }.map_err(refused)?;
        Ok(Self { fd, _held: HeldFd::new(), start: start.cast(), length, writable: buffer.writable })
    }

    /// Length in bytes: the buffer's size.
    #[allow(clippy::len_without_is_empty)] // a dma-buf of 0 bytes cannot be mapped
    pub fn len(&self) -> u64 {
        self.length.get() as u64
    }

    /// Opens a bracket of CPU access: caches are made right and, for most exporters, fences waited for.
    ///
    /// # Errors
    /// - [`Error::ReadOnlyBuffer`]: write access to a buffer whose fd is read-only.
    /// - [`Error::Sync`]: the exporter refused.
    #[doc(alias = "DMA_BUF_IOCTL_SYNC")]
    pub fn begin(&self, access: CpuAccess) -> Result<CpuGuard<'_>> {
        if access.writes() && !self.writable {
            return Err(Error::ReadOnlyBuffer { access: "CPU write access".into() });
        }
        sys::sync(self.fd.as_fd(), sys::SYNC_START | access.sync_flags()).map_err(|source| Error::Sync {
            edge: "start",
            access,
            source,
        })?;
        Ok(CpuGuard { mapping: self, access, open: true })
    }

    /// Copies bytes out in a bracket of their own: [`begin`](Self::begin), read, [`end`](CpuGuard::end).
    ///
    /// # Errors
    /// As of [`begin`](Self::begin), [`CpuGuard::read`] and [`CpuGuard::end`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let guard = self.begin(CpuAccess::Read)?;
        guard.read(offset, into)?;
        guard.end()
    }

    /// Copies bytes in, in a bracket of their own.
    ///
    /// # Errors
    /// As of [`begin`](Self::begin), [`CpuGuard::write`] and [`CpuGuard::end`].
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let guard = self.begin(CpuAccess::Write)?;
        guard.write(offset, from)?;
        guard.end()
    }

    #[inline]
    fn at(&self, offset: u64, length: usize) -> Result<NonNull<u8>> {
        check_range(offset, length as u64, self.len())?;
        // SAFETY: the range was just checked to lie inside the mapping, whose length fits in usize.
        Ok(unsafe { self.start.add(offset as usize) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and length are those of the mapping made in `new`; nothing borrows from it.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.length.get()) } {
            tracing::warn!(%error, "cannot unmap a dma-buf");
        }
    }
}

/// A bracket of CPU access, between SYNC start and SYNC end.
///
/// Dropping it ends the bracket and logs a failure; [`end`](Self::end) reports one.
#[derive(Debug)]
pub struct CpuGuard<'m> {
    mapping: &'m Mapping,
    access: CpuAccess,
    open: bool,
}

impl CpuGuard<'_> {
    /// Copies `into.len()` bytes out, from `offset` of the buffer. Eight bytes at a multiple of 8 are read
    /// at once, so a number that a peer writes as one is never seen in halves.
    ///
    /// # Errors
    /// - [`Error::CpuAccessDirection`]: the bracket was begun for writing only.
    /// - [`Error::OutOfRange`], [`Error::ZeroLength`]: the range is not inside the buffer, or empty.
    #[inline]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        if !self.access.reads() {
            return Err(Error::CpuAccessDirection { access: self.access });
        }
        let from = self.mapping.at(offset, into.len())?;
        // SAFETY: `at` checked the source; the target is an exclusive borrow of the caller's and
        // cannot lie in the mapping, of which no reference is ever made.
        unsafe { copy_out(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies `from` in, to `offset` of the buffer; eight bytes at a multiple of 8 at once.
    ///
    /// # Errors
    /// - [`Error::CpuAccessDirection`]: the bracket was begun for reading only.
    /// - [`Error::OutOfRange`], [`Error::ZeroLength`]: the range is not inside the buffer, or empty.
    #[inline]
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        if !self.access.writes() {
            return Err(Error::CpuAccessDirection { access: self.access });
        }
        let into = self.mapping.at(offset, from.len())?;
        // SAFETY: `at` checked the target, which `begin` found mapped for writing; the source is a
        // borrow of the caller's and cannot lie in the mapping.
        unsafe { copy_in(from.as_ptr(), into.as_ptr(), from.len()) };
        Ok(())
    }

    /// Ends the bracket: from here on devices see what the CPU wrote.
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

/// Copies out of a mapping, with volatile access to it: eight bytes at a time where those are aligned in
/// the mapping.
///
/// # Safety
/// Both ranges are valid for `length` bytes and do not overlap. Others may write the mapping meanwhile: then
/// the bytes copied are any mix of before and after.
#[inline]
unsafe fn copy_out(mapping: *const u8, into: *mut u8, length: usize) {
    if is_word(mapping, length) {
        // SAFETY: both have eight bytes, and those of the mapping are aligned.
        return unsafe { into.cast::<u64>().write_unaligned(mapping.cast::<u64>().read_volatile()) };
    }
    // By `for_each`, which goes through one chained iterator after the other.
    parts(mapping.align_offset(WORD), length).for_each(|part| {
        // SAFETY: the parts lie in `length`; words are aligned in the mapping.
        unsafe {
            match part {
                Part::Byte(at) => into.add(at).write(mapping.add(at).read_volatile()),
                Part::Word(at) => {
                    let word = mapping.add(at).cast::<u64>().read_volatile();
                    into.add(at).cast::<u64>().write_unaligned(word);
                }
            }
        }
    });
}

/// The same into a mapping.
///
/// # Safety
/// As [`copy_out`].
#[inline]
unsafe fn copy_in(from: *const u8, mapping: *mut u8, length: usize) {
    if is_word(mapping, length) {
        // SAFETY: as in `copy_out`.
        return unsafe { mapping.cast::<u64>().write_volatile(from.cast::<u64>().read_unaligned()) };
    }
    parts(mapping.align_offset(WORD), length).for_each(|part| {
        // SAFETY: as in `copy_out`.
        unsafe {
            match part {
                Part::Byte(at) => mapping.add(at).write_volatile(from.add(at).read()),
                Part::Word(at) => {
                    let word = from.add(at).cast::<u64>().read_unaligned();
                    mapping.add(at).cast::<u64>().write_volatile(word);
                }
            }
        }
    });
}

const WORD: usize = size_of::<u64>();

/// Whether it is one aligned word: what is watched for a peer's or a device's sign.
#[inline]
fn is_word(mapping: *const u8, length: usize) -> bool {
    length == WORD && mapping.addr().is_multiple_of(WORD)
}

/// What is copied at once, and at which offset.
enum Part {
    Byte(usize),
    Word(usize),
}

/// Bytes up to `aligned`, words from there on, and the bytes that are left.
#[inline]
fn parts(aligned: usize, length: usize) -> impl Iterator<Item = Part> {
    let head = aligned.min(length);
    let tail = length - (length - head) % WORD;
    let words = (head..tail).step_by(WORD).map(Part::Word);
    (0..head).map(Part::Byte).chain(words).chain((tail..length).map(Part::Byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_exact_at_every_alignment_and_length() {
        let source: Vec<u8> = (0..96u8).collect();
        for from in 0..9 {
            for into in 0..9 {
                for length in 0..80 {
                    for copy in [copy_out, copy_in] {
                        let mut target = [0xaa_u8; 96];
                        // SAFETY: from + length and into + length stay below 96, the size of both.
                        unsafe { copy(source.as_ptr().add(from), target.as_mut_ptr().add(into), length) };
                        assert_eq!(target[into..into + length], source[from..from + length]);
                        assert!(target[..into].iter().chain(&target[into + length..]).all(|b| *b == 0xaa));
                    }
                }
            }
        }
    }
}
