//! The ioctls of `/dev/dma_sg`: `kernel/dma_sg/dma_sg.h`, with which `tests/dma_sg_ioctl.rs` compares this
//! file. `kernel/dma_sg/README.md` has the errnos.
//!
//! `unsafe` calls ioctl(2) with the struct that the opcode was computed from.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// No real device: the addresses are physical.
pub const DEVICE_NONE: u32 = 0;
/// A PCI device, by its address: `0000:00:02.0`.
pub const DEVICE_PCI: u32 = 1;
/// An RDMA device, by its name: `mlx5_0`.
pub const DEVICE_RDMA: u32 = 2;
/// Maximum length of a device's name in bytes, including the NUL.
pub const NAME_LEN: usize = 64;

/// Argument of [`map`].
#[repr(C)]
pub struct Map {
    /// The dma-buf.
    pub fd: i32,
    /// One of the `DEVICE_` constants.
    pub device: u32,
    /// Zero.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// The device's name, NUL-terminated.
    pub name: [u8; NAME_LEN],
}

/// One run of addresses.
#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct Entry {
    /// First address, in the device's address space.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// Argument of [`read`].
#[repr(C)]
pub struct Read {
    /// In: index of the first entry to copy.
    pub first: u64,
    /// In: entries to copy at most. Out: entries copied.
    pub count: u64,
    /// Out: entries in the list.
    pub total: u64,
    /// In: address of a buffer for `count` [`Entry`]s.
    pub entries: u64,
}

/// Opcode of [`map`].
pub const IOCTL_MAP: libc::Ioctl = libc::_IOW::<Map>(0xde, 0x00);
/// Opcode of [`read`].
pub const IOCTL_READ: libc::Ioctl = libc::_IOWR::<Read>(0xde, 0x01);

/// Maps a dma-buf for the device that `kind` (a `DEVICE_` constant) and `name` identify. `node` is
/// `/dev/dma_sg`. A name that is too long is `EINVAL`.
pub fn map(node: BorrowedFd<'_>, dmabuf: BorrowedFd<'_>, kind: u32, name: &CStr) -> io::Result<OwnedFd> {
    let bytes = name.to_bytes();
    if bytes.len() >= NAME_LEN {
        return Err(Errno::EINVAL.into());
    }
    let mut request =
        Map { fd: dmabuf.as_raw_fd(), device: kind, flags: 0, reserved: 0, name: [0; NAME_LEN] };
    request.name[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the kernel reads one Map, the type of the opcode, and writes nothing.
    let view = Errno::result(unsafe { libc::ioctl(node.as_raw_fd(), IOCTL_MAP, &raw const request) })?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(view) })
}

/// Copies the list, starting at entry `first`, into `entries`. Returns the number of entries copied and the
/// length of the list. The kernel copies fewer at the end of the list, and never more than 2 GiB of entries.
pub fn read(view: BorrowedFd<'_>, first: u64, entries: &mut [Entry]) -> io::Result<(usize, u64)> {
    let (count, room) = (entries.len() as u64, entries.as_mut_ptr() as u64);
    let mut request = Read { first, count, total: 0, entries: room };
    // SAFETY: the kernel reads and writes one Read, the type of the opcode, and writes at most `count`
    // entries into the exclusively borrowed slice. Any bits are a valid Entry.
    Errno::result(unsafe { libc::ioctl(view.as_raw_fd(), IOCTL_READ, &raw mut request) })?;
    // Another device may accept the opcode and write any number here.
    Ok((request.count.min(count) as usize, request.total))
}
