//! Errors of a device's view.

use std::fmt;
use std::io;

use crate::pci;

/// The kernel's internal ENOTSUPP, which some drivers leak to user space. libc has no name for it.
const ENOTSUPP: i32 = 524;

/// Why a device's view of a buffer could not be made or read.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device does not exist.
    #[error(transparent)]
    Device(#[from] pci::Error),
    /// The module returned an empty or invalid list.
    #[error(transparent)]
    List(#[from] crate::Error),
    /// The module `dma_sg` is not loaded.
    #[error(
        "/dev/dma_sg does not exist: build the module (kernel/dma_sg/README.md) and run `modprobe dma_sg`"
    )]
    ModuleMissing {
        /// The kernel's errno (`ENOENT`, `ENODEV`, `ENXIO`).
        source: io::Error,
    },
    /// This process may not see physical addresses.
    #[error(
        "a device's view shows physical addresses: run this as root with CAP_SYS_ADMIN, outside containers"
    )]
    NotPermitted {
        /// The kernel's errno (`EACCES`, `EPERM`).
        source: io::Error,
    },
    /// The buffer could not be mapped for the device, or its list not read.
    #[error("cannot map {size} bytes of exporter {exporter:?} for {device}{}", hint(exporter, source))]
    Map {
        /// The device whose view was requested.
        device: String,
        /// Name of the exporter; empty if the descriptor is not a dma-buf.
        exporter: String,
        /// Size of the buffer in bytes.
        size: u64,
        /// The errno of the module or the exporter.
        source: io::Error,
    },
    /// The mapping ended while the view was open.
    #[error(
        "the view of {device} has ended: its exporter moved or revoked the buffer, or the device lost its driver; create a new view"
    )]
    Ended {
        /// The device of the view.
        device: String,
        /// The kernel's errno (`ESTALE`).
        source: io::Error,
    },
}

/// Why a buffer cannot be mapped for a device.
fn hint(exporter: &str, source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EINVAL) if exporter.is_empty() => ": the descriptor is not a dma-buf",
        Some(libc::ENXIO) => ": no driver has set the device up for DMA; bind one",
        Some(libc::EBUSY) => {
            ": the device's driver manages DMA by itself (vfio-pci, pci-stub, a bridge's driver)"
        }
        Some(libc::EADDRNOTAVAIL) => {
            ": the kernel would use bounce buffers (swiotlb=force, or the device's DMA mask is too small)"
        }
        Some(libc::ENOSYS) => ": the exporter's memory has no pages to list",
        Some(libc::EOPNOTSUPP | ENOTSUPP) => ": the exporter does not map its memory for this device",
        _ => "",
    }
}

impl fmt::Debug for Error {
    /// The message and its causes, so that `fn main() -> Result<…>` prints them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::error::write_chain(self, f)
    }
}

impl Error {
    /// The errno, if a system call failed.
    pub fn errno(&self) -> Option<i32> {
        crate::error::errno(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_the_values_and_a_hint() {
        let map = |exporter: &str, errno| {
            let source = io::Error::from_raw_os_error(errno);
            let (device, exporter) = ("PCI device 0000:00:02.0".into(), exporter.into());
            Error::Map { device, exporter, size: 4096, source }
        };
        let refused = map("udmabuf", libc::EBUSY);
        assert_eq!(
            refused.to_string(),
            "cannot map 4096 bytes of exporter \"udmabuf\" for PCI device 0000:00:02.0: the device's driver manages DMA by itself (vfio-pci, pci-stub, a bridge's driver)"
        );
        assert_eq!(refused.errno(), Some(libc::EBUSY));
        assert!(map("", libc::EINVAL).to_string().ends_with("is not a dma-buf"));
        assert!(map("udmabuf", libc::EINVAL).to_string().ends_with("0000:00:02.0"));
    }
}
