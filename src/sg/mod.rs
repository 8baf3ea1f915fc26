//! The scatter list with 64-bit lengths, and the arithmetic of `ib_umem` on it.
//!
//! A dma-buf as a device addresses it is a list of runs, and a run of GPU memory is easily larger than
//! 4 GiB; hence a `u64` where `ibv_sge` and the kernel's scatterlist have 32 bits. Nothing in here needs
//! a device, and nothing allocates but what makes a list.
//!
//! ```text
//!  PageList ──DmaMap──▶ DmaSgList ──view──▶ DmaSgView ──▶ best_page_size, blocks   (a device's page table)
//!  pages: pfn, count    addr, len           a range       sges                     (work requests)
//! ```
//!
//! | file | what |
//! |---|---|
//! | `builder.rs`, `list.rs`, `view.rs` | the list, how it is made, and a range of it |
//! | `pages.rs`, `map.rs`, `iova.rs` | pages, and how they become addresses that a device uses |
//! | `blocks.rs` | best page size and blocks, with the kernel's exact answers |
//! | `wire.rs` | scatter/gather elements under the limits of work requests |
//! | `device_view.rs` | any dma-buf as a given device sees it |
//!
//! ```
//! use dmabuf_rdma::sg::{DmaSg, DmaSgList, PageSizes};
//! use dmabuf_rdma::Iova;
//!
//! # fn main() -> dmabuf_rdma::Result<()> {
//! // Two runs of 6 GiB and 2 MiB, and a range that begins and ends inside them.
//! let runs = [DmaSg { addr: 0x2_0000_0000, len: 6 << 30 }, DmaSg { addr: 0x10_0020_0000, len: 2 << 20 }];
//! let list = DmaSgList::from_runs(runs)?;
//! let range = list.view((6 << 30) - 4096, 8192)?;
//! assert_eq!(range.run_at(5000), Some(DmaSg { addr: 0x10_0020_0000 + 904, len: 3192 }));
//!
//! assert_eq!(list.to_string(), "6.0 GiB in 2 segments, best page size 2 MiB");
//! let page_size = list.best_page_size(PageSizes::ALL, Iova(0))?;
//! assert_eq!(list.blocks(page_size, Iova(0))?.len(), 3073);
//! # Ok(())
//! # }
//! ```

mod blocks;
mod builder;
mod device_view;
mod iova;
mod list;
mod map;
#[cfg(test)]
mod model;
pub mod pagemap;
mod pages;
mod text;
mod view;
mod wire;

pub use blocks::{Blocks, PageSizes};
pub use builder::DmaSgBuilder;
pub use device_view::{DeviceView, DmaDevice, device_view};
pub use iova::IovaSpace;
pub use list::DmaSgList;
pub use map::{BusOffset, DmaMap, Identity, SegmentLimits, Translation};
pub use pages::{PageList, PageRun};
pub use text::Size;
pub use view::{DmaSgView, Runs};
pub use wire::{SgeGroup, SgeGroups, SgeLimits, WireSge};

/// One run of device addresses: `len` bytes from `addr`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DmaSg {
    /// First address, in the address space of whom the list is for.
    pub addr: u64,
    /// Length in bytes, never 0 in a [`DmaSgList`].
    pub len: u64,
}

impl std::fmt::Debug for DmaSg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DmaSg {{ addr: {:#x}, len: {:#x} }}", self.addr, self.len)
    }
}

const _: () = assert!(size_of::<DmaSg>() == 16);
