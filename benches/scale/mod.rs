//! Registration at scale: sets, the cache, and what a GiB costs.

pub mod cache;
pub mod cost;
pub mod sets;

use std::time::{Duration, Instant};

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::udmabuf::Piece;
use dmabuf_rdma::exporter::{Allocation, Udmabuf};
use dmabuf_rdma::mr::Access;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::common::Result;

pub const ACCESS: Access = Access::LOCAL_WRITE.union(Access::REMOTE_WRITE).union(Access::REMOTE_READ);

/// How long something took, and what it made, for the caller to drop after the time was taken.
pub fn timed<T>(make: impl FnOnce() -> dmabuf_rdma::Result<T>) -> Result<(Duration, T)> {
    let start = Instant::now();
    let made = make()?;
    Ok((start.elapsed(), made))
}

/// Host memory, of which dma-bufs can be made.
pub struct Memory(std::os::fd::OwnedFd);

impl Memory {
    pub fn new(size: u64) -> Result<Self> {
        let memfd = memfd_create(c"bench", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&memfd, size as i64)?;
        Ok(Self(memfd))
    }

    /// A dma-buf of a part of it.
    pub fn part(&self, offset: u64, length: u64) -> Result<Allocation> {
        let piece = Piece { memfd: self.0.try_clone()?, offset, length };
        Ok(Udmabuf::open()?.from_pieces(vec![piece])?)
    }

    /// dma-bufs of all of it, one after the other.
    pub fn parts(&self, size: u64, length: u64) -> Result<Vec<DmaBuf>> {
        (0..size / length).map(|at| Ok(self.part(at * length, length)?.dmabuf)).collect()
    }
}
