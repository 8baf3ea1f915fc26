//! PCI devices from sysfs: their BARs, and the peer-to-peer route from one device to another.
//!
//! A NIC reaches the memory of a GPU over PCI. The route between them (a switch, the root complex, the link
//! between two sockets) decides how fast that is, and whether it works at all. [`PciDevice::route_to`]
//! describes the route, [`nearest`] sorts several NICs by it, and [`PciDevice::bars`] lists the memory of a
//! device with its bus addresses.
//!
//! ```no_run
//! use dma_sg::pci::{Sysfs, nearest};
//!
//! # fn main() -> dma_sg::pci::Result<()> {
//! let sysfs = Sysfs::new();
//! let gpu = sysfs.drm_card("card0")?.into_pci()?;
//! for route in nearest(&gpu, &sysfs.rdma_pci_devices()?)? {
//!     println!("{route}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! This module only reads files; it touches no device. An unprivileged user can read everything except the
//! ACS settings, which are then reported as unknown.

mod address;
mod bar;
mod config;
mod error;
mod route;
mod sysfs;
#[cfg(test)]
mod tests;

pub use address::PciAddress;
pub use bar::{Bar, BarKind, BarRefusal};
pub use error::{Error, Result};
pub use route::{AcsRedirect, CommonAncestor, P2pRoute, nearest};
pub use sysfs::{IommuGroup, Location, PciDevice, Sysfs};
