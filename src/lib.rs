//! Register dma-bufs with RDMA devices and transfer their bytes in place, without bounce buffers.
//!
//! A dma-buf is a file descriptor for memory that a driver allocated: GPU memory, a kernel heap, a camera's
//! frames. This crate registers that memory with an RDMA device (NIC), which then reads and writes it in place,
//! and transfers ranges of any length over a reliable connection. Every error says what failed, why if that is
//! known, and what to do next.
//!
//! # The path
//!
//! ```text
//!  exporter ──fd──▶ DmaBuf ──range──▶ MemoryRegion ──slice──▶ Connection ──▶ the wire
//!  GPU, heap,       identity,         lkey, rkey, iova        WRITE, READ, SEND,
//!  udmabuf, DRM     size, CPU access  (RegionSet, RegionCache) atomics, any length
//!  host memory ───▶ HostBuffer ─────▶ the same
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`exporter`] | allocators of dma-bufs, and GPU runtimes that turn a pointer into one |
//! | [`dmabuf`] | a dma-buf: identity, size, CPU access, fences |
//! | [`host`] | host memory as an end of a transfer |
//! | [`verbs`] | devices, protection domains, completion queues, queue pairs |
//! | [`mr`] | registration: regions, sets of regions, the cache, and descriptions for a peer |
//! | [`transfer`] | connections that transfer ranges of any length and tables of blocks, and notify the peer |
//! | [`cm`] | connections by IP address, through librdmacm |
//! | [`observe`] | gauges and `tracing` spans |
//! | [`dma_sg`] | address lists, PCI topology, and the addresses of a dma-buf as a device sees them |
//!
//! # Quick start
//!
//! 1. Get a [`DmaBuf`]: [`DmaBuf::from_fd`] for a descriptor that you have, an [`exporter`] for new memory.
//! 2. Open a device ([`verbs::Device::by_name`]) and allocate a [`verbs::ProtectionDomain`] in it.
//!    [`mr::probe`] tells whether the device imports dma-bufs.
//! 3. Register the buffer: [`MemoryRegion::builder`].
//! 4. Create a [`Connection`] in the same domain and connect it. The peers exchange their
//!    [`endpoint`](Connection::endpoint)s and the target's [`remote`](MemoryRegion::remote) description by any
//!    means; [`cm`] connects by IP address instead.
//! 5. Slice both sides and transfer.
//!
//! ```no_run
//! use dmabuf_rdma::exporter::{DmaHeap, Exporter};
//! use dmabuf_rdma::mr::{Access, MemoryRegion};
//! use dmabuf_rdma::transfer::Connection;
//! use dmabuf_rdma::verbs::{Device, ProtectionDomain};
//!
//! fn main() -> dmabuf_rdma::Result<()> {
//!     // 1. Two dma-bufs of 1 MiB, from the kernel's system heap.
//!     let heap = DmaHeap::open("system")?;
//!     let (ours, theirs) = (heap.allocate(1 << 20)?.dmabuf, heap.allocate(1 << 20)?.dmabuf);
//!
//!     // 2. A device and a protection domain.
//!     let domain = ProtectionDomain::new(&Device::by_name("rxe0")?.open()?)?;
//!
//!     // 3. The source needs no flags; the peer writes the target.
//!     let source = MemoryRegion::builder(&domain, &ours).register()?;
//!     let target = MemoryRegion::builder(&domain, &theirs)
//!         .access(Access::LOCAL_WRITE | Access::REMOTE_WRITE)
//!         .register()?;
//!
//!     // 4. To keep the example short, the connection is its own peer.
//!     let connection = Connection::new(&domain, Default::default())?;
//!     connection.connect(&connection.endpoint())?;
//!
//!     // 5. Write the first 64 KiB of the source to offset 4096 of the target.
//!     let from = source.slice(..65536)?;
//!     let to = target.remote().slice(4096..4096 + 65536)?;
//!     let transferred = connection.write(from, to)?.wait()?;
//!     println!("{} bytes written through {}", transferred.bytes, source.path());
//!     Ok(())
//! }
//! ```
//!
//! `dmabuf-rdma demo` (`cli/`) runs the whole path between two processes; `cargo xtask demo` runs it in a guest with a
//! software RDMA device, on a machine without a NIC.
//!
//! # Linking
//!
//! The crate links the system's libibverbs (Debian: `libibverbs1`). A program runs with rdma-core 32 or later:
//! functions of later releases, librdmacm and the GPU runtimes are looked up at run time. A build needs cmake,
//! clang, pkg-config and `libibverbs-dev`, for the bindings of `ibverbs-sys`.
//!
//! # Threads
//!
//! Every type is `Send` and `Sync`. Two threads may post to one queue pair or poll one completion queue: the provider
//! serializes them, unless it is told not to (see [`verbs`](verbs#providers-without-locks)). Threads may share a
//! [`Connection`], and wait for its transfers in any order; [`Connection::split`] gives its two directions to two owners.
//!
//! # Ownership
//!
//! Regions, sets, slices, protection domains, contexts and completion queues are handles: cheap to clone, and the
//! last clone releases the kernel's object. Whatever uses an object holds a handle to it: a region holds its
//! protection domain, a slice its region, a transfer in flight its slices. Values may therefore be dropped in any
//! order, and nothing frees memory that a device still uses.
//!
//! - A region needs no descriptor. Drop the [`DmaBuf`] after the registration: the kernel holds the memory until
//!   the region is deregistered.
//! - Drop never panics. If the kernel refuses to release an object, drop logs that with `tracing`;
//!   [`MemoryRegion::deregister`] reports it.
//! - In a child of `fork`, drop leaves the objects of the kernel and of GPU runtimes alone: they belong to the
//!   parent. The child must neither register nor transfer with them; it may open the device anew.
//! - A region of host memory holds its [`HostBuffer`], so the memory stays until the region is deregistered.
//! - A device may write a buffer at any time, so the crate lends no `&[u8]` into one. [`dmabuf::Mapping`] and
//!   [`HostBuffer`] copy bytes in and out.
//!
//! # Errors
//!
//! Each function returns the error of its own step: [`mr::RegisterError`], [`transfer::Error`], and so on.
//! [`Error`] gathers all of them by `From`, so `?` works across steps. Match a variant to handle one cause, and
//! [`kind`](Error::kind) for everything else: an [`ErrorKind`] says what a program can do and stays stable as
//! variants change. [`errno`](Error::errno) is the errno, where a system call or a provider gave one. `Debug`
//! prints the message with its causes, so `fn main() -> dmabuf_rdma::Result<()>` prints a readable error.
//!
//! # Features
//!
//! | feature | what it adds |
//! |---|---|
//! | `drm` (default) | dumb buffers of DRM cards |
//! | `cuda`, `hsa`, `level-zero` | GPU memory: from a pointer of the runtime to a dma-buf. Finds the library at run time |
//! | `vulkan` | memory of Vulkan devices. Finds the loader at run time |
//! | `gbm` | linear images of DRM cards. Links the system's libgbm |
//! | `metrics` | the gauges of [`observe`] through the `metrics` crate |
//! | `serde` | `Serialize` and `Deserialize` for what peers exchange |
//! | `tokio` | transfers and notifications make progress in a tokio runtime; connections by IP address can be awaited |
#![cfg_attr(docsrs, feature(doc_cfg))]

#[macro_use]
mod setters;

pub mod cm;
pub mod dmabuf;
mod error;
pub mod exporter;
pub mod host;
mod kind;
pub mod mr;
pub mod observe;
pub mod transfer;
pub mod verbs;

pub use dma_sg::{self, DmaSg, DmaSgList, Iova};
pub use dmabuf::DmaBuf;
pub use error::{Error, Result};
pub use host::HostBuffer;
pub use kind::ErrorKind;
pub use mr::{
    Access, Blocks, MemoryRegion, RegionCache, RegionSet, RegionSlice, RemoteRegion, RemoteSlice, Umem,
};
pub use transfer::{Connection, ConnectionOptions, Notifications, Transfer, Worker, WorkerOptions};
pub use verbs::{Device, Endpoint, ProtectionDomain};

#[cfg(test)]
mod tests;

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Compiles the examples of the guide to exporters.
#[cfg(doctest)]
#[doc = include_str!("../docs/exporters.md")]
struct Exporters;
