//! Host memory as an end of a transfer, beside dma-bufs.
//!
//! A [`HostBuffer`] is memory of this process: [allocated](HostBuffer::allocate), a [mapped
//! file](HostBuffer::map_file), or [memory of others](HostBuffer::from_raw). It registers through the same builder as
//! a dma-buf and gives the same [`MemoryRegion`](crate::MemoryRegion). The kernel pins its pages and charges them to
//! RLIMIT_MEMLOCK, which dma-bufs are not charged to.

mod buffer;
mod error;
mod mapping;

pub use buffer::HostBuffer;
pub use error::Error;

type Result<T, E = Error> = std::result::Result<T, E>;
