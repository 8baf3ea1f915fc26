//! CPU access to a dma-buf.
//!
//! `unsafe` is here because devices and other processes can write the mapped memory at any time. The code
//! never forms a reference to it. It copies bytes in and out with atomic operations, and only between SYNC
//! start and SYNC end.
//!
//! Two threads that copy overlapping ranges at once may access a byte with operations of different sizes.
//! Rust's memory model does not define what such a race reads; processors read old or new bytes.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use dma_sg::check_range;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rdma_sys_ext::dma_buf as sys;

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

/// Copies out of a mapping that others may write at the same time; the copy may then mix old and new bytes.
///
/// A single aligned word is loaded with acquire. In any other copy each load is relaxed.
///
/// # Safety
/// The mapping is valid for `into.len()` bytes. Others access it only by atomic operations or by DMA.
#[inline]
unsafe fn copy_out(mapping: *mut u8, into: &mut [u8]) {
    // SAFETY: the range is the caller's promise, and each address is aligned for the atomic type used at it.
    unsafe {
        match into.len() {
            8 if mapping.cast::<u64>().is_aligned() => {
                into.copy_from_slice(&AtomicU64::from_ptr(mapping.cast()).load(Acquire).to_ne_bytes());
            }
            4 if mapping.cast::<u32>().is_aligned() => {
                into.copy_from_slice(&AtomicU32::from_ptr(mapping.cast()).load(Acquire).to_ne_bytes());
            }
            2 if mapping.cast::<u16>().is_aligned() => {
                into.copy_from_slice(&AtomicU16::from_ptr(mapping.cast()).load(Acquire).to_ne_bytes());
            }
            1 => into[0] = AtomicU8::from_ptr(mapping).load(Acquire),
            length => {
                let (head, rest) = into.split_at_mut(mapping.align_offset(WORD).min(length));
                let (words, tail) = rest.as_chunks_mut::<WORD>();
                let mut at = mapping;
                for byte in head {
                    *byte = AtomicU8::from_ptr(at).load(Relaxed);
                    at = at.add(1);
                }
                for word in words {
                    *word = AtomicU64::from_ptr(at.cast()).load(Relaxed).to_ne_bytes();
                    at = at.add(WORD);
                }
                for byte in tail {
                    *byte = AtomicU8::from_ptr(at).load(Relaxed);
                    at = at.add(1);
                }
            }
        }
    }
}

/// Copies into a mapping: the mirror of [`copy_out`], with release for a single aligned word.
///
/// # Safety
/// As for [`copy_out`]; the mapping is writable.
#[inline]
unsafe fn copy_in(from: &[u8], mapping: *mut u8) {
    // SAFETY: as in `copy_out`.
    unsafe {
        if let Ok(word) = from.try_into()
            && mapping.cast::<u64>().is_aligned()
        {
            AtomicU64::from_ptr(mapping.cast()).store(u64::from_ne_bytes(word), Release);
        } else if let Ok(word) = from.try_into()
            && mapping.cast::<u32>().is_aligned()
        {
            AtomicU32::from_ptr(mapping.cast()).store(u32::from_ne_bytes(word), Release);
        } else if let Ok(word) = from.try_into()
            && mapping.cast::<u16>().is_aligned()
        {
            AtomicU16::from_ptr(mapping.cast()).store(u16::from_ne_bytes(word), Release);
        } else if let [byte] = *from {
            AtomicU8::from_ptr(mapping).store(byte, Release);
        } else {
            let (head, rest) = from.split_at(mapping.align_offset(WORD).min(from.len()));
            let (words, tail) = rest.as_chunks::<WORD>();
            let mut at = mapping;
            for byte in head {
                AtomicU8::from_ptr(at).store(*byte, Relaxed);
                at = at.add(1);
            }
            for word in words {
                AtomicU64::from_ptr(at.cast()).store(u64::from_ne_bytes(*word), Relaxed);
                at = at.add(WORD);
            }
            for byte in tail {
                AtomicU8::from_ptr(at).store(*byte, Relaxed);
                at = at.add(1);
            }
        }
    }
}

const WORD: usize = size_of::<u64>();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_exact_at_every_alignment_and_length() {
        let source: Vec<u8> = (0..96u8).collect();
        for from in 0..9 {
            for into in 0..9 {
                for length in 0..80 {
                    let expected = &source[from..from + length];
                    for out in [true, false] {
                        let (mut source, mut target) = (source.clone(), [0xaa_u8; 96]);
                        // SAFETY: from + length and into + length stay below 96, the size of both.
                        unsafe {
                            if out {
                                copy_out(source.as_mut_ptr().add(from), &mut target[into..into + length]);
                            } else {
                                copy_in(expected, target.as_mut_ptr().add(into));
                            }
                        }
                        assert_eq!(target[into..into + length], *expected);
                        assert!(target[..into].iter().chain(&target[into + length..]).all(|b| *b == 0xaa));
                    }
                }
            }
        }
    }

    /// One thread writes a payload and then its number; the other polls for the number and reads the payload.
    /// ThreadSanitizer finds a race here unless all four copies are atomic.
    #[test]
    fn a_payload_is_there_when_its_number_is() {
        const ROUNDS: u64 = 100;
        /// Memory that both threads use, as two mappings of one buffer are.
        struct Shared(*mut u8);
        // SAFETY: it stands for a mapping, which all threads access by `copy_in` and `copy_out` only.
        unsafe impl Sync for Shared {}
        fn bytes(round: u64) -> [u8; 61] {
            std::array::from_fn(|at| (round as u8).wrapping_mul(31).wrapping_add(at as u8))
        }
        fn number<const N: usize>(round: u64) -> [u8; N] {
            round.to_le_bytes()[..N].try_into().unwrap()
        }
        fn exchange<const N: usize>() {
            let mut memory = [0_u64; 16];
            let shared = &Shared(memory.as_mut_ptr().cast());
            let reached = |offset, round| {
                let mut seen = [0; N];
                while seen != number::<N>(round) {
                    // SAFETY: the words at 0 and 8 lie in the 128 bytes.
                    unsafe { copy_out(shared.0.add(offset), &mut seen) };
                    std::thread::yield_now();
                }
            };
            // SAFETY: all offsets and lengths lie in the 128 bytes.
            std::thread::scope(|scope| unsafe {
                let writer = scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        copy_in(&bytes(round), shared.0.add(17));
                        copy_in(&number::<N>(round), shared.0);
                        reached(8, round);
                    }
                });
                for round in 1..=ROUNDS {
                    reached(0, round);
                    let mut seen = [0; 61];
                    copy_out(shared.0.add(17), &mut seen);
                    assert_eq!(seen, bytes(round));
                    copy_in(&number::<N>(round), shared.0.add(8));
                }
                // The sanitizer does not see the end of the scope.
                writer.join().unwrap();
            });
        }
        exchange::<8>();
        exchange::<4>();
        exchange::<2>();
        exchange::<1>();
    }
}
