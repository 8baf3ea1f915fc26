//! Patterns and digests of a buffer, through its CPU mapping, on all processors.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use dmabuf_rdma::dmabuf::{CpuAccess, Mapping};
use xxhash_rust::xxh64::xxh64;

use crate::Result;

const BLOCK: u64 = 1 << 20;

/// Fills a buffer with a pattern in which no two words of 8 bytes are alike, so that bytes that land
/// in a wrong place show. Returns the digest that whoever looks at the buffer must find.
pub fn fill(mapping: &Mapping, seed: u64, progress: impl Fn(u64) + Sync) -> Result<u64> {
    let guard = mapping.begin(CpuAccess::Write)?;
    let filled = AtomicU64::new(0);
    let digests = each_block(mapping.len(), |offset, block| {
        for (at, word) in block.chunks_mut(8).enumerate() {
            let bytes = scramble(seed ^ (offset + 8 * at as u64)).to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
        guard.write(offset, block)?;
        let length = block.len() as u64;
        progress(filled.fetch_add(length, Ordering::Relaxed) + length);
        Ok(of_block(block))
    })?;
    guard.end()?;
    Ok(u64::from_le_bytes(of_block(digests.as_flattened())))
}

/// Digest of the first `length` bytes: that of their blocks' digests.
pub fn digest(mapping: &Mapping, length: u64) -> Result<u64> {
    let guard = mapping.begin(CpuAccess::Read)?;
    let digests = each_block(length, |offset, block| {
        guard.read(offset, block)?;
        Ok(of_block(block))
    })?;
    guard.end()?;
    Ok(u64::from_le_bytes(of_block(digests.as_flattened())))
}

fn of_block(bytes: &[u8]) -> [u8; 8] {
    xxh64(bytes, 0).to_le_bytes()
}

/// What `work` makes of each block and its offset, in order; each processor has its share of the blocks.
fn each_block<T: Send>(
    size: u64,
    work: impl Fn(u64, &mut [u8]) -> dmabuf_rdma::Result<T> + Sync,
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
            let made: dmabuf_rdma::Result<Vec<T>> = thread.join().expect("no block's work panics");
            all.extend(made?);
        }
        Ok(all)
    })
}

/// A bijection of 64 bits that spreads neighbours (multiply, shift, multiply).
fn scramble(value: u64) -> u64 {
    let value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93)
}
