//! Errors of lists, pages and pagemap.

use std::fmt;
use std::io;

use crate::{Iova, RangeError};

/// The result of functions on lists and pages.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a list, a mapping, or the pages behind it were refused.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A range does not fit, or a run is empty.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// iova + length does not fit in 64 bits.
    #[error("iova {iova} plus {length} bytes does not fit in 64 bits: choose a lower iova")]
    IovaOverflow {
        /// The chosen iova.
        iova: Iova,
        /// Length of the range in bytes.
        length: u64,
    },
    /// The end of a run does not fit in 64 bits.
    #[error("{length} bytes at address {addr:#x} end beyond 64 bits: check the source of this run")]
    AddressOverflow {
        /// First address of the run, before any translation.
        addr: u64,
        /// Length of the run in bytes.
        length: u64,
    },
    /// The total length of a list does not fit in 64 bits.
    #[error("{total} bytes plus {length} more do not fit in 64 bits: check the lengths of the runs")]
    TotalOverflow {
        /// Bytes in the list so far.
        total: u64,
        /// Bytes of the next run.
        length: u64,
    },
    /// No supported page size fits the list.
    #[error(
        "no page size of the bitmap {supported:#x} is at most {alignment} bytes, the largest that the list and the iova allow: choose an iova congruent to the addresses, or support smaller pages"
    )]
    NoPageSize {
        /// The supported sizes; bit n stands for 2^n bytes.
        supported: u64,
        /// The largest page size that fits, in bytes.
        alignment: u64,
    },
    /// The page size is not a power of two, or too large for the list.
    #[error(
        "the page size {page_size} does not fit: use a power of two of at most {alignment} bytes, such as best_page_size returns"
    )]
    InvalidPageSize {
        /// The refused size in bytes.
        page_size: u64,
        /// The largest page size that fits, in bytes.
        alignment: u64,
    },
    /// A limit that no segment or element can meet.
    #[error(
        "{limit} = {value:#x} is invalid: a segment must hold a page, a work request a byte, and a boundary mask must be 2^n - 1"
    )]
    InvalidLimit {
        /// Name of the limit.
        limit: &'static str,
        /// Its value.
        value: u64,
    },
    /// The IOVA space has no free part of this size.
    #[error(
        "no free part of the IOVA space holds {length} bytes at a multiple of {alignment} (largest: {largest} bytes): unmap something, or enlarge the space"
    )]
    IovaExhausted {
        /// Requested bytes.
        length: u64,
        /// Alignment of every mapping, in bytes.
        alignment: u64,
        /// Length of the largest free part in bytes.
        largest: u64,
    },
    /// The range is not a mapping of this IOVA space.
    #[error(
        "{length} bytes at iova {iova} are not a mapping of this IOVA space: unmap each mapping once, and whole"
    )]
    IovaNotMapped {
        /// First iova of the range.
        iova: Iova,
        /// Length of the range in bytes.
        length: u64,
    },
    /// The kernel hides page frame numbers from this process.
    #[error(
        "the kernel hides page frame numbers from this process: run it with CAP_SYS_ADMIN in the initial user namespace (as root, outside containers)"
    )]
    FramesHidden,
    /// pagemap shows no page behind an address.
    #[error(
        "no page is behind {address:#x}: is it mapped? A mapping of a dma-buf or of device memory never shows pages; look at the memory behind it (a udmabuf's memfds), or at a device's view"
    )]
    NoFrame {
        /// Virtual address of the page.
        address: u64,
        /// Why the kernel could not fault the page in.
        source: io::Error,
    },
    /// pagemap ends before the range does.
    #[error("/proc/self/pagemap ends at {address:#x}: the range reaches beyond this process's address space")]
    PagemapTruncated {
        /// Virtual address of the first page without an entry.
        address: u64,
    },
    /// pagemap cannot be opened or read.
    #[error(
        "cannot {operation} /proc/self/pagemap{}", pagemap_hint(.source)
    )]
    Pagemap {
        /// "open" or "read".
        operation: &'static str,
        /// The kernel's errno.
        source: io::Error,
    },
}

fn pagemap_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOENT) => ": mount /proc, and use a kernel with CONFIG_PROC_PAGE_MONITOR",
        _ => "",
    }
}

impl fmt::Debug for Error {
    /// The message and its causes, so that `fn main() -> Result<…>` prints them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_chain(self, f)
    }
}

impl Error {
    /// The errno, if a system call failed.
    pub fn errno(&self) -> Option<i32> {
        errno(self)
    }
}

/// The errno of the first cause that is an I/O error.
pub(crate) fn errno(error: &dyn std::error::Error) -> Option<i32> {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.filter_map(|cause| cause.downcast_ref::<io::Error>()).next()?.raw_os_error()
}

/// Writes the message of an error and of its causes, one per line.
pub(crate) fn write_chain(error: &dyn std::error::Error, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "{error}")?;
    for cause in std::iter::successors(error.source(), |&cause| cause.source()) {
        write!(f, "\n  caused by: {cause}")?;
    }
    Ok(())
}
