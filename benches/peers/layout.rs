//! The blocks of a load: their memory on both sides, their tables, and what must have arrived.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::exporter::{Allocation, Exporter, Udmabuf};

use super::KIB;
use super::common::Result;

/// Blocks of one size.
#[derive(Clone, Copy)]
pub struct Load {
    pub count: u64,
    pub size: u64,
    pub rounds: usize,
}

impl Load {
    pub fn name(self) -> String {
        format!("{} x {} KiB", self.count, self.size / KIB)
    }
}

/// The memory of one side and its table. The peers map the memfd; the library and the loop by hand make a dma-buf of
/// it, so all of them use the same pages.
pub struct End {
    allocation: Allocation,
    offsets: Vec<u64>,
    table: PathBuf,
}

impl End {
    fn new(load: Load, folder: &Path, name: &str, seed: u64) -> Result<Self> {
        let allocation = Udmabuf::open()?.allocate(load.count * load.size)?;
        let offsets: Vec<u64> = scattered(load.count, seed).iter().map(|slot| slot * load.size).collect();
        let table = folder.join(name);
        fs::write(&table, offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(Self { allocation, offsets, table })
    }

    /// A path that other processes open the memory by.
    pub fn memory(&self) -> Result<String> {
        let memfd = self.allocation.backing.as_ref().and_then(|backing| backing.memfds().next());
        let memfd = memfd.ok_or("the dma-buf has no memfd")?.as_raw_fd();
        Ok(format!("/proc/{}/fd/{memfd}", std::process::id()))
    }

    /// A file with the offset of each block, as u64 in little-endian order.
    pub fn table(&self) -> &Path {
        &self.table
    }
}

/// Both sides of a load.
pub struct Layout {
    pub near: End,
    pub far: End,
    pub load: Load,
}

impl Layout {
    pub fn new(load: Load, folder: &Path) -> Result<Self> {
        let near = End::new(load, folder, "near", 1)?;
        let far = End::new(load, folder, "far", 2)?;
        let mapping = near.allocation.dmabuf.map()?;
        let memory = mapping.begin(CpuAccess::Write)?;
        // Every word of the memory differs.
        let mut bytes = vec![0; load.size as usize];
        for slot in 0..load.count {
            for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
                let number = slot * load.size / 8 + at as u64 + 1;
                word.copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            }
            memory.write(slot * load.size, &bytes)?;
        }
        memory.end()?;
        drop(mapping);
        Ok(Self { near, far, load })
    }

    /// Clears what has arrived.
    pub fn clear(&self) -> Result<()> {
        let mapping = self.far.allocation.dmabuf.map()?;
        let memory = mapping.begin(CpuAccess::Write)?;
        let zeros = vec![0; self.load.size as usize];
        for slot in 0..self.load.count {
            memory.write(slot * self.load.size, &zeros)?;
        }
        Ok(memory.end()?)
    }

    /// Compares each block with the one that it was written from.
    pub fn verify(&self) -> Result<()> {
        let (near, far) = (self.near.allocation.dmabuf.map()?, self.far.allocation.dmabuf.map()?);
        let (from, to) = (near.begin(CpuAccess::Read)?, far.begin(CpuAccess::Read)?);
        let (mut sent, mut arrived) = (vec![0; self.load.size as usize], vec![0; self.load.size as usize]);
        for (block, (near, far)) in self.near.offsets.iter().zip(&self.far.offsets).enumerate() {
            from.read(*near, &mut sent)?;
            to.read(*far, &mut arrived)?;
            if sent != arrived {
                return Err(format!("block {block} arrived with wrong bytes").into());
            }
        }
        Ok(())
    }
}

/// The numbers below `count` at random, none followed by its successor, so that no two blocks merge.
fn scattered(count: u64, seed: u64) -> Vec<u64> {
    let mut state = seed;
    let mut below = |limit: usize| {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ (word >> 31)) % limit as u64) as usize
    };
    let mut slots: Vec<u64> = (0..count).collect();
    for at in (1..slots.len()).rev() {
        slots.swap(at, below(at + 1));
    }
    while let Some(at) = slots.windows(2).position(|pair| pair[1] == pair[0] + 1) {
        let other = below(slots.len());
        slots.swap(at, other);
    }
    slots
}
