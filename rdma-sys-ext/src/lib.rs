//! Bindings for the RDMA and dma-buf interfaces of Linux that [`ibverbs_sys`] does not bind.
//!
//! `ibverbs-sys` is generated from the headers of rdma-core, so it has only the functions that those
//! headers declare. It lacks the `static inline` verbs, the kernel interface below libibverbs and all of
//! dma-buf, and a symbol newer than the installed libibverbs is a link error. This crate adds them, one
//! module per kernel or library interface. A function takes the arguments of its C counterpart and
//! returns the errno in an [`io::Error`](std::io::Error). For policy, checks and typed errors use the
//! crate `dmabuf-rdma`, which is built on this one.
//!
//! | module | interface | from |
//! |---|---|---|
//! | [`uverbs`] | ioctls on a context's `cmd_fd`: register and destroy memory regions | `rdma/ib_user_ioctl_cmds.h` |
//! | [`verbs`] | verbs that are inline in C: post, poll, arm, query a port or a GID | `infiniband/verbs.h` |
//! | [`rdma_cm`] | connections by IP address: librdmacm, loaded at run time | `rdma/rdma_cma.h` |
//! | [`symbols`] | functions of newer libibverbs and libmlx5, looked up at run time | the libraries' version maps |
//! | [`dma_buf`] | CPU access brackets, names, fences | `linux/dma-buf.h` |
//! | [`udmabuf`] | dma-bufs over memfd pages | `linux/udmabuf.h` |
//! | [`dma_heap`] | dma-bufs from the heaps in `/dev/dma_heap` | `linux/dma-heap.h` |
//! | [`v4l2`] | capture buffers of video devices | `linux/videodev2.h` |
//! | [`hsa`], [`level_zero`] | types and constants of the ROCm and oneAPI runtimes | their headers |
//! | [`vfio`] | PCI devices in user space, and their BARs as dma-bufs | `linux/vfio.h` |
//!
//! # Safe and unsafe
//! A function is safe if no argument can do harm: the kernel checks lengths, offsets and flags, and file
//! descriptors are borrowed. A function is `unsafe` if it takes a raw pointer, a raw file descriptor or a
//! handle that other code may own; its documentation says what the caller must ensure. Every descriptor
//! that the kernel creates goes into an [`OwnedFd`](std::os::fd::OwnedFd) at once.
//!
//! # Layouts
//! `tests/layout.rs` compiles and runs a C program that compares every hand-written `repr(C)` struct,
//! opcode and constant with the system's headers. It prints the ones that the installed headers lack.
#![cfg(target_os = "linux")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod ioctl;

pub mod dma_buf;
pub mod dma_heap;
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
