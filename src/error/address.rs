//! What refuses a list of addresses: the list's own checks, pages, PCI and a device's view.

use std::io;

use super::text::view_hint;
use crate::pci::{BarRefusal, PciAddress};
use crate::umem::Iova;

/// Why a list of addresses, or what it is read from, was refused; [`Error::Addresses`](crate::Error)
/// holds it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    // -- lists of runs ------------------------------------------------------------------------
    /// A run whose end does not fit in 64 bits.
    #[error("{length} bytes at address {addr:#x} end beyond 64 bits: check where the run comes from")]
    AddressOverflow {
        /// Where the run begins, before any translation.
        addr: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// A list longer than 64 bits count.
    #[error("{length} more bytes after {total} do not fit in 64 bits: no buffer is that long")]
    TotalOverflow {
        /// Bytes before.
        total: u64,
        /// Bytes that were to follow.
        length: u64,
    },
    /// None of the page sizes fits the list.
    #[error(
        "of the page sizes {supported:#x} (one bit each) none is at most {alignment} bytes, the most that the list and the iova allow: choose an iova congruent to the addresses, or add smaller sizes"
    )]
    NoPageSize {
        /// The sizes that were offered, bit n for 2^n bytes.
        supported: u64,
        /// The largest that would fit, in bytes.
        alignment: u64,
    },
    /// Something that is no page size here.
    #[error(
        "{page_size} bytes is no page size here: it must be a power of two and at most {alignment} bytes (best_page_size finds it)"
    )]
    InvalidPageSize {
        /// What was given, in bytes.
        page_size: u64,
        /// The largest that would do, in bytes.
        alignment: u64,
    },
    /// A limit that nothing can be cut to.
    #[error("{limit}={value:#x} cannot be kept: no page or no byte would fit, or the mask is no 2^n - 1")]
    InvalidLimit {
        /// Its name.
        limit: &'static str,
        /// Its value.
        value: u64,
    },
    /// An I/O address space without room.
    #[error(
        "no room for {length} bytes at a multiple of {alignment} in this IOVA space, the largest free part has {largest}: unmap something or make it larger"
    )]
    IovaExhausted {
        /// Bytes that were asked for.
        length: u64,
        /// What the address must be a multiple of.
        alignment: u64,
        /// The largest free part in bytes.
        largest: u64,
    },
    /// Unmapping what is not mapped.
    #[error(
        "{length} bytes at iova {iova} are not a mapping of this IOVA space: each is unmapped once and whole"
    )]
    IovaNotMapped {
        /// Where it was to begin.
        iova: Iova,
        /// Its length in bytes.
        length: u64,
    },

    // -- PCI and physical pages ---------------------------------------------------------------
    /// What should be a PCI address is none.
    #[error("{text:?} is no PCI address: write it as 0000:03:00.0")]
    InvalidPciAddress {
        /// What was given.
        text: String,
    },
    /// sysfs has no such device.
    #[error("there is no {what} on this machine: lspci lists PCI devices, /sys/class/drm cards")]
    NotInSysfs {
        /// What was looked for.
        what: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A device that is not on the PCI bus, so that nothing about PCI can be said of it.
    #[error("{name} is no PCI device: peer-to-peer DMA needs one, software and platform devices copy")]
    NotOnPci {
        /// What it is known as.
        name: String,
    },
    /// A file of sysfs that cannot be read, or reads as something else.
    #[error("cannot read {path}: is sysfs mounted, and the device still there?")]
    Sysfs {
        /// The file.
        path: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The kernel keeps page frame numbers from this process.
    #[error(
        "page frame numbers are hidden from this process: they take CAP_SYS_ADMIN in the initial user namespace (root, outside of containers)"
    )]
    FramesHidden,
    /// An address behind which pagemap shows no page.
    #[error(
        "no page is behind {address:#x}: is it mapped? For the mapping of a dma-buf itself there never is; take the Backing of a udmabuf, or a device's view"
    )]
    NoFrame {
        /// Virtual address of the page.
        address: u64,
        /// Why it could not be brought in.
        source: io::Error,
    },
    /// pagemap ended before the range did.
    #[error("/proc/self/pagemap ends at {address:#x}: the range reaches beyond this process's memory")]
    PagemapTruncated {
        /// Virtual address of the first page without an entry.
        address: u64,
    },
    /// pagemap could not be opened or read.
    #[error("cannot {operation} /proc/self/pagemap: is /proc mounted, and CONFIG_PROC_PAGE_MONITOR on?")]
    Pagemap {
        /// "open" or "read".
        operation: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A BAR that cannot be a target of DMA.
    #[error("BAR {bar} of {device} {refusal}")]
    BarUnusable {
        /// The device.
        device: PciAddress,
        /// The BAR that was asked for.
        bar: u8,
        /// What is wrong with it, and what to do.
        refusal: BarRefusal,
    },

    // -- a device's view ----------------------------------------------------------------------
    /// The module `dma_sg` is not loaded.
    #[error("/dev/dma_sg is not there: build the module (kernel/dma_sg/README.md) and `modprobe dma_sg`")]
    ViewModuleMissing {
        /// What the kernel answered.
        source: io::Error,
    },
    /// The module shows addresses to an administrator only.
    #[error("a device's view of a buffer is made of physical addresses: it takes root and CAP_SYS_ADMIN")]
    ViewNotPermitted {
        /// What the kernel answered.
        source: io::Error,
    },
    /// The buffer could not be mapped for the device, or the list not be read.
    #[error("cannot see {size} bytes of exporter {exporter:?} as {device} does{}", view_hint(.source))]
    View {
        /// Whose view was asked for.
        device: String,
        /// The exporter's name.
        exporter: String,
        /// Size of the buffer in bytes.
        size: u64,
        /// What the kernel or the exporter answered.
        source: io::Error,
    },
    /// The mapping has ended before the view was dropped.
    #[error(
        "the view for {device} has ended, since its exporter moved the buffer or the device lost its driver: make a new one"
    )]
    ViewEnded {
        /// Whose view it was.
        device: String,
        /// What the kernel answered (`ESTALE`).
        source: io::Error,
    },
}
