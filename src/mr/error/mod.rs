//! Errors of registration and deregistration.

mod slice;

use std::io;

use dma_sg::{Iova, RangeError};

pub use slice::SliceError;

use super::{Access, MemoryRegion, Path, Refusal, RegionSet};
use crate::exporter::PointerError;
use crate::kind::{ENOTSUPP, ErrorKind, readable_error};
use crate::verbs;
use crate::{dmabuf, host};

/// Why a range of a buffer could not be registered, or its description is invalid.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The range is empty, inverted, or not inside the buffer.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The iova plus the length does not fit in 64 bits.
    #[error("iova {iova} plus {length} bytes does not fit in 64 bits: choose a lower iova")]
    IovaOverflow {
        /// The chosen iova.
        iova: Iova,
        /// Length of the range in bytes.
        length: u64,
    },
    /// The iova and the offset differ modulo the page size.
    #[error("iova {iova} and offset {offset:#x} must be equal modulo the page size of {page_size}: in that page, {} fits", nearest_congruent(.iova.0, *.offset, *.page_size))]
    IovaNotCongruent {
        /// The chosen iova.
        iova: Iova,
        /// Offset of the range in the buffer, in bytes. In host memory that does not begin at a page it counts from
        /// that page.
        offset: u64,
        /// The page size in bytes.
        page_size: u64,
    },
    /// Access flags that the kernel permits for no dma-buf and this library for no host memory, or that the device does
    /// not support.
    #[error("{}", not_permitted(*.flags, .device.as_deref()))]
    AccessNotPermitted {
        /// The flags that are not permitted.
        flags: Access,
        /// The device that does not support them; `None` for flags that are permitted on no device.
        device: Option<String>,
        /// The errno of the kernel or the provider, if the device was asked.
        source: Option<io::Error>,
    },
    /// REMOTE_WRITE or REMOTE_ATOMIC without LOCAL_WRITE, which libibverbs and the kernel require.
    #[error("{flags:?} lacks LOCAL_WRITE: REMOTE_WRITE and REMOTE_ATOMIC need it")]
    LocalWriteMissing {
        /// The requested flags.
        flags: Access,
    },
    /// Write access to a dma-buf with a read-only descriptor, which the kernel does not check, to a file that is open
    /// for reading only, or to read-only memory of others.
    #[error(
        "{access:?} needs a writable buffer and this one is read-only: export the dma-buf read-write (DRM: DRM_RDWR at the first export; GBM: PRIME before gbm_bo_get_fd), open the file for reading and writing, or pass writable memory"
    )]
    ReadOnlyBuffer {
        /// The requested write flags.
        access: Access,
    },
    /// No registration path can be tried.
    #[error("no registration path can be tried: {reason}")]
    NoPath {
        /// Why, and what to allow or pass.
        reason: &'static str,
    },
    /// Host memory that this process does not have, or host pages of another buffer.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// The device imports no dma-bufs through the allowed paths.
    #[error("device {device} cannot import a dma-buf ({}): use a NIC, driver and kernel that can (docs/kernel-support.md), or opt in to HostMapping for a buffer whose host pages you own", list(.refusals))]
    ImportUnsupported {
        /// Name of the device.
        device: String,
        /// The refusal of each path.
        refusals: Vec<Refusal>,
    },
    /// The device imports dma-bufs, but this memory has no struct pages.
    #[error(
        "device {device} imports dma-bufs, but the memory of exporter {exporter:?} has no struct pages (a PCI BAR or VRAM): use a NIC that does peer-to-peer DMA, or a buffer in system memory"
    )]
    MemoryWithoutPages {
        /// Name of the device.
        device: String,
        /// The exporter's name.
        exporter: String,
        /// The errno of the kernel.
        source: io::Error,
    },
    /// A registration of host memory would exceed RLIMIT_MEMLOCK.
    #[error(
        "{path} pins {needed} bytes in addition to the {pinned} bytes already pinned, and RLIMIT_MEMLOCK is {limit} bytes: raise it (ulimit -l, LimitMEMLOCK=), or import a dma-buf, which is not charged"
    )]
    MemlockLimit {
        /// `HostMapping` or `HostMemory`.
        path: Path,
        /// Bytes that this process has pinned already: `VmPin` in /proc/self/status.
        pinned: u64,
        /// The soft limit in bytes.
        limit: u64,
        /// Bytes that this registration pins.
        needed: u64,
        /// The errno of the provider.
        source: io::Error,
    },
    /// The kernel or the provider refused the registration.
    #[error("{device} refused to register {length} bytes at offset {offset} of {memory} through {path}{}", refused_hint(.source))]
    Refused {
        /// Name of the device.
        device: String,
        /// The path that refused.
        path: Path,
        /// What it refused: `a "udmabuf" dma-buf`, `host memory`.
        memory: String,
        /// Offset of the range in the buffer, in bytes.
        offset: u64,
        /// Length of the range in bytes.
        length: u64,
        /// The errno of the kernel or the provider.
        source: io::Error,
    },
    /// The limits of the cache leave no room beside the entries in use.
    #[error(
        "no room in the cache for {length} bytes: {used_entries} of {max_entries} entries and {used_bytes} of {max_bytes} bytes are in use; drop handles, or raise the limits"
    )]
    CacheFull {
        /// Length of the request in bytes.
        length: u64,
        /// Bytes of the entries in use and of the registrations in progress.
        used_bytes: u64,
        /// The limit in bytes.
        max_bytes: u64,
        /// Number of entries in use and of registrations in progress.
        used_entries: usize,
        /// The limit of entries.
        max_entries: usize,
    },
    /// The device's limits, a protection domain or a DMA handle.
    #[error(transparent)]
    Verbs(#[from] verbs::Error),
    /// The pointer, or the runtime that allocated its memory.
    #[error(transparent)]
    Pointer(#[from] PointerError),
}

/// Why a set of regions could not be registered.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum SetError {
    /// No buffer or no protection domain was given.
    #[error("there is nothing to register: pass at least one {what}")]
    NothingToRegister {
        /// "buffer" or "protection domain".
        what: &'static str,
    },
    /// A chunk size that is not a multiple of the page size, or too large for the device.
    #[error(
        "chunk size {size} is invalid: choose a multiple of the page size of {page_size} bytes, at most {largest}"
    )]
    ChunkSize {
        /// The requested chunk size in bytes.
        size: u64,
        /// The page size in bytes.
        page_size: u64,
        /// The device's largest region in bytes, rounded down to whole pages.
        largest: u64,
    },
    /// The total length of the buffers does not fit in 64 bits.
    #[error(
        "{total} bytes plus a buffer of {length} do not fit in 64 bits: register fewer buffers in one set"
    )]
    TotalOverflow {
        /// Bytes of the buffers before.
        total: u64,
        /// Bytes of the next buffer.
        length: u64,
    },
    /// The range, the iova, the access flags or the device's limits, checked before anything is registered.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The kernel or the provider refused a chunk. All other chunks were deregistered.
    #[error(
        "{device}: chunk {chunk} of {chunks} was refused ({length} bytes at offset {offset}), and the other chunks were deregistered"
    )]
    Chunk {
        /// Name of the device.
        device: String,
        /// Index of the chunk, from 0.
        chunk: usize,
        /// Number of chunks.
        chunks: usize,
        /// Offset of the chunk in the buffers, in bytes.
        offset: u64,
        /// Length of the chunk in bytes.
        length: u64,
        /// Why the registration failed.
        source: Box<RegisterError>,
    },
    /// The descriptor of a chunk could not be duplicated. All other chunks were deregistered.
    #[error(
        "cannot duplicate the descriptor for chunk {chunk} of {chunks}; the other chunks were deregistered"
    )]
    Descriptor {
        /// Index of the chunk, from 0.
        chunk: usize,
        /// Number of chunks.
        chunks: usize,
        /// Why, for example `EMFILE`.
        source: dmabuf::Error,
    },
}

/// Why memory stays registered. The error returns the handle.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum DeregisterError {
    /// Other handles of the region live: clones, slices, transfers in flight, a cache, a set.
    #[error(
        "the region with lkey {:#x} has {handles} other handles: drop them, and the last one deregisters it", .region.lkey().0
    )]
    InUse {
        /// The region, still registered.
        region: MemoryRegion,
        /// Number of other handles.
        handles: usize,
    },
    /// Other handles of the set live: clones, slices, transfers in flight.
    #[error("the set has {handles} other handles: drop them, and the last one deregisters it")]
    SetInUse {
        /// The set, still registered.
        set: RegionSet,
        /// Number of other handles.
        handles: usize,
    },
    /// The kernel or the provider refused to deregister the region.
    #[error("cannot deregister the region with lkey {:#x}{}", .region.lkey().0, deregister_hint(.source))]
    Refused {
        /// The region, still registered.
        region: MemoryRegion,
        /// The errno of the kernel or the provider.
        source: io::Error,
    },
    /// Some chunks of a set stay registered. The others were deregistered.
    #[error("{} of {chunks} chunks of the set stay registered", .others.len() + 1)]
    Chunks {
        /// The error of the first of them, with its region.
        source: Box<DeregisterError>,
        /// The errors of the others.
        others: Vec<DeregisterError>,
        /// Number of chunks of the set.
        chunks: usize,
    },
}

/// Why a self-check failed.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum SelfCheckError {
    /// The queue pair or the scratch page for the check could not be created, or the device cannot post its transfers,
    /// such as a READ. This says nothing about the memory.
    #[error(transparent)]
    Setup(verbs::Error),
    /// A transfer failed.
    #[error(
        "{device} registered the region through {path}, but {step} its byte {offset} failed: the device does not reach this memory (try another path, or memory near the device)"
    )]
    Transfer {
        /// Name of the device.
        device: String,
        /// The path that registered the region.
        path: Path,
        /// "reading" or "writing".
        step: &'static str,
        /// Offset of the byte in the region.
        offset: u64,
        /// The failure, with the completion's status.
        source: Box<verbs::Error>,
    },
    /// The transfer succeeded, but the device accessed other memory.
    #[error(
        "{device} registered the region through {path}, but byte {offset} read {read:#04x} after {wrote:#04x} was written: the device accesses other memory (a wrong offset, or a stale mapping)"
    )]
    Mismatch {
        /// Name of the device.
        device: String,
        /// The path that registered the region.
        path: Path,
        /// Offset of the byte in the region.
        offset: u64,
        /// The byte written.
        wrote: u8,
        /// The byte read back.
        read: u8,
    },
}

readable_error!(RegisterError);
readable_error!(SetError);
readable_error!(DeregisterError);
readable_error!(SelfCheckError);

impl From<verbs::Error> for SetError {
    fn from(error: verbs::Error) -> Self {
        RegisterError::from(error).into()
    }
}

impl RegisterError {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Range(_)
            | Self::IovaOverflow { .. }
            | Self::IovaNotCongruent { .. }
            | Self::AccessNotPermitted { device: None, .. }
            | Self::LocalWriteMissing { .. }
            | Self::NoPath { .. } => ErrorKind::Misuse,
            Self::ReadOnlyBuffer { .. } => ErrorKind::Permission,
            Self::AccessNotPermitted { .. }
            | Self::ImportUnsupported { .. }
            | Self::MemoryWithoutPages { .. } => ErrorKind::Unsupported,
            Self::MemlockLimit { .. } | Self::CacheFull { .. } => ErrorKind::Limit,
            Self::Refused { source, .. } => ErrorKind::of(source),
            Self::Host(error) => error.kind(),
            Self::Verbs(error) => error.kind(),
            Self::Pointer(error) => error.kind(),
        }
    }
}

impl SetError {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NothingToRegister { .. } | Self::ChunkSize { .. } | Self::TotalOverflow { .. } => {
                ErrorKind::Misuse
            }
            Self::Register(error) => error.kind(),
            Self::Chunk { source, .. } => source.kind(),
            Self::Descriptor { source, .. } => source.kind(),
        }
    }
}

impl DeregisterError {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InUse { .. } | Self::SetInUse { .. } => ErrorKind::Busy,
            Self::Refused { source, .. } => ErrorKind::of(source),
            Self::Chunks { source, .. } => source.kind(),
        }
    }
}

impl SelfCheckError {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Setup(error) => error.kind(),
            Self::Transfer { .. } | Self::Mismatch { .. } => ErrorKind::Unsupported,
        }
    }
}

fn not_permitted(flags: Access, device: Option<&str>) -> String {
    match device {
        None => format!(
            "the access flags {flags:?} are not permitted: use only LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ, REMOTE_ATOMIC and RELAXED_ORDERING"
        ),
        Some(device) => format!(
            "device {device} imports dma-bufs, but does not support the access flags {flags:?}: register without them, or use a NIC that supports them"
        ),
    }
}

fn refused_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(ENOTSUPP) => {
            " (errno 524 is the kernel's internal ENOTSUPP: the exporter's driver does not support peer-to-peer mapping for this device)"
        }
        Some(libc::ENOMEM) => {
            " (no memory for the page list, the device is out of regions, or RLIMIT_MEMLOCK in a user namespace)"
        }
        Some(libc::EINVAL) => {
            " (a limit of the device: compare length and page size with max_mr_size and page_size_cap)"
        }
        Some(libc::EOPNOTSUPP) => " (the device does not support one of the access flags)",
        Some(libc::EFAULT) => {
            " (the kernel cannot pin these pages: a file of a file system with write-back, such as ext4, is registered for reading only, since Linux 6.5; memory of a device or a dma-buf's mapping is not registered by address)"
        }
        Some(libc::EIO | libc::ENODEV) => " (the device was removed or reset)",
        _ => "",
    }
}

fn deregister_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::EINVAL) => ": another object still uses it, such as a memory window",
        _ => "",
    }
}

fn list(refusals: &[Refusal]) -> String {
    refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn nearest_congruent(iova: u64, offset: u64, page_size: u64) -> Iova {
    let base = iova - iova % page_size;
    Iova(base.saturating_add(offset % page_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incongruent_iova_gets_the_nearest_congruent_one() {
        let error =
            RegisterError::IovaNotCongruent { iova: Iova(0x1_0000_0000), offset: 0x12, page_size: 4096 };
        assert!(error.to_string().contains("in that page, 0x100000012 fits"), "{error}");
    }

    #[test]
    fn the_message_never_repeats_its_source_and_the_errno_is_kept() {
        let source = io::Error::from_raw_os_error(libc::EIO);
        let error = RegisterError::Refused {
            device: "rxe0".into(),
            path: Path::Uverbs,
            memory: "system".into(),
            offset: 0,
            length: 1,
            source,
        };
        let chunk = SetError::Chunk {
            device: "rxe0".into(),
            chunk: 1,
            chunks: 2,
            offset: 0,
            length: 1,
            source: Box::new(error),
        };
        assert_eq!((chunk.errno(), chunk.kind()), (Some(libc::EIO), ErrorKind::DeviceGone));
        assert!(!chunk.to_string().contains("Input/output"));
        assert_eq!(format!("{chunk:?}").matches("Input/output").count(), 1);
        assert_eq!(RegisterError::NoPath { reason: "" }.errno(), None);
    }
}
