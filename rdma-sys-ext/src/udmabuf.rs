//! Dma-bufs over the pages of memfds: `linux/udmabuf.h`.
//!
//! `device` is `/dev/udmabuf`, opened for reading. A memfd must have `F_SEAL_SHRINK` and must not have
//! `F_SEAL_WRITE`. The kernel pins its pages for the life of the buffer. Two module parameters limit a
//! request, both inclusive: `size_limit_mb` (64 by default, per buffer) and `list_limit` (1024 by
//! default); see `/sys/module/udmabuf/parameters`.

use crate::ioctl::{ioctl, own};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// The new descriptor is close-on-exec.
#[doc(alias = "UDMABUF_FLAGS_CLOEXEC")]
pub const FLAGS_CLOEXEC: u32 = 0x01;

/// Argument of [`IOCTL_CREATE`].
#[doc(alias = "udmabuf_create")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Create {
    /// The memfd.
    pub memfd: u32,
    /// [`FLAGS_CLOEXEC`] or 0; the kernel ignores other bits.
    pub flags: u32,
    /// Offset in the memfd in bytes, a multiple of the page size.
    pub offset: u64,
    /// Bytes, a multiple of the page size.
    pub size: u64,
}

/// The fixed part of the argument of [`IOCTL_CREATE_LIST`]; `count` [`ListItem`]s follow it.
#[doc(alias = "udmabuf_create_list")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListHeader {
    /// [`FLAGS_CLOEXEC`] or 0.
    pub flags: u32,
    /// Number of items.
    pub count: u32,
}

/// One range of a buffer made by [`create_list`].
#[doc(alias = "udmabuf_create_item")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListItem {
    /// The memfd.
    pub memfd: u32,
    /// Zero.
    pub pad: u32,
    /// Offset in the memfd in bytes, a multiple of the page size.
    pub offset: u64,
    /// Bytes, a multiple of the page size.
    pub size: u64,
}

/// Opcode of [`create`].
#[doc(alias = "UDMABUF_CREATE")]
pub const IOCTL_CREATE: libc::Ioctl = libc::_IOW::<Create>(b'u' as u32, 0x42);
/// Opcode of [`create_list`].
#[doc(alias = "UDMABUF_CREATE_LIST")]
pub const IOCTL_CREATE_LIST: libc::Ioctl = libc::_IOW::<ListHeader>(b'u' as u32, 0x43);

/// Makes a dma-buf of `size` bytes of a memfd, starting at `offset`.
///
/// # Errors
/// - EINVAL: `offset` or `size` not a multiple of the page size; `size` 0, past the end of the memfd
///   or over `size_limit_mb`; the seals are wrong.
/// - EBADFD (77, not EBADF): `memfd` is neither a memfd nor a file of tmpfs or hugetlbfs.
/// - ENOTTY: `device` is not `/dev/udmabuf`.
/// - ENOMEM, EMFILE, ENFILE.
///
/// Kernel: `udmabuf_create` in `drivers/dma-buf/udmabuf.c`.
#[doc(alias = "UDMABUF_CREATE")]
pub fn create(
    device: BorrowedFd<'_>,
    memfd: BorrowedFd<'_>,
    offset: u64,
    size: u64,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut request = Create { memfd: memfd.as_raw_fd() as u32, flags, offset, size };
    // SAFETY: the kernel reads one Create, the type of the opcode, and writes nothing.
    let fd = unsafe { ioctl(device, IOCTL_CREATE, &raw mut request) }?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    unsafe { own(fd) }
}

/// Makes one dma-buf of several ranges `(memfd, offset, size)`, in that order, without gaps.
///
/// The limits of [`create`] apply to each range, and `size_limit_mb` to their sum.
///
/// # Errors
/// As [`create`], and EINVAL if there is no range or more than `list_limit`.
///
/// Kernel: `udmabuf_create` in `drivers/dma-buf/udmabuf.c`.
#[doc(alias = "UDMABUF_CREATE_LIST")]
pub fn create_list(
    device: BorrowedFd<'_>,
    items: &[(BorrowedFd<'_>, u64, u64)],
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut request = encode_list(items, flags)?;
    // SAFETY: the kernel reads a ListHeader and `count` items, and writes nothing. encode_list wrote
    // exactly those, back to back, into memory aligned for both.
    let fd = unsafe { ioctl(device, IOCTL_CREATE_LIST, request.as_mut_ptr()) }?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    unsafe { own(fd) }
}

/// A [`ListHeader`] and its [`ListItem`]s as `u64` words, which gives them the right alignment.
fn encode_list(items: &[(BorrowedFd<'_>, u64, u64)], flags: u32) -> io::Result<Vec<u64>> {
    const ITEM_WORDS: usize = size_of::<ListItem>() / size_of::<u64>();
    let Ok(count) = u32::try_from(items.len()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    let mut words = Vec::with_capacity(1 + ITEM_WORDS * items.len());
    // SAFETY: both have the same size (checked by transmute), no padding, and any bits are a u64.
    words.push(unsafe { std::mem::transmute::<ListHeader, u64>(ListHeader { flags, count }) });
    for &(memfd, offset, size) in items {
        let item = ListItem { memfd: memfd.as_raw_fd() as u32, pad: 0, offset, size };
        // SAFETY: as above.
        words.extend(unsafe { std::mem::transmute::<ListItem, [u64; ITEM_WORDS]>(item) });
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioctl::fake::{self, errno, null};
    use std::os::fd::{AsFd, IntoRawFd};

    #[test]
    fn another_device_is_enotty() {
        let null = null();
        let fd = null.as_fd();
        assert_eq!(errno(create(fd, fd, 0, 4096, 0)), Some(libc::ENOTTY));
        let items = [(fd, 0, 4096)];
        assert_eq!(errno(create_list(fd, &items, 0)), Some(libc::ENOTTY));
    }

    #[test]
    fn the_result_of_the_ioctl_is_owned() {
        let (null, new) = (null(), null().into_raw_fd());
        let memfd = null.as_raw_fd() as u32;
        let kernel = move |opcode, argument: *mut u8| {
            assert_eq!(opcode, IOCTL_CREATE);
            let expected = Create { memfd, flags: FLAGS_CLOEXEC, offset: 8192, size: 4096 };
            // SAFETY: `create` passes a Create.
            assert_eq!(unsafe { argument.cast::<Create>().read() }, expected);
            Ok(new)
        };
        let owned = fake::with(kernel, || create(null.as_fd(), null.as_fd(), 8192, 4096, FLAGS_CLOEXEC));
        assert_eq!(owned.unwrap().as_raw_fd(), new);
    }

    #[test]
    fn a_list_is_a_header_and_its_items_without_gaps() {
        let (a, b) = (null(), null());
        let items = [(a.as_fd(), 0x1000, 0x2000), (b.as_fd(), 0x3000, 0x4000)];
        let bytes: Vec<u8> =
            encode_list(&items, FLAGS_CLOEXEC).unwrap().iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut expected = Vec::new();
        expected.extend(1u32.to_ne_bytes());
        expected.extend(2u32.to_ne_bytes());
        for (file, offset, size) in [(&a, 0x1000u64, 0x2000u64), (&b, 0x3000, 0x4000)] {
            expected.extend(file.as_raw_fd().to_ne_bytes());
            expected.extend([0; 4]);
            expected.extend(offset.to_ne_bytes());
            expected.extend(size.to_ne_bytes());
        }
        assert_eq!(bytes, expected);
    }
}
