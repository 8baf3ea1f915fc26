//! Memory of a PCI device through VFIO: ranges of a BAR as a dma-buf (Linux 6.19 and later).
//!
//! Through such a buffer another device accesses the BAR peer-to-peer. The CPU cannot map the dma-buf, and a
//! device that copies with the CPU, such as soft-RoCE, refuses to register it.
//!
//! Source: `drivers/vfio/pci/vfio_pci_dmabuf.c`, `Documentation/driver-api/vfio.rst`.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::ops::RangeBounds;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dma_sg::pci::{Bar, PciAddress, PciDevice, Sysfs};
use dma_sg::{RangeError, page_size, resolve_range};
use rdma_sys_ext::vfio as sys;

use super::VfioError;
use crate::dmabuf::DmaBuf;

type Result<T> = std::result::Result<T, VfioError>;

/// The kernel driver that gives devices to user space.
const DRIVER: &str = "vfio-pci";

/// First of the regions after the BARs: the expansion ROM, the configuration space, …
const FIRST_OTHER_REGION: u8 = 6;

/// A PCI device that this process opened through VFIO.
///
/// Dropping it closes the device. The kernel then revokes its dma-bufs, so no importer can map them any more;
/// it also revokes them while memory decoding is off.
#[derive(Debug)]
pub struct VfioDevice {
    address: PciAddress,
    // Closed in this order, although the kernel accepts any.
    device: OwnedFd,
    _group: Option<Group>,
}

/// The group and container through which a device was opened.
#[derive(Debug)]
struct Group {
    _group: File,
    _container: File,
}

impl VfioDevice {
    /// Opens a device that is bound to `vfio-pci`, through its IOMMU group and a new container.
    ///
    /// A group can be opened once. If this process already has the device open, use
    /// [`from_fd`](Self::from_fd).
    ///
    /// # Errors
    /// - [`VfioError::Pci`] ([`NotInSysfs`](dma_sg::pci::Error::NotInSysfs)): no such device.
    /// - [`VfioError::NotBound`], [`VfioError::NoIommu`], [`VfioError::GroupNotViable`]: the device or its
    ///   group is not set up for VFIO.
    /// - [`VfioError::Open`]: `ENOENT` if VFIO is not loaded, `EBUSY` if another process has the group,
    ///   `EACCES` if this user may not open it; otherwise the kernel's errno.
    #[doc(alias("VFIO_GROUP_SET_CONTAINER", "VFIO_SET_IOMMU", "VFIO_GROUP_GET_DEVICE_FD"))]
    pub fn open(address: PciAddress) -> Result<Self> {
        let device = Sysfs::new().device(address)?;
        let driver = driver_of(&device);
        if driver.as_deref() != Some(DRIVER) {
            return Err(VfioError::NotBound { device: address, driver });
        }
        let group = device.iommu_group().ok_or(VfioError::NoIommu { device: address })?.number;
        let failed =
            |operation| move |source: io::Error| VfioError::Open { device: address, operation, source };

        let container = File::options().read(true).write(true).open("/dev/vfio/vfio");
        let container = container.map_err(failed("open /dev/vfio/vfio"))?;
        let version = sys::api_version(container.as_fd()).map_err(failed("read VFIO's API version"))?;
        if version != sys::API_VERSION {
            let other = io::Error::from_raw_os_error(libc::EPROTO);
            return Err(failed("use VFIO's API version")(other));
        }
        let node = File::options().read(true).write(true).open(format!("/dev/vfio/{group}"));
        let node = node.map_err(failed("open its IOMMU group"))?;
        let status = sys::group_status(node.as_fd()).map_err(failed("read the state of its IOMMU group"))?;
        if status & sys::GROUP_FLAGS_VIABLE == 0 {
            return Err(VfioError::GroupNotViable { device: address, group });
        }
        sys::set_container(node.as_fd(), container.as_fd()).map_err(failed("set up a container"))?;
        sys::set_iommu(container.as_fd(), sys::TYPE1V2_IOMMU).map_err(failed("set up an IOMMU"))?;
        let name = CString::new(address.to_string()).expect("an address has no NUL");
        let device = sys::device(node.as_fd(), &name).map_err(failed("get a device descriptor"))?;
        let group = Group { _group: node, _container: container };
        Ok(Self { address, device, _group: Some(group) })
    }

    /// Takes a VFIO device descriptor that this process opened in another way: through its own group, or an
    /// iommufd.
    pub fn from_fd(device: impl Into<OwnedFd>, address: PciAddress) -> Self {
        Self { address, device: device.into(), _group: None }
    }

    /// The device's PCI address.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Exports a byte range of a BAR as a dma-buf, `..` for the whole BAR. The range is made of whole pages of
    /// the system.
    ///
    /// # Errors
    /// As [`export_ranges`](Self::export_ranges).
    pub fn export(&self, bar: u8, range: impl RangeBounds<u64>) -> Result<DmaBuf> {
        self.export_ranges(bar, [range])
    }

    /// Exports byte ranges of a BAR, one after the other, as one dma-buf. Each range is made of whole pages
    /// of the system.
    ///
    /// Linux 7.3.4 does not map more than one range for a device behind a translating IOMMU; the importer
    /// gets `EADDRINUSE` (`dma_buf_phys_vec_to_sgt` of `drivers/dma-buf/dma-buf-mapping.c`).
    ///
    /// # Errors
    /// - [`VfioError::Unsupported`] (`ENOTTY`, `EOPNOTSUPP`): an older kernel, or another driver.
    /// - [`VfioError::NotABar`], [`VfioError::BarTooSmall`], [`VfioError::Pci`]
    ///   ([`BarUnusable`](dma_sg::pci::Error::BarUnusable)): the BAR. The last includes `NotDecoding`: while
    ///   memory decoding is off, the kernel would export a dma-buf that no importer can map.
    /// - [`VfioError::Range`], [`VfioError::Unaligned`]: a range, or there is none.
    /// - [`VfioError::Export`]: the kernel refused for another reason.
    #[doc(alias = "VFIO_DEVICE_FEATURE_DMA_BUF")]
    pub fn export_ranges<R: RangeBounds<u64>>(
        &self,
        bar: u8,
        ranges: impl IntoIterator<Item = R>,
    ) -> Result<DmaBuf> {
        sys::has_dma_buf(self.device.as_fd())
            .map_err(|source| VfioError::Unsupported { device: self.address, source })?;
        let ranges = self.check(&self.bar(bar)?, ranges)?;
        let size = ranges.iter().fold(0_u64, |sum, range| sum.saturating_add(range.length));
        let _span = crate::observe::exporting(|| self.name(), size);
        let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
        let fd = sys::dma_buf(self.device.as_fd(), bar.into(), flags, &ranges)
            .map_err(|source| VfioError::Export { device: self.address, bar, size, source })?;
        Ok(DmaBuf::from_fd(fd)?.with_device(Some(self.address)))
    }

    fn name(&self) -> String {
        format!("vfio-pci {}", self.address)
    }

    /// Finds a BAR that decodes memory and is not smaller than a page.
    fn bar(&self, bar: u8) -> Result<Bar> {
        let (device, page_size) = (self.address, page_size());
        if bar >= FIRST_OTHER_REGION {
            return Err(VfioError::NotABar { device, bar });
        }
        let found = Sysfs::new().device(device)?.bar(bar)?;
        if found.size < page_size {
            return Err(VfioError::BarTooSmall { device, bar, size: found.size, page_size });
        }
        Ok(found)
    }

    fn check<R: RangeBounds<u64>>(
        &self,
        bar: &Bar,
        ranges: impl IntoIterator<Item = R>,
    ) -> Result<Vec<sys::DmaRange>> {
        let page_size = page_size();
        let checked = ranges.into_iter().map(|range| {
            let range = resolve_range(range, bar.size)?;
            let (offset, length) = (range.start, range.end - range.start);
            if (offset | length) % page_size != 0 {
                let (device, bar) = (self.address, bar.index);
                return Err(VfioError::Unaligned { device, bar, offset, length, page_size });
            }
            Ok(sys::DmaRange { offset, length })
        });
        let checked: Vec<_> = checked.collect::<Result<_>>()?;
        if checked.is_empty() {
            return Err(RangeError::Empty { offset: 0 }.into());
        }
        Ok(checked)
    }
}

/// The device's descriptor, for other functions of VFIO.
impl AsFd for VfioDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

fn driver_of(device: &PciDevice) -> Option<String> {
    let link = fs::read_link(device.path().join("driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}
