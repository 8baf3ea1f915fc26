//! A pattern in a buffer and the digest of its bytes, through its CPU mapping, on all CPUs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use dmabuf_rdma::dmabuf::{self, CpuAccess, Mapping};
use xxhash_rust::xxh64::xxh64;

use crate::Result;

const BLOCK: u64 = 1 << 20;

/// Fills the first `length` bytes with a pattern, and returns the digest of these bytes.
pub fn fill(mapping: &Mapping, length: u64, seed: u64, progress: impl Fn(u64) + Sync) -> Result<u64> {
    let guard = mapping.begin(CpuAccess::Write)?;
    let filled = AtomicU64::new(0);
    let digests = each_block(length, |offset, block| {
        write(block, offset, seed);
        guard.write(offset, block)?;
        let length = block.len() as u64;
        progress(filled.fetch_add(length, Ordering::Relaxed) + length);
        Ok(of_block(block).to_le_bytes())
    })?;
    guard.end()?;
    Ok(of_block(digests.as_flattened()))
}

/// The digest of the first `length` bytes: the digest of the digests of their blocks.
pub fn digest(mapping: &Mapping, length: u64) -> Result<u64> {
    let guard = mapping.begin(CpuAccess::Read)?;
    let digests = each_block(length, |offset, block| {
        guard.read(offset, block)?;
        Ok(of_block(block).to_le_bytes())
    })?;
    guard.end()?;
    Ok(of_block(digests.as_flattened()))
}

/// Writes the pattern of the bytes from `offset` on, a multiple of 8. All words of 8 bytes differ, so that a
/// misplaced byte changes the digest.
pub fn write(bytes: &mut [u8], offset: u64, seed: u64) {
    for (at, word) in bytes.chunks_mut(8).enumerate() {
        let value = scramble(seed ^ (offset + 8 * at as u64)).to_le_bytes();
        word.copy_from_slice(&value[..word.len()]);
    }
}

/// The digest of one block.
pub fn of_block(bytes: &[u8]) -> u64 {
    xxh64(bytes, 0)
}

/// Calls `work` with the offset and the bytes of each block, and returns its results in order. Each CPU gets
/// an equal share of the blocks.
fn each_block<T: Send>(
    size: u64,
    work: impl Fn(u64, &mut [u8]) -> Result<T, dmabuf::Error> + Sync,
) -> Result<Vec<T>> {
    let processors = thread::available_parallelism()?.get() as u64;
    let share = size.div_ceil(processors).next_multiple_of(BLOCK);
    let one_share = |start: u64| {
        let end = size.min(start + share);
        let mut block = vec![0; BLOCK as usize];
        let offsets = (start..end).step_by(BLOCK as usize);
        offsets.map(|offset| work(offset, &mut block[..BLOCK.min(end - offset) as usize])).collect()
    };
    thread::scope(|scope| {
        let starts = (0..size).step_by(share as usize);
        let threads: Vec<_> = starts.map(|start| scope.spawn(move || one_share(start))).collect();
        let mut all = Vec::new();
        for thread in threads {
            let results: Result<Vec<T>, dmabuf::Error> = thread.join().expect("`work` does not panic");
            all.extend(results?);
        }
        Ok(all)
    })
}

/// A bijection on 64 bits that maps neighbours far apart.
fn scramble(value: u64) -> u64 {
    let value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93)
}
