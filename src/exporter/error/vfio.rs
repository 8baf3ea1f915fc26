//! Why a PCI device could not be opened through VFIO, or its BAR not be exported.

use std::io;

use dma_sg::RangeError;
use dma_sg::pci::{self, PciAddress};

use crate::dmabuf;
use crate::kind::{ErrorKind, readable_error};

/// Why a PCI device could not be opened through VFIO, or its BAR not be exported.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum VfioError {
    /// The device is in no IOMMU group.
    #[error(
        "{device} is in no IOMMU group, which VFIO requires: switch the IOMMU on in the firmware, on Intel also with intel_iommu=on"
    )]
    NoIommu {
        /// The device.
        device: PciAddress,
    },
    /// The device is bound to another driver or to none.
    #[error(
        "{device} is bound to {}: write vfio-pci to its driver_override in sysfs, unbind it from its driver, and write its address to drivers_probe", driver.as_deref().unwrap_or("no driver")
    )]
    NotBound {
        /// The device.
        device: PciAddress,
        /// The driver that it is bound to.
        driver: Option<String>,
    },
    /// Kernel drivers hold other devices of the IOMMU group.
    #[error(
        "{device} shares IOMMU group {group} with devices that kernel drivers hold: bind all of /sys/kernel/iommu_groups/{group}/devices to vfio-pci"
    )]
    GroupNotViable {
        /// The device.
        device: PciAddress,
        /// Its group.
        group: u32,
    },
    /// A step of opening the device failed.
    #[error("cannot {operation} for {device}{}", open_hint(.source))]
    Open {
        /// The device.
        device: PciAddress,
        /// The step: "open /dev/vfio/vfio", "open its IOMMU group", …
        operation: &'static str,
        /// The system call's error.
        source: io::Error,
    },
    /// The kernel or the driver does not export BARs (`ENOTTY`, `EOPNOTSUPP`).
    #[error(
        "the kernel does not export BARs of {device} as dma-bufs: use Linux 6.19 or later with CONFIG_VFIO_PCI_DMABUF, and the driver vfio-pci"
    )]
    Unsupported {
        /// The device.
        device: PciAddress,
        /// The system call's error.
        source: io::Error,
    },
    /// The region is the expansion ROM or another one after the BARs.
    #[error("region {bar} of {device} is not a BAR: export one of 0 to 5")]
    NotABar {
        /// The device.
        device: PciAddress,
        /// The region that was requested.
        bar: u8,
    },
    /// The BAR is smaller than a page.
    #[error(
        "BAR {bar} of {device} has {size} bytes, less than the page of {page_size} bytes that a dma-buf takes: access it with the CPU"
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
    /// The range does not begin or end at a page boundary.
    #[error(
        "{length} bytes at offset {offset} of BAR {bar} of {device} are not whole pages of {page_size} bytes: widen the range to whole pages"
    )]
    Unaligned {
        /// The device.
        device: PciAddress,
        /// The BAR.
        bar: u8,
        /// Offset of the range in bytes.
        offset: u64,
        /// Length of the range in bytes.
        length: u64,
        /// The system's page size in bytes.
        page_size: u64,
    },
    /// The kernel refused to export the BAR for another reason.
    #[error("cannot export {size} bytes of BAR {bar} of {device}")]
    Export {
        /// The device.
        device: PciAddress,
        /// The BAR.
        bar: u8,
        /// Length of all ranges in bytes.
        size: u64,
        /// The system call's error.
        source: io::Error,
    },
    /// A range is empty or not inside the BAR, or there is none.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// sysfs has no such device, or the BAR cannot be a target of DMA.
    #[error(transparent)]
    Pci(#[from] pci::Error),
    /// The exported descriptor.
    #[error(transparent)]
    DmaBuf(#[from] dmabuf::Error),
}

readable_error!(VfioError);

impl VfioError {
    /// What a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotBound { .. } | Self::GroupNotViable { .. } => ErrorKind::Busy,
            Self::NoIommu { .. } | Self::Unsupported { .. } | Self::BarTooSmall { .. } => {
                ErrorKind::Unsupported
            }
            Self::NotABar { .. } | Self::Unaligned { .. } | Self::Range(_) => ErrorKind::Misuse,
            Self::Open { source, .. } | Self::Export { source, .. } => ErrorKind::of(source),
            Self::Pci(pci::Error::NotInSysfs { .. }) => ErrorKind::NotFound,
            Self::Pci(pci::Error::BarUnusable { .. }) => ErrorKind::Unsupported,
            Self::Pci(_) => ErrorKind::System,
            Self::DmaBuf(error) => error.kind(),
        }
    }
}

/// What the errno of a step of opening a device usually means.
fn open_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::EINVAL) => {
            ": load the modules vfio_pci and vfio_iommu_type1"
        }
        Some(libc::EACCES) => ": run as root, or give this user the node",
        Some(libc::EPERM) => {
            ": the IOMMU does not remap interrupts (see allow_unsafe_interrupts of vfio_iommu_type1), or run as root"
        }
        Some(libc::EBUSY) => ": another process has the group",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vfio_step_that_failed_says_what_to_do() {
        let device: PciAddress = "0000:03:00.0".parse().unwrap();
        let open = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            VfioError::Open { device, operation: "open its IOMMU group", source }
        };
        let busy = open(libc::EBUSY);
        assert_eq!(
            busy.to_string(),
            "cannot open its IOMMU group for 0000:03:00.0: another process has the group"
        );
        assert_eq!(busy.kind(), ErrorKind::Busy);
        assert_eq!(open(libc::EACCES).kind(), ErrorKind::Permission);
        assert_eq!(open(libc::EIO).to_string(), "cannot open its IOMMU group for 0000:03:00.0");
    }
}
