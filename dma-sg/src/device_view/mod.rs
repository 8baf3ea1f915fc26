//! The addresses of a dma-buf as a given device sees them, from the kernel module `dma_sg`.
//!
//! A dma-buf has addresses only where it is mapped for a device, and only drivers see those. The module
//! (`kernel/dma_sg`) maps the buffer as a driver would, and root reads the list.
//!
//! ```no_run
//! use dma_sg::device_view::{DeviceView, DmaDevice};
//! # fn open() -> std::os::fd::OwnedFd { unimplemented!() }
//!
//! # fn main() -> Result<(), dma_sg::device_view::Error> {
//! let dmabuf = open(); // from any exporter
//! let view = DeviceView::new(&dmabuf, DmaDevice::Rdma("mlx5_0"))?;
//! println!("{}", view.list()?); // 6.0 GiB in 2 segments, best page size 2 MiB
//! # Ok(())
//! # }
//! ```

mod error;
mod sys;

use std::ffi::CString;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::pci::{self, PciAddress, Sysfs};
use crate::{DmaSg, DmaSgBuilder, DmaSgList};

pub use error::Error;

const NODE: &str = "/dev/dma_sg";

/// Entries per read: 1 MiB, so that reading a long list does not double its memory.
const BATCH: u64 = 1 << 16;

/// The device whose view of a buffer is requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DmaDevice<'a> {
    /// A PCI device that has a driver.
    Pci(PciAddress),
    /// An RDMA device by its name. A device that copies with the CPU, such as soft-RoCE, sees physical
    /// addresses, as [`Untranslated`](Self::Untranslated) does.
    Rdma(&'a str),
    /// A device without address translation: the list has physical addresses.
    #[doc(alias = "DMA_SG_DEVICE_NONE")]
    Untranslated,
}

impl fmt::Display for DmaDevice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => write!(f, "PCI device {address}"),
            Self::Rdma(name) => write!(f, "RDMA device {name}"),
            Self::Untranslated => f.write_str("a device without address translation"),
        }
    }
}

impl DmaDevice<'_> {
    /// The error of sysfs if the device does not exist.
    fn missing(self) -> Option<pci::Error> {
        match self {
            Self::Pci(address) => Sysfs::new().device(address).err(),
            Self::Rdma(name) => Sysfs::new().rdma_device(name).err(),
            Self::Untranslated => None,
        }
    }
}

/// A buffer mapped for a device, to read its addresses there.
///
/// The mapping, and with it the truth of the addresses, lasts until the view is dropped, with two
/// exceptions: an exporter that moves or revokes the buffer, and a device that loses its driver. Both end
/// the view; `poll(2)` then reports `POLLIN` and `POLLPRI` on its descriptor.
///
/// The view holds the buffer's memory, not the dma-buf's descriptor. Its own descriptor may be passed to
/// another process, even to an unprivileged one.
#[derive(Debug)]
pub struct DeviceView {
    fd: OwnedFd,
    device: String,
    exporter: String,
    size: u64,
}

impl DeviceView {
    /// Maps a buffer for a device.
    ///
    /// Peer-to-peer mappings are allowed, so a buffer in the memory of another PCI device has the addresses
    /// by which this device reaches it.
    ///
    /// # Errors
    /// - [`Error::ModuleMissing`] (`ENOENT`, `ENODEV`, `ENXIO`): the module is not loaded.
    /// - [`Error::NotPermitted`] (`EACCES`, `EPERM`): this process is not root, or lacks `CAP_SYS_ADMIN`.
    /// - [`Error::Device`]: the device does not exist.
    /// - [`Error::Map`]: `dmabuf` is not a dma-buf (`EINVAL`), no driver has set the device up for DMA
    ///   (`ENXIO`), its driver manages DMA by itself (`EBUSY`), the kernel would use bounce buffers
    ///   (`EADDRNOTAVAIL`), the device does not see the CPU's caches (`EOPNOTSUPP`), or the exporter refused,
    ///   with its errno.
    ///
    /// Source: `kernel/dma_sg/view.c`; `drivers/dma-buf/dma-buf.c` for the errnos of an exporter.
    #[doc(alias = "DMA_SG_IOCTL_MAP")]
    pub fn new(dmabuf: impl AsFd, device: DmaDevice<'_>) -> Result<Self, Error> {
        let dmabuf = dmabuf.as_fd();
        let (exporter, size) = describe(dmabuf);
        let refused = |source: io::Error| {
            let (device, exporter) = (device.to_string(), exporter.clone());
            Error::Map { device, exporter, size, source }
        };
        let node = File::open(NODE).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::ModuleMissing { source },
            Some(libc::EACCES | libc::EPERM) => Error::NotPermitted { source },
            _ => refused(source),
        })?;
        let (kind, name) = match device {
            DmaDevice::Pci(address) => (sys::DEVICE_PCI, address.to_string()),
            DmaDevice::Rdma(name) => (sys::DEVICE_RDMA, name.to_owned()),
            DmaDevice::Untranslated => (sys::DEVICE_NONE, String::new()),
        };
        // No device has a NUL in its name, but the part before it may name another device.
        let mapped = match CString::new(name) {
            Ok(name) => sys::map(node.as_fd(), dmabuf, kind, &name),
            Err(_) => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        };
        let fd = mapped.map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM) => Error::NotPermitted { source },
            // Either the device does not exist, or the exporter returns this errno.
            Some(libc::ENODEV | libc::EINVAL) => {
                device.missing().map_or_else(|| refused(source), Error::from)
            }
            _ => refused(source),
        })?;
        Ok(Self { fd, device: device.to_string(), exporter, size })
    }

    /// Reads the device's addresses, in the order of the buffer's bytes. Contiguous runs are merged.
    ///
    /// # Errors
    /// - [`Error::Ended`] (`ESTALE`): the addresses are no longer those of the buffer.
    /// - [`Error::Map`]: the module refused, with its errno.
    /// - [`Error::List`]: the exporter mapped nothing, or the list is invalid.
    #[doc(alias = "DMA_SG_IOCTL_READ")]
    pub fn list(&self) -> Result<DmaSgList, Error> {
        let (_, total) = self.read(0, &mut [])?;
        let mut list = DmaSgBuilder::with_capacity(total.min(BATCH) as usize);
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
        Ok(list.finish()?)
    }

    /// Whether the buffer is still mapped, so that the addresses are true.
    pub fn is_valid(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }

    fn read(&self, first: u64, entries: &mut [sys::Entry]) -> Result<(usize, u64), Error> {
        sys::read(self.fd.as_fd(), first, entries).map_err(|source| match source.raw_os_error() {
            Some(libc::ESTALE) => Error::Ended { device: self.device.clone(), source },
            _ => Error::Map {
                device: self.device.clone(),
                exporter: self.exporter.clone(),
                size: self.size,
                source,
            },
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

/// Exporter and size of a dma-buf, for messages. Nothing and 0 for what is not a dma-buf.
fn describe(dmabuf: BorrowedFd<'_>) -> (String, u64) {
    let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{}", dmabuf.as_raw_fd())).unwrap_or_default();
    let field = |key| fdinfo.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim();
    (field("exp_name:").into(), field("size:").parse().unwrap_or(0))
}
