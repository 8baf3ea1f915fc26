//! PCI devices as sysfs shows them: their memory, and the way from one to another.
//!
//! A NIC reaches a GPU's memory over PCI, and how depends on where both are plugged in. Whether that is
//! through a switch, through a root complex or across sockets decides about its speed, and whether it
//! works at all. [`PciDevice::reach`] says which it is, [`nearest`] orders several NICs by it, and
//! [`PciDevice::bars`] lists the memory of a device as [`DmaSgList`](crate::sg::DmaSgList)s of bus
//! addresses.
//!
//! ```no_run
//! use dmabuf_rdma::pci::{Sysfs, nearest};
//!
//! # fn main() -> dmabuf_rdma::Result<()> {
//! let sysfs = Sysfs::new();
//! let gpu = sysfs.drm_card("card0")?.pci()?;
//! for reach in nearest(&gpu, &sysfs.rdma_on_pci()?)? {
//!     println!("{reach}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Everything is read from files; nothing is opened for writing and no device is touched. An ordinary
//! user sees all but the ACS settings, which are then unknown and said to be so.

mod address;
mod bar;
mod config;
mod reach;
mod sysfs;
#[cfg(test)]
mod tests;

pub use address::PciAddress;
pub use bar::{Bar, BarKind, BarRefusal};
pub use reach::{Meeting, Reach, Redirect, nearest};
pub use sysfs::{Iommu, Location, PciDevice, Sysfs};
