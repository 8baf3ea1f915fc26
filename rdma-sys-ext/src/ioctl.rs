//! The only ioctl call of the crate, and the only place that turns a raw fd into an owned one.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Calls `ioctl(fd, opcode, argument)` and turns a result of -1 into the errno.
///
/// # Safety
/// `argument` must be valid for everything that the kernel reads and writes through it for `opcode`.
/// The opcode contains the size, so a pointer to the type that the opcode was computed from is enough,
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
    // SAFETY: the fd is open because it is borrowed; the caller vouches for the argument.
    match unsafe { libc::ioctl(fd.as_raw_fd(), opcode, argument) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Takes ownership of a file descriptor that the kernel has just created.
///
/// A negative `fd` gives EBADF: another device may accept an opcode that collides with ours and leave
/// `fd` as it was.
///
/// # Safety
/// If `fd` is not negative, no other code may own it.
pub(crate) unsafe fn own(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: not negative, checked above; the caller guarantees that nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets a unit test answer the ioctls of its own thread instead of the kernel.
#[cfg(test)]
pub(crate) mod fake {
    use std::cell::RefCell;
    use std::ffi::c_int;
    use std::io;

    /// Takes the opcode and the argument, returns the ioctl's result or errno.
    type Kernel = Box<dyn FnMut(libc::Ioctl, *mut u8) -> Result<c_int, c_int>>;

    thread_local!(static KERNEL: RefCell<Option<Kernel>> = const { RefCell::new(None) });

    pub(super) fn answer(opcode: libc::Ioctl, argument: *mut u8) -> Option<io::Result<c_int>> {
        KERNEL.with_borrow_mut(|kernel| {
            let answer = kernel.as_mut()?(opcode, argument);
            Some(answer.map_err(io::Error::from_raw_os_error))
        })
    }

    /// Runs `test` with `kernel` answering the ioctls of this thread.
    pub(crate) fn with<R>(
        kernel: impl FnMut(libc::Ioctl, *mut u8) -> Result<c_int, c_int> + 'static,
        test: impl FnOnce() -> R,
    ) -> R {
        KERNEL.set(Some(Box::new(kernel)));
        let result = test();
        KERNEL.set(None);
        result
    }

    /// `/dev/null`, which supports none of the ioctls here.
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
    fn an_fd_that_was_not_filled_in_is_not_owned() {
        // SAFETY: -1 is not a descriptor.
        assert_eq!(fake::errno(unsafe { own(-1) }), Some(libc::EBADF));
    }
}
