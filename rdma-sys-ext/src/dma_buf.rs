//! Operations on a dma-buf's file descriptor: `linux/dma-buf.h`.
//!
//! On a file that is not a dma-buf the kernel returns ENOTTY, but success does not prove that a descriptor is a
//! dma-buf. Compare `f_type` of `fstatfs` with [`MAGIC`] for that.

use crate::ioctl::{ioctl, own};
use std::ffi::{CStr, c_long};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// `f_type` that `statfs` returns for a dma-buf: "DMAB". In `linux/magic.h` since Linux 5.3.
#[doc(alias = "DMA_BUF_MAGIC")]
pub const MAGIC: c_long = 0x444d_4142;

/// Maximum length of a name in bytes, including the NUL: a name has at most 31 characters.
#[doc(alias = "DMA_BUF_NAME_LEN")]
pub const NAME_LEN: usize = 32;

/// The CPU reads through its mapping, or the fence concerns reads.
#[doc(alias = "DMA_BUF_SYNC_READ")]
pub const SYNC_READ: u64 = 1 << 0;
/// The CPU writes through its mapping, or the fence concerns writes.
#[doc(alias = "DMA_BUF_SYNC_WRITE")]
pub const SYNC_WRITE: u64 = 1 << 1;
/// [`SYNC_READ`] and [`SYNC_WRITE`].
#[doc(alias = "DMA_BUF_SYNC_RW")]
pub const SYNC_RW: u64 = SYNC_READ | SYNC_WRITE;
/// Begins a bracket of CPU accesses. Its value is 0: a bracket begins where [`SYNC_END`] is not set.
#[doc(alias = "DMA_BUF_SYNC_START")]
pub const SYNC_START: u64 = 0;
/// Ends a bracket of CPU accesses.
#[doc(alias = "DMA_BUF_SYNC_END")]
pub const SYNC_END: u64 = 1 << 2;

/// Argument of [`IOCTL_SYNC`].
#[doc(alias = "dma_buf_sync")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SyncRequest {
    /// `SYNC_*` bits.
    pub flags: u64,
}

/// Argument of [`IOCTL_EXPORT_SYNC_FILE`].
#[doc(alias = "dma_buf_export_sync_file")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportSyncFile {
    /// [`SYNC_READ`], [`SYNC_WRITE`] or both.
    pub flags: u32,
    /// Out: the new sync file.
    pub fd: i32,
}

/// Argument of [`IOCTL_IMPORT_SYNC_FILE`].
#[doc(alias = "dma_buf_import_sync_file")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportSyncFile {
    /// [`SYNC_READ`], [`SYNC_WRITE`] or both.
    pub flags: u32,
    /// The sync file whose fences are added to the buffer.
    pub fd: i32,
}

const BASE: u32 = b'b' as u32;

/// Opcode of [`sync`].
#[doc(alias = "DMA_BUF_IOCTL_SYNC")]
pub const IOCTL_SYNC: libc::Ioctl = libc::_IOW::<SyncRequest>(BASE, 0);
/// Opcode of [`set_name`]. The argument is the string itself. The size in the opcode (8, a 64-bit
/// pointer) only distinguishes this variant from `DMA_BUF_SET_NAME_A`.
#[doc(alias = "DMA_BUF_SET_NAME_B")]
pub const SET_NAME_B: libc::Ioctl = libc::_IOW::<u64>(BASE, 1);
/// Opcode of [`export_sync_file`].
#[doc(alias = "DMA_BUF_IOCTL_EXPORT_SYNC_FILE")]
pub const IOCTL_EXPORT_SYNC_FILE: libc::Ioctl = libc::_IOWR::<ExportSyncFile>(BASE, 2);
/// Opcode of [`import_sync_file`].
#[doc(alias = "DMA_BUF_IOCTL_IMPORT_SYNC_FILE")]
pub const IOCTL_IMPORT_SYNC_FILE: libc::Ioctl = libc::_IOW::<ImportSyncFile>(BASE, 3);

/// Begins or ends a bracket of CPU accesses through a mapping of the buffer.
///
/// `flags` is [`SYNC_START`] or [`SYNC_END`] with [`SYNC_READ`], [`SYNC_WRITE`] or [`SYNC_RW`]. End a
/// bracket with the access bits that began it. The call makes the CPU's view coherent with the
/// device's. At the start it also waits for the fences that the exporter knows of. It does not lock the
/// memory.
///
/// The call repeats while the kernel returns EINTR or EAGAIN: the exporter has done nothing by then.
///
/// # Errors
/// - ENOTTY: not a dma-buf.
/// - EINVAL: no access bit, or a bit outside [`SYNC_RW`] and [`SYNC_END`].
/// - Any errno of the exporter's `begin_cpu_access` or `end_cpu_access`.
///
/// Kernel: `dma_buf_ioctl` in `drivers/dma-buf/dma-buf.c`.
#[doc(alias = "DMA_BUF_IOCTL_SYNC")]
pub fn sync(fd: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    let mut request = SyncRequest { flags };
    loop {
        // SAFETY: the kernel reads one SyncRequest, the type of the opcode, and writes nothing.
        match unsafe { ioctl(fd, IOCTL_SYNC, &raw mut request) } {
            Ok(_) => return Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Names the buffer. `/proc/PID/fdinfo` and `dma_buf/bufinfo` in debugfs show the name.
///
/// The name belongs to the buffer, not to the descriptor: every holder of the buffer sees it and may
/// change it.
///
/// # Errors
/// - EINVAL: more than 31 bytes without the NUL ([`NAME_LEN`]).
/// - ENOTTY: not a dma-buf, or a kernel before 5.3.
/// - EBUSY: a device is attached, on kernels that then refuse a name.
///
/// Kernel: `dma_buf_set_name` in `drivers/dma-buf/dma-buf.c`.
#[doc(alias = "DMA_BUF_SET_NAME")]
pub fn set_name(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: the kernel reads at most NAME_LEN bytes and stops at the NUL, which a CStr has. It writes
    // nothing, so casting away const is sound.
    unsafe { ioctl(fd, SET_NAME_B, name.as_ptr().cast_mut()) }.map(drop)
}

/// Takes a snapshot of the buffer's fences as a sync file.
///
/// With [`SYNC_READ`] alone the sync file signals when all writers are done (like POLLIN on the
/// dma-buf), with [`SYNC_WRITE`] when all readers and writers are done (like POLLOUT). A buffer without
/// fences gives a sync file that has already signaled. The descriptor is close-on-exec.
///
/// # Errors
/// - EINVAL: no access bit, or one outside [`SYNC_RW`].
/// - ENOTTY: not a dma-buf, a kernel before 6.0, or one without CONFIG_SYNC_FILE.
/// - EMFILE, ENFILE, ENOMEM.
///
/// Kernel: `dma_buf_export_sync_file` in `drivers/dma-buf/dma-buf.c`.
#[doc(alias = "DMA_BUF_IOCTL_EXPORT_SYNC_FILE")]
pub fn export_sync_file(fd: BorrowedFd<'_>, flags: u32) -> io::Result<OwnedFd> {
    let mut request = ExportSyncFile { flags, fd: -1 };
    // SAFETY: the kernel reads and writes one ExportSyncFile, the type of the opcode.
    unsafe { ioctl(fd, IOCTL_EXPORT_SYNC_FILE, &raw mut request) }?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    unsafe { own(request.fd) }
}

/// Adds the fences of `sync_file` to the buffer, so that all users of the buffer wait for them.
///
/// With [`SYNC_WRITE`] all later accesses wait for them, with [`SYNC_READ`] alone only later writes.
/// The kernel keeps its own references, so you may close `sync_file` afterwards.
///
/// # Errors
/// - EINVAL: no access bit, one outside [`SYNC_RW`], or `sync_file` is not a sync file.
/// - ENOTTY: not a dma-buf, a kernel before 6.0, or one without CONFIG_SYNC_FILE.
///
/// Kernel: `dma_buf_import_sync_file` in `drivers/dma-buf/dma-buf.c`.
#[doc(alias = "DMA_BUF_IOCTL_IMPORT_SYNC_FILE")]
pub fn import_sync_file(fd: BorrowedFd<'_>, flags: u32, sync_file: BorrowedFd<'_>) -> io::Result<()> {
    let mut request = ImportSyncFile { flags, fd: sync_file.as_raw_fd() };
    // SAFETY: the kernel reads one ImportSyncFile, the type of the opcode, and writes nothing.
    unsafe { ioctl(fd, IOCTL_IMPORT_SYNC_FILE, &raw mut request) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioctl::fake::{self, errno, null};
    use std::os::fd::{AsFd, IntoRawFd};

    #[test]
    fn anything_else_is_enotty() {
        let null = null();
        let fd = null.as_fd();
        assert_eq!(errno(sync(fd, SYNC_START | SYNC_RW)), Some(libc::ENOTTY));
        assert_eq!(errno(set_name(fd, c"name")), Some(libc::ENOTTY));
        assert_eq!(errno(export_sync_file(fd, 3)), Some(libc::ENOTTY));
        assert_eq!(errno(import_sync_file(fd, 3, fd)), Some(libc::ENOTTY));
    }

    #[test]
    fn sync_is_repeated_for_eintr_and_eagain_only() {
        let mut answers = [Err(libc::EINTR), Err(libc::EAGAIN), Ok(0), Err(libc::EIO)].into_iter();
        let kernel = move |opcode, argument: *mut u8| {
            assert_eq!(opcode, IOCTL_SYNC);
            // SAFETY: `sync` passes a SyncRequest.
            let request = unsafe { argument.cast::<SyncRequest>().read() };
            assert_eq!(request.flags, 0b110);
            answers.next().unwrap()
        };
        let null = null();
        fake::with(kernel, || {
            sync(null.as_fd(), SYNC_WRITE | SYNC_END).unwrap();
            let refused = sync(null.as_fd(), SYNC_WRITE | SYNC_END);
            assert_eq!(errno(refused), Some(libc::EIO));
        });
    }

    #[test]
    fn a_name_is_passed_as_it_is() {
        let name = c"twelve bytes";
        let address = name.as_ptr().addr();
        let kernel = move |opcode, argument: *mut u8| {
            assert_eq!((opcode, argument.addr()), (SET_NAME_B, address));
            Ok(0)
        };
        fake::with(kernel, || set_name(null().as_fd(), name)).unwrap();
    }

    #[test]
    fn the_exported_sync_file_is_owned() {
        let new = null().into_raw_fd();
        let kernel = move |opcode, argument: *mut u8| {
            assert_eq!(opcode, IOCTL_EXPORT_SYNC_FILE);
            // SAFETY: `export_sync_file` passes an ExportSyncFile.
            let request = unsafe { &mut *argument.cast::<ExportSyncFile>() };
            assert_eq!((request.flags, request.fd), (1, -1));
            request.fd = new;
            Ok(0)
        };
        let owned = fake::with(kernel, || export_sync_file(null().as_fd(), SYNC_READ as u32));
        assert_eq!(owned.unwrap().as_raw_fd(), new);
    }
}
