//! What refuses the memory of a PCI device that VFIO holds.

use std::io;

use crate::pci::PciAddress;

/// Why a PCI device cannot be had through VFIO, or its BAR not as a dma-buf; [`Error::Vfio`](crate::Error)
/// holds it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioError {
    /// The device is in no IOMMU group.
    #[error(
        "{device} is in no IOMMU group, and VFIO gives out nothing else: switch the IOMMU on in the firmware and with intel_iommu=on (AMD's is on)"
    )]
    NoIommu {
        /// The device.
        device: PciAddress,
    },
    /// Another driver, or none, holds the device.
    #[error(
        "{device} is held by {}: write vfio-pci to its driver_override in sysfs, unbind it from its driver, and write its address to drivers_probe", driver.as_deref().unwrap_or("no driver")
    )]
    NotBound {
        /// The device.
        device: PciAddress,
        /// The driver that holds it.
        driver: Option<String>,
    },
    /// Other devices of the group are held by drivers of the kernel.
    #[error(
        "{device} shares IOMMU group {group} with devices that kernel drivers hold: bind all of /sys/kernel/iommu_groups/{group}/devices to vfio-pci"
    )]
    GroupNotViable {
        /// The device.
        device: PciAddress,
        /// Its group.
        group: u32,
    },
    /// A step on the way to the device's descriptor failed.
    #[error("cannot {operation} for {device}")]
    Open {
        /// The device.
        device: PciAddress,
        /// What failed: "open its IOMMU group", …
        operation: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The kernel or the driver makes no dma-bufs of BARs (`ENOTTY`, `EOPNOTSUPP`).
    #[error(
        "the kernel makes no dma-buf of a BAR of {device}: that takes Linux 6.19 with CONFIG_VFIO_PCI_DMABUF, and the driver vfio-pci"
    )]
    Unsupported {
        /// The device.
        device: PciAddress,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The region is the expansion ROM or what else follows the BARs.
    #[error("region {bar} of {device} is no BAR: only 0 to 5 can be dma-bufs, the expansion ROM cannot")]
    NotABar {
        /// The device.
        device: PciAddress,
        /// The region that was asked for.
        bar: u8,
    },
    /// The BAR is smaller than a page.
    #[error(
        "BAR {bar} of {device} has {size} bytes, and a dma-buf is made of whole pages of {page_size}: reach it by the CPU"
    )]
    BarTooSmall {
        /// The device.
        device: PciAddress,
        /// The BAR.
        bar: u8,
        /// Its size in bytes.
        size: u64,
        /// The system's page size in bytes.
        page_size: u64,
    },
    /// A range does not begin or end where a page does.
    #[error(
        "{length} bytes at {offset} of BAR {bar} of {device} are not whole pages of {page_size} bytes: widen the range to whole pages"
    )]
    Unaligned {
        /// The device.
        device: PciAddress,
        /// The BAR.
        bar: u8,
        /// Where the range begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// The system's page size in bytes.
        page_size: u64,
    },
}
