//! What refuses a registration beyond that of one region: sets, the cache, newer verbs, the self-check.

use super::Error;
use crate::mr::Path;

/// Why a set, the cache, a newer verb or a self-check was refused;
/// [`Error::Registration`](crate::Error) holds it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    // -- sets ---------------------------------------------------------------------------------
    /// A chunk size that no chunk can have.
    #[error(
        "{size} bytes is no chunk size here: it must be a multiple of the page size, {page_size} bytes, and at most {largest} bytes, the device's largest region"
    )]
    ChunkSize {
        /// The size that was asked for, in bytes.
        size: u64,
        /// The kernel's page size in bytes.
        page_size: u64,
        /// The largest size that the device takes, in bytes.
        largest: u64,
    },
    /// A set of no buffer, or on no protection domain.
    #[error("a set was asked for with no {what}: give it at least one")]
    NothingToRegister {
        /// "buffer" or "protection domain".
        what: &'static str,
    },
    /// One chunk of a set was refused; all others were deregistered again.
    #[error(
        "chunk {chunk} of {chunks} ({length} bytes at offset {offset}) on {device} was refused, and nothing of the set stays registered"
    )]
    Chunk {
        /// Name of the device.
        device: String,
        /// Which chunk, from 0.
        chunk: usize,
        /// How many the set has.
        chunks: usize,
        /// Offset of the chunk in the set's buffers, in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// What refused it.
        source: Box<Error>,
    },

    // -- cache --------------------------------------------------------------------------------
    /// What is in use leaves no room within the cache's limits.
    #[error(
        "{length} more bytes do not fit in the cache: {used_bytes} of {max_bytes} bytes and {used_entries} of {max_entries} entries are in use: drop handles, ask for less, or raise the limits"
    )]
    CacheFull {
        /// Bytes that were to be registered.
        length: u64,
        /// Bytes whose handles live, and which cannot go.
        used_bytes: u64,
        /// The cache's limit in bytes.
        max_bytes: u64,
        /// Entries whose handles live.
        used_entries: usize,
        /// The cache's limit in entries.
        max_entries: usize,
    },

    // -- newer verbs --------------------------------------------------------------------------
    /// A way to register that the library, the kernel or the device here does not have.
    #[error("{operation} is not available on {device}: it needs {needs}")]
    Unavailable {
        /// Name of the device.
        device: String,
        /// The C function.
        operation: &'static str,
        /// The rdma-core and kernel versions that have it, and the devices.
        needs: &'static str,
        /// What was found instead.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A DMA handle could not be made.
    #[error("{device} refused a DMA handle: compare CPU and processing hint with what the device takes")]
    DmaHandle {
        /// Name of the device.
        device: String,
        /// What libibverbs or the kernel answered.
        source: std::io::Error,
    },
    /// A DMA handle of another context than the protection domain.
    #[error("the DMA handle is of another context (an open of {device}) than the protection domain")]
    ForeignDmaHandle {
        /// The device that the handle is of.
        device: String,
    },

    // -- self-check ---------------------------------------------------------------------------
    /// A transfer of the self-check did not complete with success.
    #[error(
        "the region registered by {path} on {device}, and {step} byte {offset} failed: do not use it (peer-to-peer DMA may be blocked: ACS, IOMMU, or a mapping of the exporter's that this NIC cannot reach)"
    )]
    SelfCheck {
        /// Name of the device.
        device: String,
        /// The path that registered the region.
        path: Path,
        /// "reading" or "writing".
        step: &'static str,
        /// Offset of the byte in the region.
        offset: u64,
        /// How the transfer ended.
        source: Box<Error>,
    },
    /// The device transferred with success and another byte came back than was written.
    #[error(
        "the region registered by {path} on {device}, and byte {offset} reads {read:#04x} after {wrote:#04x} was written: do not use it"
    )]
    SelfCheckMismatch {
        /// Name of the device.
        device: String,
        /// The path that registered the region.
        path: Path,
        /// Offset of the byte in the region.
        offset: u64,
        /// What was written.
        wrote: u8,
        /// What came back.
        read: u8,
    },
}
