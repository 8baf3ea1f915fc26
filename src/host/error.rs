//! Errors of host memory.

use std::io;

use dma_sg::RangeError;

use crate::exporter;
use crate::kind::{ErrorKind, readable_error};

/// Why host memory cannot be had, accessed or registered.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The memory could not be allocated.
    #[error(transparent)]
    Allocate(#[from] exporter::Error),
    /// A null pointer.
    #[error("host memory of {length} bytes at a null pointer: pass the address that its allocator returned")]
    Null {
        /// Length in bytes.
        length: u64,
    },
    /// The memory would end beyond the address space.
    #[error(
        "{length} bytes at address {address:#x} end beyond the address space: the pointer or the length is wrong"
    )]
    AddressOverflow {
        /// Address of the first byte.
        address: u64,
        /// Length in bytes.
        length: u64,
    },
    /// The range is empty, inverted, or not inside the buffer or the file.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The descriptor is not that of a file with contents.
    #[error("fd {fd} is {what}, not a regular file: map a file, a memfd, or a file of hugetlbfs")]
    NotAFile {
        /// The number of the descriptor, which is closed.
        fd: i32,
        /// What it refers to.
        what: String,
    },
    /// The kernel did not map the file.
    #[error(
        "cannot map {length} bytes at offset {offset} of the file{}", map_hint(.source)
    )]
    Map {
        /// Offset of the range in the file, in bytes.
        offset: u64,
        /// Length of the range in bytes.
        length: u64,
        /// The system call's error.
        source: io::Error,
    },
    /// The size or the mode of the file could not be read.
    #[error("cannot read the {property} of the mapped file")]
    Inspect {
        /// "size", "mode".
        property: &'static str,
        /// The system call's error.
        source: io::Error,
    },
    /// Somebody cut the mapped file short.
    #[error(
        "the mapped file now has {size} bytes, and the access ends at byte {end} of the file: map it again, or seal a memfd with F_SEAL_SHRINK"
    )]
    Truncated {
        /// Size of the file in bytes.
        size: u64,
        /// Offset in the file of the end of the access or registration.
        end: u64,
    },
    /// Write access to a file that is open for reading only, or to read-only memory of others.
    #[error(
        "writing needs a file that was opened for reading and writing, or writable memory, and this is read-only"
    )]
    ReadOnly,
    /// The memory belongs to the parent process.
    #[error(
        "the memory belongs to the parent process, and a child of fork does not have it: make a buffer in the child"
    )]
    OtherProcess,
    /// The host pages for HostMapping belong to another buffer.
    #[error("these host pages belong to another buffer: pass the backing of the same allocation")]
    ForeignBacking,
}

readable_error!(Error);

impl Error {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Null { .. }
            | Self::AddressOverflow { .. }
            | Self::Range(_)
            | Self::NotAFile { .. }
            | Self::OtherProcess
            | Self::ForeignBacking => ErrorKind::Misuse,
            Self::ReadOnly => ErrorKind::Permission,
            Self::Truncated { .. } => ErrorKind::InvalidData,
            Self::Allocate(error) => error.kind(),
            Self::Map { source, .. } | Self::Inspect { source, .. } => ErrorKind::of(source),
        }
    }
}

fn map_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EACCES) => ": open it for reading, or for reading and writing",
        Some(libc::EPERM) => ": a seal of the memfd forbids to map it for writing; open it for reading only",
        Some(libc::ENODEV) => ": its file system supports no shared mappings",
        Some(libc::ENOMEM) => ": the process is out of address space, or the pool of huge pages is empty",
        _ => "",
    }
}
