//! A pattern in a buffer and the digest of its bytes, through its CPU mapping.

use dmabuf_rdma::dmabuf::{CpuAccess, Mapping};
use xxhash_rust::xxh64::Xxh64;

use crate::Result;

const BLOCK: usize = 1 << 20;

/// Fills the first `length` bytes with a pattern in which all words of 8 bytes differ, and returns their digest.
pub fn fill(mapping: &Mapping, length: u64) -> Result<u64> {
    let (memory, mut digest) = (mapping.begin(CpuAccess::Write)?, Xxh64::new(0));
    let mut block = vec![0; BLOCK];
    for offset in (0..length).step_by(BLOCK) {
        let block = &mut block[..BLOCK.min((length - offset) as usize)];
        for (at, word) in block.chunks_mut(8).enumerate() {
            let value = (offset + 8 * at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
        memory.write(offset, block)?;
        digest.update(block);
    }
    memory.end()?;
    Ok(digest.digest())
}

/// The digest of the first `length` bytes.
pub fn digest(mapping: &Mapping, length: u64) -> Result<u64> {
    let (memory, mut digest) = (mapping.begin(CpuAccess::Read)?, Xxh64::new(0));
    let mut block = vec![0; BLOCK];
    for offset in (0..length).step_by(BLOCK) {
        let block = &mut block[..BLOCK.min((length - offset) as usize)];
        memory.read(offset, block)?;
        digest.update(block);
    }
    memory.end()?;
    Ok(digest.digest())
}
