//! The one ioctl call, and the one place where a number from the kernel becomes an owned fd.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Calls `ioctl(fd, opcode, argument)`; a result of -1 becomes the errno.
///
/// # Safety
/// `argument` must be valid for whatever `opcode` makes the kernel read and write through it. The
/// size is part of the opcode, so a pointer to the type that the opcode was computed from will do,
/// unless the interface follows further pointers or sizes inside it.
pub(crate) unsafe fn ioctl<T>(
    fd: BorrowedFd<'_>,
    opcode: libc::Ioctl,
    argument: *mut T,
) -> io::Result<c_int> {
    // SAFETY: the fd is open because it is borrowed; the caller answers for the argument.
    match unsafe { libc::ioctl(fd.as_raw_fd(), opcode, argument) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Takes ownership of a file descriptor that the kernel has just created.
///
/// A negative number is EBADF: `fd` need not be trusted to have been filled in, since a foreign
/// device may accept an opcode that collides with ours and write nothing.
///
/// # Safety
/// If `fd` is not negative, nobody else may own it.
pub(crate) unsafe fn own(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: not -1, checked above; the caller says that it is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
