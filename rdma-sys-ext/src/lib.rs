//! The part of the RDMA and dma-buf interfaces of Linux that [`ibverbs_sys`] does not bind.
//!
//! `ibverbs-sys` is generated from the headers of rdma-core, so it has what those headers declare as
//! functions. It has no `static inline` verbs, no kernel interface below libibverbs, nothing of
//! dma-buf, and a symbol newer than the installed libibverbs is a link error. This crate adds those,
//! one file per kernel or library interface, and nothing above them: arguments are those of the C
//! side, an error is the errno in an [`io::Error`](std::io::Error). For policy, checks and types that
//! explain themselves use the crate `dmabuf-rdma`, which is built on this one.
//!
//! | module | interface | from |
//! |---|---|---|
//! | [`uverbs`] | ioctls on a context's `cmd_fd`: register and destroy memory regions | `rdma/ib_user_ioctl_cmds.h` |
//! | [`verbs`] | the verbs that C has as inlines: post, poll, arm, query a port or a GID | `infiniband/verbs.h` |
//! | [`rdma_cm`] | connections by IP address: librdmacm, found at run time | `rdma/rdma_cma.h` |
//! | [`symbols`] | functions of newer libibverbs and libmlx5, found at run time | the libraries' version maps |
//! | [`dma_buf`] | CPU access brackets, names, fences | `linux/dma-buf.h` |
//! | [`udmabuf`] | dma-bufs over memfd pages | `linux/udmabuf.h` |
//! | [`dma_heap`] | dma-bufs from the heaps in `/dev/dma_heap` | `linux/dma-heap.h` |
//! | [`v4l2`] | capture buffers of video devices | `linux/videodev2.h` |
//! | [`hsa`], [`level_zero`] | types and constants of ROCm's and oneAPI's runtimes | their headers |
//! | [`vfio`] | PCI devices in user space, and their BARs as dma-bufs | `linux/vfio.h` |
//! | [`dma_sg`] | a dma-buf's addresses as a device sees them | `kernel/dma_sg` of this repository |
//!
//! # Safe and unsafe
//! A function is safe where the kernel makes every argument harmless: it checks lengths, offsets and
//! flags, and the file descriptors are borrowed ones. A function that takes a raw pointer, a raw file
//! descriptor or the number of an object that somebody else may own is `unsafe`, and its
//! documentation says what the caller answers for. Every descriptor that the kernel creates is in an
//! [`OwnedFd`](std::os::fd::OwnedFd) before anything else happens.
//!
//! # Layouts
//! Each `repr(C)` struct, opcode and constant written by hand here is compared with the system's
//! headers by `tests/layout.rs`, which compiles and runs a C program. What the installed headers are
//! too old to have is listed by that test.
#![cfg(target_os = "linux")]

mod ioctl;

pub mod dma_buf;
pub mod dma_heap;
pub mod dma_sg;
pub mod hsa;
pub mod level_zero;
#[allow(non_camel_case_types, missing_debug_implementations)] // the names and the unions of C
pub mod rdma_cm;
pub mod symbols;
pub mod udmabuf;
pub mod uverbs;
pub mod v4l2;
pub mod verbs;
pub mod vfio;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
