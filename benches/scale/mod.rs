//! Registration at scale: sets, and the cost of a GiB.

pub mod cost;
pub mod sets;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::{Allocation, Udmabuf};
use dmabuf_rdma::mr::Access;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::common::Result;

pub const ACCESS: Access = Access::LOCAL_WRITE.union(Access::REMOTE_WRITE).union(Access::REMOTE_READ);

/// Times a registration. The caller drops the result, so that deregistration does not count.
pub fn timed<T, E>(register: impl FnOnce() -> std::result::Result<T, E>) -> Result<(Duration, T)>
where
    E: std::error::Error + 'static,
{
    let start = Instant::now();
    let registered = register()?;
    Ok((start.elapsed(), registered))
}

/// A memfd, and dma-bufs of its parts.
pub struct Memory(OwnedFd);

impl Memory {
    pub fn new(size: u64) -> Result<Self> {
        let memfd = memfd_create(c"bench", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&memfd, size as i64)?;
        Ok(Self(memfd))
    }

    /// A dma-buf of a range.
    pub fn part(&self, range: Range<u64>) -> Result<Allocation> {
        Ok(Udmabuf::open()?.from_memfds([(self.0.try_clone()?, range)])?)
    }

    /// dma-bufs of `length` bytes that follow each other, of `size` bytes together.
    pub fn parts(&self, size: u64, length: u64) -> Result<Vec<DmaBuf>> {
        (0..size / length).map(|at| Ok(self.part(at * length..(at + 1) * length)?.dmabuf)).collect()
    }
}
