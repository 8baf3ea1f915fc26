//! Why a pointer was not exported, or its runtime could not be used.

use std::io;

use dma_sg::RangeError;

use super::super::MemoryKind;
use crate::dmabuf;
use crate::kind::{ErrorKind, readable_error};

/// Why a pointer was not exported as a dma-buf, or its runtime could not be used.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum PointerError {
    // -- pointers -----------------------------------------------------------------------------
    /// The pointer is null.
    #[error("a null pointer is in no allocation: pass the address that the allocator returned")]
    NullPointer,
    /// The runtime has no allocation at this address.
    #[error(
        "{runtime} has no allocation at {address:#x}: the pointer is another runtime's or host memory, or was freed (exporter::Runtimes asks every loaded runtime)"
    )]
    ForeignPointer {
        /// The runtime that was asked.
        runtime: &'static str,
        /// The address.
        address: u64,
    },
    /// Memory of a kind that is not exported: host memory, of a runtime or of none, or managed memory.
    #[error("{address:#x} is {}{}, {}", .kind, known_to(.runtime), .kind.instead())]
    WrongKind {
        /// The runtime that allocated or pinned it; `None` if no loaded runtime knows it.
        runtime: Option<&'static str>,
        /// The address.
        address: u64,
        /// The kind.
        kind: MemoryKind,
    },
    /// The range does not lie inside one allocation.
    #[error(
        "{length} bytes from {address:#x} are not inside the allocation, which has {size} bytes from {base:#x} ({runtime}): pass a range inside one allocation"
    )]
    PastAllocation {
        /// The runtime.
        runtime: &'static str,
        /// First byte of the range.
        address: u64,
        /// Length of the range in bytes.
        length: u64,
        /// First byte of the allocation.
        base: u64,
        /// Size of the allocation in bytes.
        size: u64,
    },
    /// The source of a copy is the target itself, or belongs to another device.
    #[error("cannot copy between these Vulkan buffers: {reason}")]
    CopySource {
        /// What is wrong with the source, and what to do.
        reason: &'static str,
    },
    /// The allocation that was looked up no longer exists.
    #[error(
        "the allocation of {runtime} at {address:#x} was freed after it was looked up: keep it alive until it is registered, and look it up again"
    )]
    Freed {
        /// The runtime.
        runtime: &'static str,
        /// The address.
        address: u64,
    },

    // -- runtimes -----------------------------------------------------------------------------
    /// The runtime's library cannot be loaded. The next attempt tries again.
    #[error("{runtime} is missing, because {library} cannot be loaded: {remedy}")]
    RuntimeMissing {
        /// The runtime.
        runtime: &'static str,
        /// The library.
        library: &'static str,
        /// How to get it.
        remedy: &'static str,
        /// The loader's message, without an errno.
        source: io::Error,
    },
    /// The library is too old: it lacks a function.
    #[error("{library} of {runtime} lacks {symbol}, added in {since}: install a newer one")]
    RuntimeTooOld {
        /// The runtime.
        runtime: &'static str,
        /// The library.
        library: &'static str,
        /// The function.
        symbol: &'static str,
        /// The first version that has it.
        since: &'static str,
    },
    /// The runtime works but shows no such device.
    #[error("{runtime} shows no such device: {remedy}")]
    NoDevice {
        /// The runtime.
        runtime: &'static str,
        /// What to check.
        remedy: &'static str,
    },
    /// The device or its driver does not export this memory.
    #[error("{runtime} does not export this memory as a dma-buf: {remedy}")]
    NotExportable {
        /// The runtime.
        runtime: &'static str,
        /// The usual reasons.
        remedy: &'static str,
    },
    /// No file descriptor is free (`EMFILE`, `ENFILE`): the library was not loaded, the runtime did not start,
    /// or the memory was not exported.
    #[error("{runtime} failed, because no file descriptor is free: close some, or raise ulimit -n")]
    OutOfDescriptors {
        /// The runtime.
        runtime: &'static str,
        /// `EMFILE` or `ENFILE`.
        source: io::Error,
    },
    /// A function of the runtime returned success, with numbers that cannot be true.
    #[error("{call} of {runtime} succeeded, but returned {what}: report this to the vendor of the driver")]
    InvalidAnswer {
        /// The runtime.
        runtime: &'static str,
        /// The function.
        call: &'static str,
        /// The wrong numbers.
        what: String,
    },
    /// A function of the runtime failed otherwise.
    #[error("{call} of {runtime} returned {name} ({code:#x})")]
    RuntimeCall {
        /// The runtime.
        runtime: &'static str,
        /// The function.
        call: &'static str,
        /// The code that it returned.
        code: i64,
        /// The runtime's name for the code.
        name: String,
    },

    // -- the dma-buf --------------------------------------------------------------------------
    /// The range is empty, or the exported buffer does not contain it.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The exported descriptor.
    #[error(transparent)]
    DmaBuf(#[from] dmabuf::Error),
}

readable_error!(PointerError);

impl PointerError {
    /// What a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NullPointer | Self::PastAllocation { .. } | Self::CopySource { .. } | Self::Range(_) => {
                ErrorKind::Misuse
            }
            Self::ForeignPointer { .. }
            | Self::Freed { .. }
            | Self::RuntimeMissing { .. }
            | Self::NoDevice { .. } => ErrorKind::NotFound,
            Self::WrongKind { .. } | Self::RuntimeTooOld { .. } | Self::NotExportable { .. } => {
                ErrorKind::Unsupported
            }
            Self::OutOfDescriptors { .. } => ErrorKind::Limit,
            Self::RuntimeCall { .. } | Self::InvalidAnswer { .. } => ErrorKind::System,
            Self::DmaBuf(error) => error.kind(),
        }
    }
}

fn known_to(runtime: &Option<&'static str>) -> String {
    runtime.map(|runtime| format!(" of {runtime}")).unwrap_or_default()
}
