//! Common to all error types: a stable kind, the errno, and a `Debug` that prints the chain of causes.

use std::error::Error;
use std::fmt;
use std::io;

/// The kernel's internal ENOTSUPP, which some drivers leak to user space. libc has no name for it.
pub(crate) const ENOTSUPP: i32 = 524;

/// What a program can do about an error of any step.
///
/// Variants of the error types change between releases; the kind of a failure does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The arguments cannot work together: correct the program.
    Misuse,
    /// Data from outside, such as a peer's description, is damaged or inconsistent.
    InvalidData,
    /// The device, its driver, the kernel or a library lacks the operation: choose another way.
    Unsupported,
    /// A device, heap, library, address or pointer does not exist.
    NotFound,
    /// This user, or this descriptor, lacks the permission.
    Permission,
    /// A limit that an administrator or the caller can raise: descriptors, locked memory, the cache's size.
    Limit,
    /// The system or the device is out of memory.
    OutOfMemory,
    /// The object is in use: drop its other handles, then try again.
    Busy,
    /// The timeout expired.
    Timeout,
    /// The caller cancelled the operation.
    Cancelled,
    /// The peer disconnected, rejected the connection, or does not answer.
    PeerGone,
    /// The device failed, was removed, or was reset.
    DeviceGone,
    /// A transfer failed on the wire or at the peer, or the connection failed before; the message says how.
    Transport,
    /// Any other error of the system: see the errno.
    System,
}

impl ErrorKind {
    /// What to do about an error of this kind, in a sentence. The message of the error itself says more.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Misuse => "correct the arguments or the order of calls, as the message says",
            Self::InvalidData => "get the description again from the peer, and check how it was carried",
            Self::Unsupported => "choose another device, driver, kernel, library or way, as the message says",
            Self::NotFound => "check the name, the address, and that the device or library is installed",
            Self::Permission => "run as a user who may do this, or pass an object that permits it",
            Self::Limit => "raise the limit that the message names, or release what counts towards it",
            Self::OutOfMemory => "free memory, or ask for less",
            Self::Busy => "drop the other handles of the object, then try again",
            Self::Timeout => "check that the peer is alive and makes progress, or wait longer",
            Self::Cancelled => "nothing: this program cancelled it",
            Self::PeerGone => "check that the peer is alive, then connect anew",
            Self::DeviceGone => "open the device anew once it is back, or use another one",
            Self::Transport => "read the peer's error too, then create a new connection",
            Self::System => "see the errno",
        }
    }

    /// The kind of an errno without more context.
    pub(crate) fn of(source: &io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => Self::Permission,
            Some(libc::ENOMEM) => Self::OutOfMemory,
            Some(libc::EMFILE | libc::ENFILE | libc::ENOSPC) => Self::Limit,
            Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOSYS | libc::ENOTTY | ENOTSUPP) => {
                Self::Unsupported
            }
            Some(libc::ENOENT) => Self::NotFound,
            Some(libc::EBUSY) => Self::Busy,
            Some(libc::EIO | libc::ENODEV | libc::ENXIO) => Self::DeviceGone,
            Some(libc::ETIMEDOUT) => Self::Timeout,
            Some(libc::ECONNRESET | libc::ECONNREFUSED | libc::EHOSTUNREACH) => Self::PeerGone,
            _ => Self::System,
        }
    }
}

/// The errno of the first cause that is an I/O error with one.
pub(crate) fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.filter_map(|cause| cause.downcast_ref::<io::Error>()).next()?.raw_os_error()
}

/// Writes the message and then each cause on a line of its own.
pub(crate) fn write_chain(error: &(dyn Error + 'static), f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "{error}")?;
    for cause in std::iter::successors(error.source(), |&cause| cause.source()) {
        write!(f, "\n  caused by: {cause}")?;
    }
    Ok(())
}

/// Gives an error type `errno` and a `Debug` that prints the message and its causes, so that
/// `fn main() -> Result<…>` prints the text written for people. Each type defines its own `kind`.
macro_rules! readable_error {
    ($error:ty) => {
        impl $error {
            /// The errno behind this error, if a system call or a provider gave one.
            pub fn errno(&self) -> Option<i32> {
                $crate::kind::errno(self)
            }
        }

        impl std::fmt::Debug for $error {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                $crate::kind::write_chain(self, f)
            }
        }
    };
}
pub(crate) use readable_error;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(thiserror::Error)]
    #[error("cannot register")]
    struct Refused {
        source: io::Error,
    }
    readable_error!(Refused);

    #[test]
    fn debug_shows_the_message_and_its_causes() {
        let refused = Refused { source: io::Error::from_raw_os_error(libc::ENOMEM) };
        assert_eq!(refused.errno(), Some(libc::ENOMEM));
        let shown = format!("{refused:?}");
        assert!(shown.starts_with("cannot register\n  caused by: Cannot allocate memory"), "{shown}");
    }

    #[test]
    fn errnos_have_kinds() {
        let kind = |errno| ErrorKind::of(&io::Error::from_raw_os_error(errno));
        assert_eq!(kind(libc::EPERM), ErrorKind::Permission);
        assert_eq!(kind(ENOTSUPP), ErrorKind::Unsupported);
        assert_eq!(kind(libc::EINVAL), ErrorKind::System);
        assert_eq!(ErrorKind::of(&io::Error::other("no errno")), ErrorKind::System);
    }
}
