//! Why a dma-buf, its mapping or its fences refused an operation.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use dma_sg::RangeError;

use super::CpuAccess;
use crate::kind::{ErrorKind, readable_error};

/// Why an operation on a [`DmaBuf`](super::DmaBuf) or its [`Mapping`](super::Mapping) failed.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The descriptor number is not open in this process (`EBADF`).
    #[error(
        "fd {fd} is not open in this process: pass the descriptor that the exporter returned, before it is closed"
    )]
    BadFd {
        /// The number that was passed.
        fd: RawFd,
    },
    /// The descriptor is open, but it is not a dma-buf.
    #[error("fd {fd} is not a dma-buf but {what}: export the buffer first (docs/exporters.md says how)")]
    NotDmaBuf {
        /// The number that was passed.
        fd: RawFd,
        /// What the descriptor refers to, from /proc and stat(2).
        what: String,
    },
    /// The kernel did not report a property of the dma-buf, or did not duplicate its descriptor.
    #[error("cannot read the dma-buf's {property}")]
    Inspect {
        /// Which property: "size", "exporter name", …
        property: &'static str,
        /// The system call's error.
        source: io::Error,
    },
    /// The name is too long for a dma-buf or contains a NUL.
    #[error("{name:?} cannot be a dma-buf's name: use at most 31 bytes and no NUL")]
    InvalidName {
        /// The name that was passed.
        name: String,
    },
    /// `DMA_BUF_SET_NAME` failed.
    #[error("cannot name the dma-buf {name:?}")]
    SetName {
        /// The name that was passed.
        name: String,
        /// The system call's error.
        source: io::Error,
    },
    /// The exporter does not let the CPU map the buffer, or the process has no address space left.
    #[error(
        "cannot map {size} bytes of exporter {exporter:?} for the CPU: check the contents over RDMA or with the exporter's own tools"
    )]
    Map {
        /// The exporter's name.
        exporter: String,
        /// Size of the buffer in bytes.
        size: u64,
        /// The system call's error.
        source: io::Error,
    },
    /// `DMA_BUF_IOCTL_SYNC` failed.
    #[error("cannot {edge} CPU access ({access:?}) to the dma-buf")]
    Sync {
        /// "start" or "end".
        edge: &'static str,
        /// The access that was requested.
        access: CpuAccess,
        /// The system call's error.
        source: io::Error,
    },
    /// The CPU access was begun for the other direction.
    #[error("this CPU access was begun for {access:?}: begin it for the direction you copy in")]
    CpuAccessDirection {
        /// What the access was begun for.
        access: CpuAccess,
    },
    /// The buffer's fences did not signal in time.
    #[error(
        "the buffer's fences did not signal within {timeout:?}: its device is still working on it, or hangs"
    )]
    FenceTimeout {
        /// The timeout that was passed.
        timeout: Duration,
    },
    /// Waiting for, exporting or importing fences failed.
    #[error("cannot {operation} the dma-buf")]
    Fence {
        /// "wait for the fences of", "export the fences of", "add a fence to".
        operation: &'static str,
        /// The system call's error.
        source: io::Error,
    },
    /// The descriptor is read-only, and writing was requested. The kernel does not check this for a device.
    #[error(
        "{access} needs a writable dma-buf, and this fd is read-only: export it read-write (DRM: DRM_RDWR at the first export; GBM: PRIME before gbm_bo_get_fd)"
    )]
    ReadOnly {
        /// "CPU write access", "capturing".
        access: &'static str,
    },
    /// The range is empty or not inside the buffer.
    #[error(transparent)]
    Range(#[from] RangeError),
}

readable_error!(Error);

impl Error {
    /// What a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::BadFd { .. }
            | Self::NotDmaBuf { .. }
            | Self::InvalidName { .. }
            | Self::CpuAccessDirection { .. }
            | Self::Range(_) => ErrorKind::Misuse,
            Self::ReadOnly { .. } => ErrorKind::Permission,
            // Exporters without a mapping return a variety of errnos.
            Self::Map { source, .. } => match ErrorKind::of(source) {
                kind @ (ErrorKind::OutOfMemory | ErrorKind::Permission | ErrorKind::Limit) => kind,
                _ => ErrorKind::Unsupported,
            },
            Self::FenceTimeout { .. } => ErrorKind::Timeout,
            Self::Inspect { source, .. }
            | Self::SetName { source, .. }
            | Self::Sync { source, .. }
            | Self::Fence { source, .. } => ErrorKind::of(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_mapping_is_unsupported_unless_memory_is_short() {
        let map = |errno| Error::Map {
            exporter: "vram".into(),
            size: 4096,
            source: io::Error::from_raw_os_error(errno),
        };
        assert_eq!(map(libc::ENODEV).kind(), ErrorKind::Unsupported);
        assert_eq!(map(libc::EINVAL).kind(), ErrorKind::Unsupported);
        assert_eq!(map(libc::ENOMEM).kind(), ErrorKind::OutOfMemory);
        assert_eq!(map(libc::EINVAL).errno(), Some(libc::EINVAL));
    }
}
