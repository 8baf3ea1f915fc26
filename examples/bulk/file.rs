//! Copies between files and a dma-buf, through its CPU mapping.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use dmabuf_rdma::dmabuf::{CpuAccess, Mapping};

use crate::Result;

const BLOCK: usize = 1 << 20;

pub fn load(path: &Path, mapping: &Mapping, length: u64) -> Result<()> {
    let mut file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let memory = mapping.begin(CpuAccess::Write)?;
    let mut block = vec![0; BLOCK];
    for offset in (0..length).step_by(BLOCK) {
        let block = &mut block[..BLOCK.min((length - offset) as usize)];
        file.read_exact(block)?;
        memory.write(offset, block)?;
    }
    Ok(memory.end()?)
}

pub fn save(mapping: &Mapping, length: u64, path: &Path) -> Result<()> {
    let mut file = File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let memory = mapping.begin(CpuAccess::Read)?;
    let mut block = vec![0; BLOCK];
    for offset in (0..length).step_by(BLOCK) {
        let block = &mut block[..BLOCK.min((length - offset) as usize)];
        memory.read(offset, block)?;
        file.write_all(block)?;
    }
    Ok(memory.end()?)
}
