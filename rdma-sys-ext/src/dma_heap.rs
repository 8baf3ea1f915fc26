//! Dma-bufs from the heaps in `/dev/dma_heap`: `linux/dma-heap.h`.

use crate::ioctl::{ioctl, own};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Argument of [`IOCTL_ALLOC`].
#[doc(alias = "dma_heap_allocation_data")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocationData {
    /// Bytes; the kernel rounds up to whole pages.
    pub len: u64,
    /// In: 0. Out: the new dma-buf.
    pub fd: u32,
    /// `O_CLOEXEC` and one of `O_RDONLY`, `O_WRONLY`, `O_RDWR`.
    pub fd_flags: u32,
    /// Zero: no heap has flags yet.
    pub heap_flags: u64,
}

/// Opcode of [`alloc`].
#[doc(alias = "DMA_HEAP_IOCTL_ALLOC")]
pub const IOCTL_ALLOC: libc::Ioctl = libc::_IOWR::<AllocationData>(b'H' as u32, 0x0);

/// Allocates a dma-buf of `len` bytes, rounded up to whole pages, all zero.
///
/// `heap` is a file in `/dev/dma_heap`, opened for reading. `fd_flags` is an access mode, optionally
/// with `O_CLOEXEC`; mapping the buffer for writing needs `O_RDWR`. Some heaps allocate and pin all
/// memory in this call, so a large `len` can take long or fail.
///
/// # Errors
/// - EINVAL: `len` is 0, or a flag is not permitted.
/// - ENOMEM: not enough memory, or `len` is more than the heap gives in one buffer.
/// - ENOTTY or EINVAL: `heap` is not a dma-heap.
/// - EMFILE, ENFILE.
///
/// Kernel: `dma_heap_ioctl_allocate` in `drivers/dma-buf/dma-heap.c`.
#[doc(alias = "DMA_HEAP_IOCTL_ALLOC")]
pub fn alloc(heap: BorrowedFd<'_>, len: u64, fd_flags: u32) -> io::Result<OwnedFd> {
    let mut request = AllocationData { len, fd: 0, fd_flags, heap_flags: 0 };
    // SAFETY: the kernel reads and writes one AllocationData, the type of the opcode.
    unsafe { ioctl(heap, IOCTL_ALLOC, &raw mut request) }?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    unsafe { own(request.fd as i32) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioctl::fake::{self, errno, null};
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};

    #[test]
    fn another_device_is_enotty() {
        assert_eq!(errno(alloc(null().as_fd(), 4096, 0)), Some(libc::ENOTTY));
    }

    #[test]
    fn the_allocated_buffer_is_owned() {
        let new = null().into_raw_fd();
        let kernel = move |opcode, argument: *mut u8| {
            assert_eq!(opcode, IOCTL_ALLOC);
            // SAFETY: `alloc` passes an AllocationData.
            let request = unsafe { &mut *argument.cast::<AllocationData>() };
            assert_eq!((request.len, request.fd), (4096, 0));
            assert_eq!((request.fd_flags, request.heap_flags), (2, 0));
            request.fd = new as u32;
            Ok(0)
        };
        let owned = fake::with(kernel, || alloc(null().as_fd(), 4096, libc::O_RDWR as u32));
        assert_eq!(owned.unwrap().as_raw_fd(), new);
    }
}
