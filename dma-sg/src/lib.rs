//! Scatter lists of DMA addresses with 64-bit lengths, and the page arithmetic of the kernel's `ib_umem`.
//!
//! A device addresses a dma-buf by a list of runs. A run of GPU memory is easily longer than 4 GiB, but an
//! `ibv_sge` and the kernel's scatterlist hold 32-bit lengths. [`DmaSg`] holds a `u64`.
//!
//! ```text
//!  PageList ──DmaMap──▶ DmaSgList ──view──▶ DmaSgView ──▶ best_page_size, blocks   (a device's page table)
//!  pfn, count           addr, len           a range       sges                     (work requests)
//! ```
//!
//! | types | purpose |
//! |---|---|
//! | [`DmaSgBuilder`], [`DmaSgList`], [`DmaSgView`] | build a list; look bytes up; select a range without a copy |
//! | [`PageList`], [`DmaMap`], [`IovaSpace`] | turn physical pages into the addresses that a device uses |
//! | [`PageSizes`], [`Blocks`] | best page size and blocks, with the same results as the kernel |
//! | [`SgeLimits`], [`SgeGroups`] | cut a range into scatter/gather elements, grouped by work request |
//! | [`device_view`] | the addresses of any dma-buf as a given device sees them; needs root and a kernel module |
//! | [`pagemap`] | the physical pages of this process's memory; needs `CAP_SYS_ADMIN` |
//! | [`pci`] | BARs of PCI devices, and the peer-to-peer route between two devices, from sysfs |
//!
//! ```
//! use dma_sg::{DmaSg, DmaSgList, Iova, PageSizes};
//!
//! # fn main() -> dma_sg::Result<()> {
//! // Two runs, of 6 GiB and 2 MiB, and a range across the border between them.
//! let runs = [DmaSg { addr: 0x2_0000_0000, len: 6 << 30 }, DmaSg { addr: 0x10_0020_0000, len: 2 << 20 }];
//! let list = DmaSgList::from_runs(runs)?;
//! let range = list.view((6 << 30) - 4096..(6 << 30) + 4096)?;
//! assert_eq!(range.run_at(5000), Some(DmaSg { addr: 0x10_0020_0000 + 904, len: 3192 }));
//!
//! assert_eq!(list.to_string(), "6.0 GiB in 2 segments, best page size 2 MiB");
//! let page_size = list.best_page_size(PageSizes::ALL, Iova(0))?;
//! assert_eq!(list.blocks(page_size, Iova(0))?.len(), 3073);
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - `serde`: `Serialize` and `Deserialize` for [`DmaSg`] and [`Iova`].

#![cfg_attr(docsrs, feature(doc_cfg))]

mod blocks;
mod builder;
pub mod device_view;
mod error;
mod iova;
mod list;
mod map;
#[cfg(test)]
mod model;
pub mod pagemap;
mod pages;
pub mod pci;
mod range;
mod size;
mod view;
mod wire;

pub use blocks::{Blocks, PageSizes};
pub use builder::DmaSgBuilder;
pub use error::{Error, Result};
pub use iova::{Iova, IovaSpace};
pub use list::DmaSgList;
pub use map::{BusOffset, DmaMap, Identity, SegmentLimits, Translation};
pub use pages::{PageList, PageRun, page_size};
pub use range::{RangeError, check_range, resolve_range};
pub use size::Size;
pub use view::{DmaSgView, Runs};
pub use wire::{MAX_SGE_LEN, SgeGroup, SgeGroups, SgeLimits, WireSge};

/// One run of device addresses: `len` bytes from `addr`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DmaSg {
    /// First address, in the address space of the device that the list was made for.
    pub addr: u64,
    /// Length in bytes; never 0 in a [`DmaSgList`].
    pub len: u64,
}

impl std::fmt::Debug for DmaSg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DmaSg {{ addr: {:#x}, len: {:#x} }}", self.addr, self.len)
    }
}

const _: () = assert!(size_of::<DmaSg>() == 16);

/// Compiles the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
