//! The rdma_rxe module that the guest loads: Debian's, or the one with dma-buf
//! import.

use super::{Unpacked, built};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// A flavour of rdma_rxe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Rxe {
    /// Debian's; cannot import dma-bufs
    Stock,
    /// Built from Debian's source and kernel/rxe; imports dma-bufs
    Dmabuf,
}

impl Rxe {
    pub fn name(self) -> &'static str {
        match self {
            Rxe::Stock => "stock",
            Rxe::Dmabuf => "dmabuf",
        }
    }
}

/// The module with dma-buf import for this kernel.
pub fn dmabuf_module(kernel: &Unpacked) -> Result<PathBuf> {
    built::module(kernel, "rxe", "rdma_rxe", &[kernel.source(), kernel.headers()])
        .context("cannot provide rdma_rxe with dma-buf import; `--rxe stock` works without it")
}
