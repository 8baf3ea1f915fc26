//! What an allocator's runtime refuses: pointers, ranges, the runtime itself.

use std::io;

/// Why a pointer could not be turned into a dma-buf, or a runtime not be used;
/// [`Error::Exporters`](crate::Error) holds it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExporterError {
    // -- pointers -----------------------------------------------------------------------------
    /// A null pointer.
    #[error("a null pointer is in no allocation: pass the address that the allocator returned")]
    NullPointer,
    /// The runtime knows no allocation at this address.
    #[error(
        "{runtime} knows no allocation at {address:#x}: it is another runtime's or host memory, or it was freed (exporter::Runtimes asks all that are loaded)"
    )]
    ForeignPointer {
        /// The runtime that was asked.
        runtime: &'static str,
        /// The address.
        address: u64,
    },
    /// Host memory: no loaded runtime owns it, or one does and has it in host memory.
    #[error(
        "{address:#x} is host memory{}, of which there is no dma-buf: put it into a memfd and make a udmabuf of it (exporter::Udmabuf), or register it with ibv_reg_mr", known_to(.runtime)
    )]
    HostMemory {
        /// The runtime that pinned or allocated it, if any did.
        runtime: Option<&'static str>,
        /// The address.
        address: u64,
    },
    /// Memory that the runtime moves between host and device.
    #[error(
        "{address:#x} is managed memory of {runtime}, which moves between host and device: allocate device memory and copy to it"
    )]
    ManagedMemory {
        /// The runtime.
        runtime: &'static str,
        /// The address.
        address: u64,
    },
    /// A range that does not lie inside its allocation.
    #[error(
        "{length} bytes from {address:#x} end past the allocation, {size} bytes from {base:#x} in {runtime}: pass a range inside one allocation"
    )]
    PastAllocation {
        /// The runtime.
        runtime: &'static str,
        /// First byte of the range.
        address: u64,
        /// Its length in bytes.
        length: u64,
        /// First byte of the allocation.
        base: u64,
        /// Size of the allocation in bytes.
        size: u64,
    },
    /// What was found at the address is not there any more.
    #[error(
        "the allocation that {runtime} had at {address:#x} was freed since it was found: keep it alive until it is registered, and look again"
    )]
    Freed {
        /// The runtime.
        runtime: &'static str,
        /// The address.
        address: u64,
    },

    // -- runtimes -----------------------------------------------------------------------------
    /// The runtime's library is not installed.
    #[error("{runtime} is not there, since {library} cannot be loaded: {remedy}")]
    RuntimeMissing {
        /// The runtime.
        runtime: &'static str,
        /// The library that was looked for.
        library: &'static str,
        /// What brings it.
        remedy: &'static str,
    },
    /// The runtime's library lacks a function that is needed.
    #[error("{library} of {runtime} lacks {symbol}, which it has from {since} on: install a newer one")]
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
    /// The runtime is there and has no device for us.
    #[error("{runtime} has no device: {remedy}")]
    NoDevice {
        /// The runtime.
        runtime: &'static str,
        /// What to look at.
        remedy: &'static str,
    },
    /// The device or its driver exports no dma-bufs, or not of this memory.
    #[error("{runtime} does not export this memory as a dma-buf: {remedy}")]
    NotExportable {
        /// The runtime.
        runtime: &'static str,
        /// What may be the reason, and what to do.
        remedy: &'static str,
    },
    /// More memory than the device has, or allocates at once.
    #[error("{runtime} has no {size} bytes of device memory in one allocation: ask for less or free some")]
    TooLarge {
        /// The runtime.
        runtime: &'static str,
        /// Bytes that were asked for.
        size: u64,
    },
    /// The process has as many descriptors open as it may.
    #[error(
        "{exporter} could not export: this process is out of descriptors, so raise ulimit -n or close some"
    )]
    OutOfDescriptors {
        /// The exporter.
        exporter: &'static str,
        /// `EMFILE` or `ENFILE`.
        source: io::Error,
    },
    /// A call of the runtime failed.
    #[error("{runtime}: {call} answered {name} ({code:#x})")]
    RuntimeCall {
        /// The runtime.
        runtime: &'static str,
        /// The function.
        call: &'static str,
        /// Its answer.
        code: i64,
        /// The answer by name.
        name: String,
    },

    // -- devices ------------------------------------------------------------------------------
    /// A capture device that does not do what is asked of it.
    #[error("{device} is no streaming capture device: {reason}")]
    NotACapture {
        /// The device node.
        device: String,
        /// What it lacks.
        reason: &'static str,
    },
}

fn known_to(runtime: &Option<&'static str>) -> String {
    runtime.map(|runtime| format!(" known to {runtime}")).unwrap_or_default()
}
