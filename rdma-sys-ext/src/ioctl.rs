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
    #[cfg(test)]
    if let Some(answer) = fake::answer(opcode, argument.cast()) {
        return answer;
    }
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

/// Lets a unit test answer the ioctls of its thread in the kernel's place.
#[cfg(test)]
pub(crate) mod fake {
    use std::cell::RefCell;
    use std::ffi::c_int;
    use std::io;

    /// Gets opcode and argument, returns the ioctl's result or its errno.
    type Kernel = Box<dyn FnMut(libc::Ioctl, *mut u8) -> Result<c_int, c_int>>;

    thread_local!(static KERNEL: RefCell<Option<Kernel>> = const { RefCell::new(None) });

    pub(super) fn answer(opcode: libc::Ioctl, argument: *mut u8) -> Option<io::Result<c_int>> {
        KERNEL.with_borrow_mut(|kernel| {
            let answer = kernel.as_mut()?(opcode, argument);
            Some(answer.map_err(io::Error::from_raw_os_error))
        })
    }

    /// Runs `test` with `kernel` in place.
    pub(crate) fn with<R>(
        kernel: impl FnMut(libc::Ioctl, *mut u8) -> Result<c_int, c_int> + 'static,
        test: impl FnOnce() -> R,
    ) -> R {
        KERNEL.set(Some(Box::new(kernel)));
        let result = test();
        KERNEL.set(None);
        result
    }

    /// A descriptor that no ioctl here knows: `/dev/null`.
    pub(crate) fn null() -> std::fs::File {
        std::fs::File::open("/dev/null").unwrap()
    }

    /// The errno of a call that must fail.
    pub(crate) fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Option<c_int> {
        result.unwrap_err().raw_os_error()
    }
}

#[cfg(test)]
mod tests {
    use super::{fake, own};

    #[test]
    fn a_number_that_was_not_filled_in_is_not_owned() {
        // SAFETY: -1 is nobody's.
        assert_eq!(fake::errno(unsafe { own(-1) }), Some(libc::EBADF));
    }
}
