//! From a dma-buf fd to verified bytes on the wire.
//!
//! A buffer that a GPU driver, a heap or a camera allocated is known to the kernel as a dma-buf fd.
//! This crate takes such an fd, describes it, registers it with an RDMA device so that a NIC reads and
//! writes it in place, and moves bytes; every refusal on the way is an error that says what refused
//! and what to do.
//!
//! ```text
//!  exporter ──fd──▶ DmaBuf ──range──▶ Umem ──pd,access──▶ MemoryRegion ──lkey/rkey──▶ the wire
//!  (GPU, heap,      identity,         iova + DmaSg list    Verbs | Uverbs |           READ, WRITE,
//!   udmabuf, DRM)   size, sync                             HostMapping                SEND, atomics
//! ```
//!
//! # Quick start
//!
//! 1. Take a dma-buf: [`DmaBuf::from_fd`] for an fd that you have, an [`exporter`] for a new one.
//! 2. Open a device: [`verbs::Device::by_name`], and a [`verbs::ProtectionDomain`] in it.
//!    [`mr::probe`] says beforehand whether the device imports dma-bufs.
//! 3. Register: [`MemoryRegion::builder`].
//! 4. Give the peer the region's [`remote`](MemoryRegion::remote) description, connect a
//!    [`verbs::QueuePair`], and [`post`](verbs::QueuePair::post).
//!
//! ```no_run
//! use dmabuf_rdma::exporter::{DmaHeap, Exporter};
//! use dmabuf_rdma::mr::{Access, MemoryRegion};
//! use dmabuf_rdma::verbs::{Device, ProtectionDomain};
//!
//! # fn main() -> dmabuf_rdma::Result<()> {
//! let buffer = DmaHeap::open("system")?.allocate(1 << 30)?.dmabuf;
//! let domain = ProtectionDomain::new(&Device::by_name("rxe0")?.open()?)?;
//! let region = MemoryRegion::builder(&domain, &buffer)
//!     .access(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ)
//!     .register()?;
//! println!("{} bytes by {}, rkey {:?}", region.len(), region.path(), region.rkey());
//! # Ok(())
//! # }
//! ```
//!
//! The example program `demo` is the whole path with both sides; `cargo xtask demo` runs it on a
//! machine without a NIC.
//!
//! # Linking
//!
//! The crate links the system's libibverbs (Debian: `libibverbs1`, and `libibverbs-dev` to build), and
//! finds functions that an older one lacks at run time, so a program built here starts on any
//! rdma-core from 32 on. Building takes cmake, clang and pkg-config, for the bindings of `ibverbs-sys`.
//!
//! # Threads
//!
//! All types are `Send` and `Sync`. libibverbs and the kernel lock what they must; two threads that
//! post to one queue pair, or poll one completion queue, take turns.
//!
//! # Ownership and drop order
//!
//! Children keep their parents: a region and a queue pair hold their protection domain, that its
//! context. So values may be dropped in any order. Dropping never panics; where the kernel refuses, it
//! is logged with `tracing` (the region's [`deregister`](MemoryRegion::deregister) reports instead).
//!
//! A region needs no fd: drop the [`DmaBuf`] once it is registered, the kernel holds the memory until
//! the region goes. A [`dmabuf::Mapping`] holds an fd of its own.
//!
//! What a device may write is never borrowed: no `&[u8]` of a buffer exists, bytes are copied in and
//! out.
//!
//! # Features
//!
//! - `drm` (default): dumb buffers of DRM cards.
//! - `metrics`: the gauges of [`observe`] through the `metrics` crate.
//! - `cuda`, `hsa`, `level-zero`: from a pointer of such a runtime to a dma-buf. The libraries are found at
//!   run time; nothing of them is needed to build.
//! - `vulkan`: memory of Vulkan devices; the loader is found at run time.
//! - `gbm`: linear images of DRM cards; links the system's libgbm.
//! - `serde`: the descriptors that peers exchange can be serialised.

pub mod cm;
pub mod dmabuf;
pub mod error;
pub mod exporter;
pub mod mr;
pub mod observe;
pub mod pci;
pub mod sg;
mod tag;
pub mod transfer;
pub mod umem;
pub mod verbs;

pub use dmabuf::DmaBuf;
pub use error::{Error, Result};
pub use mr::{MemoryRegion, RegionCache, RegionSet};
pub use sg::DmaSg;
pub use transfer::RemoteRegion;
pub use umem::{Iova, Umem};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// And that of the guide to exporters.
#[cfg(doctest)]
#[doc = include_str!("../docs/exporters.md")]
struct Exporters;
