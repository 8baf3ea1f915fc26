//! Errors of PCI devices and sysfs.

use std::fmt;
use std::io;

use super::{BarRefusal, PciAddress};

/// The result of functions on PCI devices.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a PCI device was refused, or could not be read from sysfs.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not a PCI address.
    #[error("{text:?} is not a PCI address: write it as 0000:03:00.0")]
    InvalidPciAddress {
        /// The given text.
        text: String,
    },
    /// sysfs has no such device.
    #[error("this machine has no {what}: lspci -D lists PCI devices, ls /sys/class/drm lists DRM cards")]
    NotInSysfs {
        /// Kind and name of the device.
        what: String,
        /// The kernel's errno (`ENOENT`).
        source: io::Error,
    },
    /// The device is not on the PCI bus.
    #[error(
        "{name} is not a PCI device: choose one that is, since software and platform devices do no peer-to-peer DMA"
    )]
    NotOnPci {
        /// Name of the device.
        name: String,
    },
    /// A file of sysfs cannot be read or parsed.
    #[error("cannot read {path}: is sysfs mounted, and the device still present?")]
    Sysfs {
        /// Path of the file.
        path: String,
        /// The kernel's errno, or `InvalidData`.
        source: io::Error,
    },
    /// The BAR cannot be a target of DMA.
    #[error("BAR {bar} of {device} {refusal}")]
    BarUnusable {
        /// Address of the device.
        device: PciAddress,
        /// Number of the BAR.
        bar: u8,
        /// Why, and what to do.
        refusal: BarRefusal,
    },
    /// No RDMA device has this name.
    #[error("no RDMA device is named {name:?}; {}", choices(.present))]
    UnknownRdmaDevice {
        /// The requested name.
        name: String,
        /// Names of the RDMA devices of this machine.
        present: Vec<String>,
    },
}

/// The names to choose from.
fn choices(present: &[String]) -> String {
    match present {
        [] => "this machine has none: load a driver, or add a software device (rdma link add)".into(),
        names => format!("present: {}", names.join(", ")),
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
