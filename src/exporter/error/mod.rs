//! Why an exporter, a pointer's runtime or a VFIO device refused an operation.

mod pointer;
mod vfio;

use std::io;

use dma_sg::RangeError;

pub use pointer::PointerError;
pub use vfio::VfioError;

use crate::dmabuf;
use crate::kind::{ErrorKind, readable_error};

/// Why an exporter could not be opened or did not make a buffer.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The exporter's device, heap or card does not exist.
    #[error("{device} is missing: {remedy}")]
    Missing {
        /// The device node, or what was searched for.
        device: String,
        /// How to get it.
        remedy: String,
        /// The system call's error.
        source: io::Error,
    },
    /// This user may not open the exporter's device.
    #[error("no permission to open {device}: {remedy}")]
    NotPermitted {
        /// The device node.
        device: String,
        /// How to get the permission.
        remedy: String,
        /// The system call's error.
        source: io::Error,
    },
    /// The exporter's device exists, but it could not be opened or is of another kind.
    #[error("cannot use {device} as an exporter")]
    Unusable {
        /// The device node.
        device: String,
        /// The system call's error: `EMFILE`, `EBUSY`, `ENOTTY`, …
        source: io::Error,
    },
    /// No allocator makes a buffer of that size.
    #[error("a buffer cannot have {size} bytes: at most 2^63 - 1, rounded up to whole pages")]
    SizeTooLarge {
        /// Requested size in bytes.
        size: u64,
    },
    /// The huge page size is not a power of two, or is less than a page.
    #[error("no huge page has {size} bytes: /sys/kernel/mm/hugepages lists the sizes of this machine")]
    HugePageSize {
        /// Requested page size in bytes.
        size: u64,
    },
    /// The request exceeds a limit of the udmabuf module.
    #[error(
        "udmabuf permits {parameter}={value}, and {requested} {unit} were requested: raise /sys/module/udmabuf/parameters/{parameter} or request less"
    )]
    UdmabufLimit {
        /// The module's parameter: `size_limit_mb` or `list_limit`.
        parameter: &'static str,
        /// Its present value.
        value: u64,
        /// The request in the parameter's unit, rounded up.
        requested: u64,
        /// "MiB" or "ranges".
        unit: &'static str,
    },
    /// udmabuf does not accept this memfd, or this range of it.
    #[error("udmabuf cannot use the memfd: {reason}")]
    UnfitMemfd {
        /// What is wrong with the memfd and how to correct it.
        reason: String,
    },
    /// The pool has too few free huge pages.
    #[error("{size} bytes need {} free huge pages of {page_size} bytes: raise /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", .size / .page_size.max(&1), .page_size / 1024)]
    HugePages {
        /// Requested size in bytes.
        size: u64,
        /// The huge page's size in bytes.
        page_size: u64,
        /// The system call's error.
        source: io::Error,
    },
    /// The system, the cgroup or the device has too little free memory.
    #[error("{exporter} cannot allocate {requested} bytes{}", free(.available, .limit))]
    OutOfMemory {
        /// The exporter: "dma-heap system", …
        exporter: String,
        /// Requested size in bytes.
        requested: u64,
        /// Most bytes that the system (with swap), the cgroup or the device can give; `None` if the driver does
        /// not report them.
        available: Option<u64>,
        /// The file with the limit of the cgroup, if that is the reason: `/sys/fs/cgroup/…/memory.max`.
        limit: Option<String>,
    },
    /// The exporter did not make, export or fill the buffer.
    #[error("{exporter} could not {operation} ({size} bytes)")]
    Allocate {
        /// The exporter: "udmabuf", "dma-heap system", …
        exporter: String,
        /// The step that failed: "make a memfd", "export a buffer", "capture a frame", …
        operation: &'static str,
        /// Size of the buffer in bytes.
        size: u64,
        /// The system call's error.
        source: io::Error,
    },
    /// The video device cannot capture into buffers, or its format takes several buffers per frame.
    #[error("{device} cannot capture into dma-bufs: {reason}")]
    NotACapture {
        /// The device node.
        device: String,
        /// What it lacks.
        reason: &'static str,
    },
    /// A size is zero, or a range is not inside its buffer.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The new buffer's descriptor, or a buffer that was passed in.
    #[error(transparent)]
    DmaBuf(#[from] dmabuf::Error),
    /// A runtime or its memory.
    #[error(transparent)]
    Pointer(#[from] PointerError),
    /// A VFIO device.
    #[error(transparent)]
    Vfio(#[from] VfioError),
}

readable_error!(Error);

impl Error {
    /// What a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::NotPermitted { .. } => ErrorKind::Permission,
            Self::SizeTooLarge { .. }
            | Self::HugePageSize { .. }
            | Self::UnfitMemfd { .. }
            | Self::Range(_) => ErrorKind::Misuse,
            Self::UdmabufLimit { .. } | Self::HugePages { .. } => ErrorKind::Limit,
            Self::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Self::NotACapture { .. } => ErrorKind::Unsupported,
            Self::Unusable { source, .. } | Self::Allocate { source, .. } => ErrorKind::of(source),
            Self::DmaBuf(error) => error.kind(),
            Self::Pointer(error) => error.kind(),
            Self::Vfio(error) => error.kind(),
        }
    }
}

fn free(available: &Option<u64>, limit: &Option<String>) -> String {
    match (available, limit) {
        (Some(bytes), Some(file)) => {
            format!(
                " (at most {bytes} are left by {file}): request less, free some memory, or raise that limit"
            )
        }
        (Some(bytes), None) => format!(" (at most {bytes} are available): request less, or free some memory"),
        (None, _) => ": request less, or free some memory".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn nested_errors_keep_errno_message_and_kind() {
        let exhausted = io::Error::from_raw_os_error(libc::EMFILE);
        let error = Error::from(PointerError::OutOfDescriptors { runtime: "CUDA", source: exhausted });
        assert_eq!((error.errno(), error.kind()), (Some(libc::EMFILE), ErrorKind::Limit));
        assert!(error.to_string().contains("raise ulimit -n"), "{error}");
        let source = error.source().expect("the errno").to_string();
        assert!(!error.to_string().contains(&source), "{error} repeats {source}");
    }

    #[test]
    fn too_little_memory_says_how_much_there_is_if_that_is_known() {
        let error = |available, limit| {
            let exporter = "CUDA device 0".into();
            Error::OutOfMemory { exporter, requested: 1 << 40, available, limit }.to_string()
        };
        let message = |available| error(available, None);
        let known = "CUDA device 0 cannot allocate 1099511627776 bytes (at most 4096 are available): request less, or free some memory";
        assert_eq!(message(Some(4096)), known);
        assert_eq!(message(None), known.replace(" (at most 4096 are available)", ""));
        let limited = error(Some(4096), Some("/sys/fs/cgroup/a/memory.max".into()));
        assert!(limited.contains("(at most 4096 are left by /sys/fs/cgroup/a/memory.max)"), "{limited}");
    }
}
