//! The memory of a PCI device, through VFIO: ranges of a BAR as a dma-buf, since Linux 6.19.
//!
//! Another device can be given such a buffer to reach the BAR peer-to-peer. It is no memory of the
//! system: it cannot be mapped from the dma-buf, and a device that copies with the CPU, such as
//! soft-RoCE, refuses it.
//!
//! Source: `drivers/vfio/pci/vfio_pci_dmabuf.c`, `Documentation/driver-api/vfio.rst`.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rdma_sys_ext::vfio as sys;

use crate::dmabuf::DmaBuf;
use crate::error::VfioError;
use crate::pci::{Bar, PciAddress, PciDevice, Sysfs};
use crate::umem::{check_range, page_size};
use crate::{Error, Result};

/// The driver that hands devices to user space.
const DRIVER: &str = "vfio-pci";

/// Regions of a device after the BARs: the expansion ROM, the configuration space, …
const FIRST_OTHER_REGION: u8 = 6;

/// A PCI device that VFIO gave to this process.
///
/// Dropping it closes the device: the kernel then revokes its dma-bufs, so that nobody can map them any
/// more. They are revoked, too, while memory decoding is off.
#[derive(Debug)]
pub struct VfioDevice {
    address: PciAddress,
    // Closed in this order, which the kernel does not insist on.
    device: OwnedFd,
    _group: Option<Group>,
}

/// The way to a device that was opened here.
#[derive(Debug)]
struct Group {
    _group: File,
    _container: File,
}

impl VfioDevice {
    /// Opens a device that is bound to `vfio-pci`, through its IOMMU group and a container of its own.
    ///
    /// For a device that this process has already, see [`from_fd`](Self::from_fd): a group can be opened
    /// once.
    ///
    /// # Errors
    /// - [`AddressError::NotInSysfs`](crate::error::AddressError::NotInSysfs): no such device.
    /// - [`VfioError::NotBound`], [`VfioError::NoIommu`], [`VfioError::GroupNotViable`]: what VFIO wants
    ///   of a device that it gives out.
    /// - [`Error::ExporterMissing`], [`Error::ExporterNotPermitted`]: `/dev/vfio/vfio`.
    /// - [`VfioError::Open`]: `EBUSY` when another process has the group, `EACCES` when it is not
    ///   permitted, otherwise as the kernel says.
    #[doc(alias("VFIO_GROUP_SET_CONTAINER", "VFIO_SET_IOMMU", "VFIO_GROUP_GET_DEVICE_FD"))]
    pub fn open(address: PciAddress) -> Result<Self> {
        let device = Sysfs::new().device(address)?;
        let driver = driver_of(&device);
        if driver.as_deref() != Some(DRIVER) {
            return Err(VfioError::NotBound { device: address, driver }.into());
        }
        let group = device.iommu().ok_or(VfioError::NoIommu { device: address })?.group;
        let failed = |operation| {
            move |source: io::Error| Error::from(VfioError::Open { device: address, operation, source })
        };

        let missing = "load the module vfio_pci, with vfio_iommu_type1 for the IOMMU";
        let container = super::open_device("/dev/vfio/vfio".as_ref(), missing, "run as root")?;
        if sys::api_version(container.as_fd()).map_err(failed("ask for VFIO's version"))? != sys::API_VERSION
        {
            let other = io::Error::from_raw_os_error(libc::EPROTO);
            return Err(failed("speak VFIO's version")(other));
        }
        let node = File::options().read(true).write(true).open(format!("/dev/vfio/{group}"));
        let node = node.map_err(failed("open its IOMMU group"))?;
        let status = sys::group_status(node.as_fd()).map_err(failed("look at its IOMMU group"))?;
        if status & sys::GROUP_FLAGS_VIABLE == 0 {
            return Err(VfioError::GroupNotViable { device: address, group }.into());
        }
        sys::set_container(node.as_fd(), container.as_fd()).map_err(failed("set a container up"))?;
        sys::set_iommu(container.as_fd(), sys::TYPE1V2_IOMMU).map_err(failed("set an IOMMU up"))?;
        let name = CString::new(address.to_string()).expect("an address has no NUL");
        let device = sys::device(node.as_fd(), &name).map_err(failed("get the descriptor"))?;
        let group = Group { _group: node, _container: container };
        Ok(Self { address, device, _group: Some(group) })
    }

    /// A device that this process has from VFIO by other means: a group of its own, or an iommufd.
    pub fn from_fd(device: impl Into<OwnedFd>, address: PciAddress) -> Self {
        Self { address, device: device.into(), _group: None }
    }

    /// Its address.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// All of a BAR as a dma-buf.
    ///
    /// # Errors
    /// As for [`export_ranges`](Self::export_ranges).
    pub fn export(&self, bar: u8) -> Result<DmaBuf> {
        let size = self.bar(bar)?.size;
        self.export_ranges(bar, &[(0, size)])
    }

    /// Ranges of a BAR, each an offset and a length in bytes, one after the other as a dma-buf. Both are
    /// whole pages of the system.
    ///
    /// Linux 7.3.4 cannot map more than one range for a device behind an IOMMU that translates: the
    /// importer gets `EADDRINUSE` then (`dma_buf_phys_vec_to_sgt` of `drivers/dma-buf/dma-buf-mapping.c`).
    ///
    /// # Errors
    /// - [`VfioError::Unsupported`] (`ENOTTY`, `EOPNOTSUPP`): the kernel is older, or the driver another.
    /// - [`VfioError::NotABar`], [`VfioError::BarTooSmall`],
    ///   [`AddressError::BarUnusable`](crate::error::AddressError::BarUnusable): the BAR. Its refusal is
    ///   `NotDecoding` while memory decoding is off: the kernel makes a dma-buf then, which nobody can map.
    /// - [`Error::ZeroLength`], [`Error::OutOfRange`], [`VfioError::Unaligned`]: a range, or no range.
    /// - [`Error::Export`]: anything else that the kernel answered.
    #[doc(alias = "VFIO_DEVICE_FEATURE_DMA_BUF")]
    pub fn export_ranges(&self, bar: u8, ranges: &[(u64, u64)]) -> Result<DmaBuf> {
        sys::has_dma_buf(self.device.as_fd())
            .map_err(|source| VfioError::Unsupported { device: self.address, source })?;
        let ranges = self.check(&self.bar(bar)?, ranges)?;
        let size = ranges.iter().fold(0_u64, |sum, range| sum.saturating_add(range.length));
        let _span = crate::observe::exporting(|| self.name(), size);
        let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
        let fd = sys::dma_buf(self.device.as_fd(), bar.into(), flags, &ranges).map_err(|source| {
            let (exporter, operation) = (self.name(), "export a BAR");
            Error::Export { exporter, operation, size, source }
        })?;
        DmaBuf::from_fd(fd)
    }

    fn name(&self) -> String {
        format!("vfio-pci {}", self.address)
    }

    /// A BAR that is there, on, and not smaller than a page.
    fn bar(&self, bar: u8) -> Result<Bar> {
        let (device, page_size) = (self.address, page_size());
        if bar >= FIRST_OTHER_REGION {
            return Err(VfioError::NotABar { device, bar }.into());
        }
        let found = Sysfs::new().device(device)?.bar(bar)?;
        if found.size < page_size {
            return Err(VfioError::BarTooSmall { device, bar, size: found.size, page_size }.into());
        }
        Ok(found)
    }

    fn check(&self, bar: &Bar, ranges: &[(u64, u64)]) -> Result<Vec<sys::DmaRange>> {
        if ranges.is_empty() {
            return Err(Error::ZeroLength { offset: 0 });
        }
        let page_size = page_size();
        let checked = ranges.iter().map(|&(offset, length)| {
            check_range(offset, length, bar.size)?;
            if (offset | length) % page_size != 0 {
                let (device, bar) = (self.address, bar.index);
                return Err(VfioError::Unaligned { device, bar, offset, length, page_size }.into());
            }
            Ok(sys::DmaRange { offset, length })
        });
        checked.collect()
    }
}

/// The device's descriptor, for what else VFIO does with a device.
impl AsFd for VfioDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

fn driver_of(device: &PciDevice) -> Option<String> {
    let link = fs::read_link(device.path().join("driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}
