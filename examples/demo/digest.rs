//! Patterns and digests of a buffer, through its CPU mapping.

use dmabuf_rdma::dmabuf::{CpuAccess, Mapping};
use xxhash_rust::xxh3::Xxh3;

use crate::Result;

const BLOCK: usize = 1 << 20;

/// Fills a buffer with a pattern in which no two words of 8 bytes are alike, so that bytes that land
/// in a wrong place show.
pub fn fill(mapping: &Mapping, seed: u64, mut progress: impl FnMut(u64)) -> Result<()> {
    let guard = mapping.begin(CpuAccess::Write)?;
    let mut block = vec![0; BLOCK];
    for offset in (0..mapping.len()).step_by(BLOCK) {
        let length = (mapping.len() - offset).min(BLOCK as u64) as usize;
        for (at, word) in block[..length].chunks_mut(8).enumerate() {
            let bytes = scramble(seed ^ (offset + 8 * at as u64)).to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
        guard.write(offset, &block[..length])?;
        progress(offset + length as u64);
    }
    Ok(guard.end()?)
}

/// Digest of all of a buffer.
pub fn digest(mapping: &Mapping) -> Result<u128> {
    let guard = mapping.begin(CpuAccess::Read)?;
    let mut block = vec![0; BLOCK];
    let mut hash = Xxh3::new();
    for offset in (0..mapping.len()).step_by(BLOCK) {
        let length = (mapping.len() - offset).min(BLOCK as u64) as usize;
        guard.read(offset, &mut block[..length])?;
        hash.update(&block[..length]);
    }
    guard.end()?;
    Ok(hash.digest128())
}

/// A bijection of 64 bits that spreads neighbours (multiply, shift, multiply).
fn scramble(value: u64) -> u64 {
    let value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93)
}
