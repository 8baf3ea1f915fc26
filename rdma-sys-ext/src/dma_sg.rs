//! A dma-buf's addresses as a device sees them: `kernel/dma_sg/dma_sg.h` of this repository.
//!
//! `device` is `/dev/dma_sg`, which the module `dma_sg` makes; opening it takes CAP_SYS_ADMIN. [`map`]
//! gives a descriptor that holds the mapping until it is closed, and [`read`] copies the list out of
//! that. `poll(2)` reports POLLIN and POLLPRI on it once the mapping has ended before its time.

use crate::ioctl::{ioctl, own};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// A device that addresses physical memory.
#[doc(alias = "DMA_SG_DEVICE_NONE")]
pub const DEVICE_NONE: u32 = 0;
/// A PCI device, by its address: `0000:00:02.0`.
#[doc(alias = "DMA_SG_DEVICE_PCI")]
pub const DEVICE_PCI: u32 = 1;
/// An RDMA device, by its name: `mlx5_0`.
#[doc(alias = "DMA_SG_DEVICE_RDMA")]
pub const DEVICE_RDMA: u32 = 2;
/// Longest name of a device with its NUL.
#[doc(alias = "DMA_SG_NAME_LEN")]
pub const NAME_LEN: usize = 64;

/// Argument of [`IOCTL_MAP`].
#[doc(alias = "dma_sg_map")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Map {
    /// The dma-buf's number.
    pub fd: i32,
    /// One of the `DEVICE_` constants.
    pub device: u32,
    /// Zero.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// The device's name, ending in NUL.
    pub name: [u8; NAME_LEN],
}

/// One run of addresses.
#[doc(alias = "dma_sg_entry")]
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First address, in the device's address space.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// Argument of [`IOCTL_READ`].
#[doc(alias = "dma_sg_read")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// In: index of the first entry wanted.
    pub first: u64,
    /// In: how many at most. Out: how many were copied.
    pub count: u64,
    /// Out: how many the list has.
    pub total: u64,
    /// In: address of room for `count` [`Entry`]s.
    pub entries: u64,
}

/// Opcode of [`map`].
#[doc(alias = "DMA_SG_IOCTL_MAP")]
pub const IOCTL_MAP: libc::Ioctl = libc::_IOW::<Map>(0xde, 0x00);
/// Opcode of [`read`].
#[doc(alias = "DMA_SG_IOCTL_READ")]
pub const IOCTL_READ: libc::Ioctl = libc::_IOWR::<Read>(0xde, 0x01);

/// Maps a dma-buf for a device, one of the `DEVICE_` constants with its name.
///
/// # Errors
/// - EPERM: no CAP_SYS_ADMIN.
/// - EBADF, EINVAL: `dmabuf` is not open, or is not a dma-buf.
/// - EINVAL: the name is too long, is no PCI address, or goes with a device that has none.
/// - ENODEV: no such device.
/// - ENXIO: no driver has set up the device for DMA.
/// - EBUSY: its driver manages DMA by itself: vfio-pci, pci-stub.
/// - EADDRNOTAVAIL: mappings for the device would be bounced (`swiotlb=force`, or a DMA mask too small).
/// - ENOMEM, EMFILE, ENFILE.
/// - whatever the exporter answers when it is asked to attach, pin or map.
/// - ENOTTY: `device` is not `/dev/dma_sg`.
#[doc(alias = "DMA_SG_IOCTL_MAP")]
pub fn map(device: BorrowedFd<'_>, dmabuf: BorrowedFd<'_>, kind: u32, name: &CStr) -> io::Result<OwnedFd> {
    let mut request =
        Map { fd: dmabuf.as_raw_fd(), device: kind, flags: 0, reserved: 0, name: [0; NAME_LEN] };
    let bytes = name.to_bytes();
    if bytes.len() >= NAME_LEN {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    request.name[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the kernel reads one Map, the type of the opcode, and writes nothing.
    let fd = unsafe { ioctl(device, IOCTL_MAP, &raw mut request) }?;
    // SAFETY: the result is the descriptor that the kernel has just created for us.
    unsafe { own(fd) }
}

/// Copies the list from entry `first` on into `entries`; returns how many were copied and how many the
/// list has. Fewer than there is room for are copied at the end of the list.
///
/// # Errors
/// - ESTALE: the mapping has ended, and what is in `entries` now is not true any more.
/// - EINVAL: `first` is past the end of the list.
/// - ENOTTY: `view` is not what [`map`] returned.
#[doc(alias = "DMA_SG_IOCTL_READ")]
pub fn read(view: BorrowedFd<'_>, first: u64, entries: &mut [Entry]) -> io::Result<(usize, u64)> {
    let (count, room) = (entries.len() as u64, entries.as_mut_ptr() as u64);
    let mut request = Read { first, count, total: 0, entries: room };
    // SAFETY: the kernel reads and writes one Read, the type of the opcode, and writes at most `count`
    // entries into the slice, which is borrowed for that and takes any bits.
    unsafe { ioctl(view, IOCTL_READ, &raw mut request) }?;
    // A foreign device may accept the opcode, and write any number here.
    Ok((request.count.min(count) as usize, request.total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioctl::fake::{self, errno, null};
    use std::os::fd::{AsFd, IntoRawFd};

    #[test]
    fn another_device_is_enotty() {
        let null = null();
        assert_eq!(errno(map(null.as_fd(), null.as_fd(), DEVICE_NONE, c"")), Some(libc::ENOTTY));
        assert_eq!(errno(read(null.as_fd(), 0, &mut [])), Some(libc::ENOTTY));
    }

    #[test]
    fn the_name_ends_in_nul_and_the_result_is_owned() {
        let (null, new) = (null(), null().into_raw_fd());
        let dmabuf = null.as_raw_fd();
        let kernel = move |opcode, argument: *mut u8| {
            assert_eq!(opcode, IOCTL_MAP);
            // SAFETY: `map` passes a Map.
            let request = unsafe { argument.cast::<Map>().read() };
            assert_eq!((request.fd, request.device, request.flags), (dmabuf, DEVICE_RDMA, 0));
            assert_eq!(request.name[..5], *b"rxe0\0");
            Ok(new)
        };
        let long = "x".repeat(NAME_LEN);
        let long = std::ffi::CString::new(long).unwrap();
        let owned = fake::with(kernel, || {
            assert_eq!(errno(map(null.as_fd(), null.as_fd(), DEVICE_RDMA, &long)), Some(libc::EINVAL));
            map(null.as_fd(), null.as_fd(), DEVICE_RDMA, c"rxe0")
        });
        assert_eq!(owned.unwrap().as_raw_fd(), new);
    }

    #[test]
    fn a_batch_is_what_the_kernel_copied() {
        let kernel = |opcode, argument: *mut u8| {
            assert_eq!(opcode, IOCTL_READ);
            // SAFETY: `read` passes a Read.
            let request = unsafe { &mut *argument.cast::<Read>() };
            assert_eq!((request.first, request.count), (5, 3));
            // SAFETY: the room is for 3 entries.
            unsafe { (request.entries as *mut Entry).write(Entry { addr: 0x1000, len: 1 << 40 }) };
            (request.count, request.total) = (1, 6);
            Ok(0)
        };
        let mut entries = [Entry::default(); 3];
        let answer = fake::with(kernel, || read(null().as_fd(), 5, &mut entries));
        assert_eq!(answer.unwrap(), (1, 6));
        assert_eq!(entries[0], Entry { addr: 0x1000, len: 1 << 40 });
    }
}
