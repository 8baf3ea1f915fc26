//! Copies between Rust memory and memory that devices, other processes or other threads write at the same time.
//!
//! `unsafe` is here for raw pointers: no reference to such memory may exist, so each access is one atomic operation
//! through a pointer.
//!
//! Two threads that copy overlapping ranges at once may access a byte with operations of different sizes.
//! Rust's memory model does not define what such a race reads; processors read old or new bytes.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, fence};

/// Copies out of memory that others may write at the same time; the copy may then mix old and new bytes.
///
/// A single aligned word is loaded with acquire. In any other copy each load is relaxed. The memory may be mapped
/// read-only, of which Rust defines relaxed loads alone; so the acquire is a fence.
///
/// # Safety
/// The memory is valid for `into.len()` bytes. Others access it only by atomic operations or by DMA.
#[inline]
pub(crate) unsafe fn copy_out(mapping: *mut u8, into: &mut [u8]) {
    // SAFETY: the range is the caller's promise, and each address is aligned for the atomic type used at it.
    unsafe {
        match into.len() {
            8 if mapping.cast::<u64>().is_aligned() => {
                into.copy_from_slice(&AtomicU64::from_ptr(mapping.cast()).load(Relaxed).to_ne_bytes());
                fence(Acquire);
            }
            4 if mapping.cast::<u32>().is_aligned() => {
                into.copy_from_slice(&AtomicU32::from_ptr(mapping.cast()).load(Relaxed).to_ne_bytes());
                fence(Acquire);
            }
            2 if mapping.cast::<u16>().is_aligned() => {
                into.copy_from_slice(&AtomicU16::from_ptr(mapping.cast()).load(Relaxed).to_ne_bytes());
                fence(Acquire);
            }
            1 => {
                into[0] = AtomicU8::from_ptr(mapping).load(Relaxed);
                fence(Acquire);
            }
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

/// Copies into such memory: the mirror of [`copy_out`], with release for a single aligned word.
///
/// # Safety
/// As for [`copy_out`]; the memory is writable.
#[inline]
pub(crate) unsafe fn copy_in(from: &[u8], mapping: *mut u8) {
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
