//! Any dma-buf as a given device sees it, shown by the kernel module `dma_sg`.
//!
//! A dma-buf has addresses only where it is mapped for a device, and only drivers see those. The module
//! (`kernel/dma_sg`) maps it as a driver would and lets root read the list.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma_sys_ext::dma_sg as sys;

use super::{DmaSg, DmaSgBuilder, DmaSgList};
use crate::dmabuf::DmaBuf;
use crate::pci::{PciAddress, Sysfs};
use crate::{Error, Result};

const NODE: &str = "/dev/dma_sg";

/// Entries of one read: 1 MiB of them, so that a list of any length takes little memory twice.
const BATCH: u64 = 1 << 16;

/// Whose view of a buffer is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DmaDevice<'a> {
    /// A PCI device that has a driver.
    Pci(PciAddress),
    /// An RDMA device by its name. One that copies with the CPU, such as soft-RoCE, sees what
    /// [`None`](Self::None) does.
    Rdma(&'a str),
    /// A device that addresses physical memory directly: the list is of physical addresses.
    None,
}

impl fmt::Display for DmaDevice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => write!(f, "PCI device {address}"),
            Self::Rdma(name) => write!(f, "RDMA device {name}"),
            Self::None => f.write_str("a device without address translation"),
        }
    }
}

impl DmaDevice<'_> {
    /// Why there is no such device, if there is none.
    fn absence(self) -> Option<Error> {
        match self {
            Self::Pci(address) => Sysfs::new().device(address).err(),
            Self::Rdma(name) => Sysfs::new().rdma_device(name).err(),
            Self::None => None,
        }
    }
}

/// A buffer mapped for a device, and the list of addresses that it has there.
///
/// The mapping stays until this is dropped, so the addresses stay true while they are looked at, with
/// two exceptions: an exporter that moves or revokes its buffers, and a device that loses its driver.
/// Both end the view, which `poll(2)` reports on its descriptor by `POLLIN` and `POLLPRI`.
///
/// The view holds the buffer's memory, not the [`DmaBuf`]. Its descriptor may go to another process, also
/// to one without privileges.
#[derive(Debug)]
pub struct DeviceView {
    fd: OwnedFd,
    device: String,
    exporter: String,
    size: u64,
}

/// Maps a buffer for a device, and holds it mapped to look at the addresses.
///
/// Peer-to-peer mappings are allowed, so memory of another PCI device is seen where this one reaches it.
///
/// # Errors
/// - [`AddressError::ViewModuleMissing`](crate::error::AddressError::ViewModuleMissing) (`ENOENT`): the module is not loaded.
/// - [`AddressError::ViewNotPermitted`](crate::error::AddressError::ViewNotPermitted) (`EACCES`, `EPERM`): not root, or no CAP_SYS_ADMIN.
/// - [`Error::UnknownDevice`], [`AddressError::NotInSysfs`](crate::error::AddressError::NotInSysfs): there is no such device.
/// - [`AddressError::View`](crate::error::AddressError::View): the device is not set up for DMA by its driver (`ENXIO`), is somebody else's
///   (`EBUSY`) or would be given bounce buffers (`EADDRNOTAVAIL`); or the exporter refuses, with its errno.
///
/// Source: `kernel/dma_sg/view.c`; `drivers/dma-buf/dma-buf.c` for what an exporter may answer.
#[doc(alias = "DMA_SG_IOCTL_MAP")]
pub fn device_view(buffer: &DmaBuf, device: DmaDevice<'_>) -> Result<DeviceView> {
    let refused = |source: io::Error| {
        Error::Addresses(crate::error::AddressError::View {
            device: device.to_string(),
            exporter: buffer.exporter_name().unwrap_or_default(),
            size: buffer.size(),
            source,
        })
    };
    let node = File::open(NODE).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            Error::Addresses(crate::error::AddressError::ViewModuleMissing { source })
        }
        Some(libc::EACCES | libc::EPERM) => {
            Error::Addresses(crate::error::AddressError::ViewNotPermitted { source })
        }
        _ => refused(source),
    })?;
    let (kind, name) = match device {
        DmaDevice::Pci(address) => (sys::DEVICE_PCI, address.to_string()),
        DmaDevice::Rdma(name) => (sys::DEVICE_RDMA, name.to_owned()),
        DmaDevice::None => (sys::DEVICE_NONE, String::new()),
    };
    // A name with a NUL inside is nobody's, and its first half may be another device's.
    let mapped = match CString::new(name) {
        Ok(name) => sys::map(node.as_fd(), buffer.as_fd(), kind, &name),
        Err(_) => Err(io::Error::from_raw_os_error(libc::ENODEV)),
    };
    let fd = mapped.map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) => Error::Addresses(crate::error::AddressError::ViewNotPermitted { source }),
        // An exporter may say this too, so look whether the device is there.
        Some(libc::ENODEV | libc::EINVAL) => device.absence().unwrap_or_else(|| refused(source)),
        _ => refused(source),
    })?;
    Ok(DeviceView {
        fd,
        device: device.to_string(),
        exporter: buffer.exporter_name().unwrap_or_default(),
        size: buffer.size(),
    })
}

impl DeviceView {
    /// Reads the list: device addresses in the order of the buffer's bytes, neighbours merged.
    ///
    /// # Errors
    /// - [`AddressError::ViewEnded`](crate::error::AddressError::ViewEnded) (`ESTALE`): the addresses are not the buffer's any more.
    /// - [`AddressError::View`](crate::error::AddressError::View): the module answered otherwise.
    /// - [`Error::ZeroLength`]: the exporter mapped nothing.
    #[doc(alias = "DMA_SG_IOCTL_READ")]
    pub fn list(&self) -> Result<DmaSgList> {
        let (_, total) = self.read(0, &mut [])?;
        let mut list = DmaSgBuilder::with_capacity(usize::try_from(total).unwrap_or(0));
        let mut batch = vec![sys::Entry::default(); total.min(BATCH) as usize];
        let mut first = 0;
        while first < total {
            let (count, _) = self.read(first, &mut batch)?;
            if count == 0 {
                break;
            }
            list.extend(batch[..count].iter().map(|entry| DmaSg { addr: entry.addr, len: entry.len }))?;
            first += count as u64;
        }
        list.finish()
    }

    /// Whether the mapping still stands.
    pub fn is_valid(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }

    fn read(&self, first: u64, entries: &mut [sys::Entry]) -> Result<(usize, u64)> {
        sys::read(self.fd.as_fd(), first, entries).map_err(|source| match source.raw_os_error() {
            Some(libc::ESTALE) => Error::Addresses(crate::error::AddressError::ViewEnded {
                device: self.device.clone(),
                source,
            }),
            _ => Error::Addresses(crate::error::AddressError::View {
                device: self.device.clone(),
                exporter: self.exporter.clone(),
                size: self.size,
                source,
            }),
        })
    }
}

impl AsFd for DeviceView {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<DeviceView> for OwnedFd {
    fn from(view: DeviceView) -> Self {
        view.fd
    }
}
