//! PCI devices in user space, and their memory as dma-bufs: `linux/vfio.h`.
//!
//! A device belongs to an IOMMU group. Open `/dev/vfio/vfio` (a container) and `/dev/vfio/N` (the group),
//! put the group into the container and give the container an IOMMU. Then the group returns the device's
//! descriptor.

use crate::ioctl::{ioctl, own};
use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

const TYPE: u32 = b';' as u32;
const BASE: u32 = 100;

/// The version that [`api_version`] must return.
#[doc(alias = "VFIO_API_VERSION")]
pub const API_VERSION: i32 = 0;
/// The IOMMU model for [`set_iommu`] that every x86 IOMMU supports.
#[doc(alias = "VFIO_TYPE1v2_IOMMU")]
pub const TYPE1V2_IOMMU: u64 = 3;
/// Flag of [`GroupStatus`]: every device of the group is bound to VFIO or to no driver.
#[doc(alias = "VFIO_GROUP_FLAGS_VIABLE")]
pub const GROUP_FLAGS_VIABLE: u32 = 1 << 0;
/// Get a feature.
#[doc(alias = "VFIO_DEVICE_FEATURE_GET")]
pub const FEATURE_GET: u32 = 1 << 16;
/// Ask whether the device has a feature.
#[doc(alias = "VFIO_DEVICE_FEATURE_PROBE")]
pub const FEATURE_PROBE: u32 = 1 << 18;
/// Feature: ranges of a BAR as a dma-buf. Since Linux 6.19.
#[doc(alias = "VFIO_DEVICE_FEATURE_DMA_BUF")]
pub const FEATURE_DMA_BUF: u32 = 11;

/// Opcode of [`api_version`].
#[doc(alias = "VFIO_GET_API_VERSION")]
pub const IOCTL_GET_API_VERSION: libc::Ioctl = libc::_IO(TYPE, BASE);
/// Opcode of [`set_iommu`].
#[doc(alias = "VFIO_SET_IOMMU")]
pub const IOCTL_SET_IOMMU: libc::Ioctl = libc::_IO(TYPE, BASE + 2);
/// Opcode of [`group_status`].
#[doc(alias = "VFIO_GROUP_GET_STATUS")]
pub const IOCTL_GROUP_GET_STATUS: libc::Ioctl = libc::_IO(TYPE, BASE + 3);
/// Opcode of [`set_container`].
#[doc(alias = "VFIO_GROUP_SET_CONTAINER")]
pub const IOCTL_GROUP_SET_CONTAINER: libc::Ioctl = libc::_IO(TYPE, BASE + 4);
/// Opcode of [`device`].
#[doc(alias = "VFIO_GROUP_GET_DEVICE_FD")]
pub const IOCTL_GROUP_GET_DEVICE_FD: libc::Ioctl = libc::_IO(TYPE, BASE + 6);
/// Opcode of [`dma_buf`] and [`has_dma_buf`].
#[doc(alias = "VFIO_DEVICE_FEATURE")]
pub const IOCTL_DEVICE_FEATURE: libc::Ioctl = libc::_IO(TYPE, BASE + 17);

/// Argument of [`IOCTL_GROUP_GET_STATUS`].
#[doc(alias = "vfio_group_status")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupStatus {
    /// Size of this struct.
    pub argsz: u32,
    /// `GROUP_FLAGS_` bits.
    pub flags: u32,
}

/// Header of the argument of [`IOCTL_DEVICE_FEATURE`]; the feature's data follows it.
#[doc(alias = "vfio_device_feature")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// Size of this struct and the data.
    pub argsz: u32,
    /// The feature and a `FEATURE_` action.
    pub flags: u32,
}

/// Header of the data of [`FEATURE_DMA_BUF`]; the ranges follow it.
#[doc(alias = "vfio_device_feature_dma_buf")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaBufHeader {
    /// The BAR's number.
    pub region_index: u32,
    /// `O_CLOEXEC` and an access mode for the new descriptor.
    pub open_flags: u32,
    /// Zero.
    pub flags: u32,
    /// Number of ranges that follow.
    pub nr_ranges: u32,
}

/// A range of a BAR.
#[doc(alias = "vfio_region_dma_range")]
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct DmaRange {
    /// Offset from the start of the BAR in bytes, a multiple of the page size.
    pub offset: u64,
    /// Bytes, a multiple of the page size.
    pub length: u64,
}

/// The version of a container's interface: [`API_VERSION`].
///
/// # Errors
/// ENOTTY: not a container.
#[doc(alias = "VFIO_GET_API_VERSION")]
pub fn api_version(container: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the opcode takes no argument.
    unsafe { ioctl(container, IOCTL_GET_API_VERSION, std::ptr::null_mut::<u8>()) }
}

/// Gives a container that has a group an IOMMU of the given model.
///
/// # Errors
/// - ENODEV: no such IOMMU.
/// - ENOTTY, EINVAL: the container has no group, or already has an IOMMU.
#[doc(alias = "VFIO_SET_IOMMU")]
pub fn set_iommu(container: BorrowedFd<'_>, model: u64) -> io::Result<()> {
    // SAFETY: the kernel takes the argument as a number and does not dereference it.
    unsafe { ioctl(container, IOCTL_SET_IOMMU, std::ptr::without_provenance_mut::<u8>(model as usize)) }?;
    Ok(())
}

/// The `GROUP_FLAGS_` bits of a group.
///
/// # Errors
/// ENOTTY: not a group.
#[doc(alias = "VFIO_GROUP_GET_STATUS")]
pub fn group_status(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = GroupStatus { argsz: size_of::<GroupStatus>() as u32, flags: 0 };
    // SAFETY: the kernel reads and writes one GroupStatus, whose size is in `argsz`.
    unsafe { ioctl(group, IOCTL_GROUP_GET_STATUS, &raw mut status) }?;
    Ok(status.flags)
}

/// Puts a group into a container.
///
/// # Errors
/// - EINVAL: the group is already in a container, or another driver has one of its devices.
/// - EBADF: not a container.
#[doc(alias = "VFIO_GROUP_SET_CONTAINER")]
pub fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let mut fd: c_int = container.as_raw_fd();
    // SAFETY: the kernel reads one int.
    unsafe { ioctl(group, IOCTL_GROUP_SET_CONTAINER, &raw mut fd) }?;
    Ok(())
}

/// Opens a device of a group by its name, a PCI address.
///
/// # Errors
/// - ENODEV: no such device in the group.
/// - EINVAL: the group's container has no IOMMU.
#[doc(alias = "VFIO_GROUP_GET_DEVICE_FD")]
pub fn device(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let name: *const c_char = name.as_ptr();
    // SAFETY: the kernel reads the name up to its NUL.
    let fd = unsafe { ioctl(group, IOCTL_GROUP_GET_DEVICE_FD, name.cast_mut()) }?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    unsafe { own(fd) }
}

/// Succeeds if the kernel and the device's driver can make dma-bufs of BARs.
///
/// # Errors
/// - ENOTTY: the kernel cannot.
/// - EOPNOTSUPP: the driver cannot.
#[doc(alias = "VFIO_DEVICE_FEATURE_PROBE")]
pub fn has_dma_buf(device: BorrowedFd<'_>) -> io::Result<()> {
    let flags = FEATURE_PROBE | FEATURE_GET | FEATURE_DMA_BUF;
    let mut feature = Feature { argsz: size_of::<Feature>() as u32, flags };
    // SAFETY: the kernel reads one Feature, whose size is in `argsz`, and writes nothing.
    unsafe { ioctl(device, IOCTL_DEVICE_FEATURE, &raw mut feature) }?;
    Ok(())
}

/// Makes a dma-buf of ranges of a BAR, concatenated in order.
///
/// # Errors
/// - ENOTTY: a kernel before 6.19, or CONFIG_VFIO_PCI_DMABUF is off.
/// - EOPNOTSUPP: the driver does not support it.
/// - ENODEV: no BAR with this index, the ROM, or a BAR without memory.
/// - EINVAL: no range; a range is empty, not page-aligned or outside the BAR; or `open_flags` is wrong.
/// - EMFILE, ENFILE, ENOMEM.
///
/// Kernel: `vfio_pci_core_feature_dma_buf` in `drivers/vfio/pci/vfio_pci_dmabuf.c`.
#[doc(alias = "VFIO_DEVICE_FEATURE_DMA_BUF")]
pub fn dma_buf(
    device: BorrowedFd<'_>,
    region_index: u32,
    open_flags: u32,
    ranges: &[DmaRange],
) -> io::Result<OwnedFd> {
    let too_many = || io::Error::from_raw_os_error(libc::EINVAL);
    let size = size_of::<Feature>() + size_of::<DmaBufHeader>() + size_of_val(ranges);
    let argsz = u32::try_from(size).map_err(|_| too_many())?;
    let header = DmaBufHeader { region_index, open_flags, flags: 0, nr_ranges: ranges.len() as u32 };
    // u64 words give the argument its alignment of 8 bytes.
    let mut argument = vec![0_u64; size.div_ceil(8)];
    let start = argument.as_mut_ptr();
    // SAFETY: the vector has room for the two headers and the ranges, each at a multiple of 8 bytes, and
    // nothing else refers to it.
    unsafe {
        start.cast::<Feature>().write(Feature { argsz, flags: FEATURE_GET | FEATURE_DMA_BUF });
        start.add(1).cast::<DmaBufHeader>().write(header);
        let room = start.add(3).cast::<DmaRange>();
        room.copy_from_nonoverlapping(ranges.as_ptr(), ranges.len());
    }
    // SAFETY: the kernel reads `argsz` bytes, all of which are in the vector.
    let fd = unsafe { ioctl(device, IOCTL_DEVICE_FEATURE, start) }?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    unsafe { own(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioctl::fake::{self, errno, null};
    use std::os::fd::{AsFd, IntoRawFd};

    #[test]
    fn another_device_is_enotty() {
        let null = null();
        assert_eq!(errno(api_version(null.as_fd())), Some(libc::ENOTTY));
        assert_eq!(errno(group_status(null.as_fd())), Some(libc::ENOTTY));
        assert_eq!(errno(device(null.as_fd(), c"0000:00:00.0")), Some(libc::ENOTTY));
        assert_eq!(errno(dma_buf(null.as_fd(), 0, 0, &[DmaRange::default()])), Some(libc::ENOTTY));
    }

    #[test]
    fn ranges_follow_the_header() {
        let new = null().into_raw_fd();
        let kernel = move |opcode, argument: *mut u8| {
            assert_eq!(opcode, IOCTL_DEVICE_FEATURE);
            // SAFETY: `dma_buf` passes a Feature, a DmaBufHeader and two ranges: 56 bytes.
            let words = unsafe { std::slice::from_raw_parts(argument.cast::<u32>(), 14) };
            assert_eq!(words[..6], [56, FEATURE_GET | FEATURE_DMA_BUF, 2, 0x8_0002, 0, 2]);
            assert_eq!(words[6..], [0x1000, 0, 0x2000, 0, 0, 1, 0x3000, 0]);
            Ok(new)
        };
        let ranges =
            [DmaRange { offset: 0x1000, length: 0x2000 }, DmaRange { offset: 1 << 32, length: 0x3000 }];
        let owned = fake::with(kernel, || dma_buf(null().as_fd(), 2, 0x8_0002, &ranges));
        assert_eq!(owned.unwrap().as_raw_fd(), new);
    }
}
