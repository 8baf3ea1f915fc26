//! Tables of blocks.
//!
//! `unsafe` is here for what C passes; see the crate.

use dmabuf_rdma::mr::Blocks;
use dmabuf_rdma::{RegionSlice, RemoteSlice};

use crate::arguments::{array, store};
use crate::handle::{self, get};
use crate::region::drdma_region;
use crate::remote::drdma_remote;
use crate::status::{Failed, Result, call, drdma_status, query};

/// A table of blocks, in local memory or in a peer's. A transfer of two tables moves block `i` of one to block `i` of the
/// other.
#[allow(non_camel_case_types)]
pub struct drdma_blocks(());

pub enum Table {
    Local(Blocks<RegionSlice>),
    Remote(Blocks<RemoteSlice>),
}

impl Table {
    pub fn local(&self) -> Result<&Blocks<RegionSlice>> {
        match self {
            Self::Local(blocks) => Ok(blocks),
            Self::Remote(_) => {
                Err(Failed::misuse("the first table must be in a region, and is in a peer's memory"))
            }
        }
    }

    pub fn remote(&self) -> Result<&Blocks<RemoteSlice>> {
        match self {
            Self::Remote(blocks) => Ok(blocks),
            Self::Local(_) => {
                Err(Failed::misuse("the second table must be in a peer's memory, and is in a region"))
            }
        }
    }
}

/// A table of `count` blocks of `length` bytes, each `stride` bytes after the one before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_region_strided(
    region: *mut drdma_region,
    length: u64,
    stride: u64,
    count: usize,
    blocks: *mut *mut drdma_blocks,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let region = get(region)?;
            store(blocks, || Ok(Table::Local(region.strided(length, stride, count)?)))
        }
    })
}

/// As drdma_region_strided(), in a peer's memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_remote_strided(
    remote: *mut drdma_remote,
    length: u64,
    stride: u64,
    count: usize,
    blocks: *mut *mut drdma_blocks,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let remote = get(remote)?;
            store(blocks, || Ok(Table::Remote(remote.strided(length, stride, count)?)))
        }
    })
}

/// A table of `count` blocks of `length` bytes at these offsets in bytes, which are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_region_blocks(
    region: *mut drdma_region,
    length: u64,
    offsets: *const u64,
    count: usize,
    blocks: *mut *mut drdma_blocks,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles, arrays and places.
        unsafe {
            let (region, offsets) = (get(region)?, array(offsets, count, "offsets")?);
            store(blocks, || Ok(Table::Local(region.blocks(length, offsets.iter().copied())?)))
        }
    })
}

/// As drdma_region_blocks(), in a peer's memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_remote_blocks(
    remote: *mut drdma_remote,
    length: u64,
    offsets: *const u64,
    count: usize,
    blocks: *mut *mut drdma_blocks,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles, arrays and places.
        unsafe {
            let (remote, offsets) = (get(remote)?, array(offsets, count, "offsets")?);
            store(blocks, || Ok(Table::Remote(remote.blocks(length, offsets.iter().copied())?)))
        }
    })
}

/// The blocks of a table with these indices, in this order, as a table. An index may repeat.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_blocks_select(
    blocks: *mut drdma_blocks,
    indices: *const u64,
    count: usize,
    selected: *mut *mut drdma_blocks,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles, arrays and places.
        unsafe {
            let (blocks, indices) = (get(blocks)?, array(indices, count, "indices")?);
            let indices = indices.iter().map(|&index| usize::try_from(index).unwrap_or(usize::MAX));
            store(selected, || {
                Ok(match blocks {
                    Table::Local(blocks) => Table::Local(blocks.select(indices)?),
                    Table::Remote(blocks) => Table::Remote(blocks.select(indices)?),
                })
            })
        }
    })
}

/// Number of blocks of a table; 0 if the handle is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_blocks_count(blocks: *mut drdma_blocks) -> usize {
    query(0, || {
        // SAFETY: the header's rules for handles.
        Ok(match unsafe { get(blocks) }? {
            Table::Local(blocks) => blocks.count(),
            Table::Remote(blocks) => blocks.count(),
        })
    })
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_blocks_ref(blocks: *mut drdma_blocks) -> drdma_status {
    call(|| handle::reference(blocks))
}

/// Releases a reference; NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_blocks_unref(blocks: *mut drdma_blocks) -> drdma_status {
    call(|| handle::release(blocks))
}
