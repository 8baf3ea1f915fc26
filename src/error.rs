//! The one error type of the library.
//!
//! One variant an operation, with its arguments: whoever reads the message sees what was asked, what
//! refused it, and what to do next. The errno, where the kernel gave one, is the [`source`] and is
//! never repeated in the message; [`Error::errno`] reads it. `docs/errors.md` has the usual causes of
//! each.
//!
//! [`source`]: std::error::Error::source

mod address;
mod connect;
mod exporter;
mod registration;
pub(crate) mod text;
mod transfer;
mod vfio;

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

pub use self::address::AddressError;
pub use self::connect::ConnectError;
pub use self::exporter::ExporterError;
pub use self::registration::RegistrationError;
pub use self::transfer::TransferError;
pub use self::vfio::VfioError;

use self::text::{deregister_hint, hint, list, listed, nearest_congruent, post_hint};
use crate::dmabuf::CpuAccess;
use crate::mr::{Access, Refusal};
use crate::umem::Iova;
use crate::verbs::{CompletionStatus, Opcode};

/// What this library's fallible functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation was refused, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // -- importing a dma-buf ------------------------------------------------------------------
    /// The descriptor number is not open in this process (`EBADF`).
    #[error(
        "fd {fd} is not open in this process: pass the descriptor that the exporter returned, before it is closed"
    )]
    BadFd {
        /// The number that was passed.
        fd: RawFd,
    },
    /// The descriptor is open, but something else than a dma-buf.
    #[error("fd {fd} is not a dma-buf but {what}: export the buffer first (see the exporter module)")]
    NotDmaBuf {
        /// The number that was passed.
        fd: RawFd,
        /// What the descriptor refers to, as /proc and stat(2) tell.
        what: String,
    },
    /// Reading a property of the dma-buf failed.
    #[error("cannot read the dma-buf's {property}")]
    Inspect {
        /// Which property: "size", "exporter name", …
        property: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The name is longer than a dma-buf's name may be, or has a NUL inside.
    #[error("{name:?} cannot be a dma-buf's name: at most 31 bytes, none of them NUL")]
    InvalidName {
        /// The name that was passed.
        name: String,
    },
    /// `DMA_BUF_SET_NAME` failed.
    #[error("cannot name the dma-buf {name:?}")]
    SetName {
        /// The name that was passed.
        name: String,
        /// What the kernel answered.
        source: io::Error,
    },

    // -- CPU access and fences ----------------------------------------------------------------
    /// The exporter does not let the CPU map the buffer.
    #[error(
        "exporter {exporter:?} refused to map {size} bytes for the CPU: check the contents over RDMA or with the exporter's own tools"
    )]
    Map {
        /// The exporter's name.
        exporter: String,
        /// Size of the buffer in bytes.
        size: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// `DMA_BUF_IOCTL_SYNC` failed.
    #[error("cannot {edge} CPU access ({access:?}) to the dma-buf")]
    Sync {
        /// "start" or "end".
        edge: &'static str,
        /// The access that was asked for.
        access: CpuAccess,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A copy through a bracket that was not opened for its direction.
    #[error("this CPU access was begun for {access:?}: begin it for the direction you copy in")]
    CpuAccessDirection {
        /// What the bracket was begun for.
        access: CpuAccess,
    },
    /// The fences did not signal in time.
    #[error(
        "the buffer's fences did not signal within {limit:?}: the device is still working on it, or hangs"
    )]
    FenceTimeout {
        /// The time limit that was given.
        limit: Duration,
    },
    /// Waiting for, exporting or importing a fence failed.
    #[error("cannot {operation} of the dma-buf")]
    Fence {
        /// "wait for the fences", "export the fences", "add a fence".
        operation: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },

    // -- ranges -------------------------------------------------------------------------------
    /// A length of zero bytes.
    #[error("a range of 0 bytes at offset {offset}: give it at least one byte")]
    ZeroLength {
        /// Offset of the range in bytes.
        offset: u64,
    },
    /// The range does not lie inside the buffer, or its end overflows u64.
    #[error("a range of {length} bytes at offset {offset} does not lie within {size} bytes")]
    OutOfRange {
        /// Offset of the range in bytes.
        offset: u64,
        /// Length of the range in bytes.
        length: u64,
        /// Size in bytes of what the range should lie in.
        size: u64,
    },
    /// iova + length does not fit in 64 bits.
    #[error("iova {iova} plus {length} bytes does not fit in 64 bits: choose a lower iova")]
    IovaOverflow {
        /// The iova that was chosen.
        iova: Iova,
        /// Length of the range in bytes.
        length: u64,
    },
    /// Offset and iova lie at different places inside their pages.
    #[error("iova {iova} and offset {offset:#x} must be equal modulo the page size of {page_size}: in that page, {} fits", nearest_congruent(.iova.0, *.offset, *.page_size))]
    IovaNotCongruent {
        /// The iova that was chosen.
        iova: Iova,
        /// Offset of the range in bytes.
        offset: u64,
        /// The kernel's page size in bytes.
        page_size: u64,
    },
    /// A length that one SGE cannot carry (its length is a u32).
    #[error("{length} bytes do not fit in one scatter/gather element of at most 4294967295: split the range")]
    SgeTooLong {
        /// The length that was asked for, in bytes.
        length: u64,
    },

    // -- lists of addresses -------------------------------------------------------------------
    /// A list of addresses, or what it was to be read from: pages, PCI, a device's view.
    #[error(transparent)]
    Addresses(#[from] AddressError),

    // -- memory of a PCI device ---------------------------------------------------------------
    /// A PCI device, or its BAR, that cannot be had through VFIO.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    // -- transfers ----------------------------------------------------------------------------
    /// A transfer, or the description of a peer's memory.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A connection by IP address.
    #[error(transparent)]
    Connect(#[from] ConnectError),

    // -- access flags -------------------------------------------------------------------------
    /// Flags that the kernel does not take for a dma-buf.
    #[error(
        "access flags {flags:?} are not permitted for a dma-buf: only LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ, REMOTE_ATOMIC and RELAXED_ORDERING are"
    )]
    AccessNotPermitted {
        /// The flags beyond the permitted ones.
        flags: Access,
    },
    /// REMOTE_WRITE or REMOTE_ATOMIC without LOCAL_WRITE.
    #[error("{flags:?} needs LOCAL_WRITE beside it: a peer may write only where the owner may")]
    LocalWriteMissing {
        /// The flags that were asked for.
        flags: Access,
    },
    /// Write access to a dma-buf whose descriptor is read-only. The kernel does not check this.
    #[error(
        "{access} asked of a dma-buf whose fd is read-only: export it read-write (DRM: DRM_RDWR at the first export; GBM: PRIME before gbm_bo_get_fd)"
    )]
    ReadOnlyBuffer {
        /// The access that was asked for.
        access: String,
    },

    // -- registration -------------------------------------------------------------------------
    /// No path that was allowed can import a dma-buf on this device.
    #[error("device {device} cannot import a dma-buf ({}): use a NIC and driver that can (docs/kernel-support.md), a kernel built with it, or opt in to HostMapping for a buffer whose host pages you own", list(.refusals))]
    ImportUnsupported {
        /// Name of the device.
        device: String,
        /// What each path answered.
        refusals: Vec<Refusal>,
    },
    /// The device imports dma-bufs, but not this one: no struct pages behind it.
    #[error(
        "device {device} imports dma-bufs, but the memory of exporter {exporter:?} has no struct pages that it could use (a PCI BAR or VRAM): use a NIC that does peer-to-peer DMA, or a buffer in system memory"
    )]
    MemoryWithoutPages {
        /// Name of the device.
        device: String,
        /// The exporter's name.
        exporter: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The pages of a HostMapping registration count against RLIMIT_MEMLOCK, and that is too low.
    #[error(
        "registering {needed} bytes by host mapping needs RLIMIT_MEMLOCK of at least that beside what is pinned already; it is {limit} bytes: raise it (ulimit -l, LimitMEMLOCK=) or use a path that imports the dma-buf, which is not charged"
    )]
    MemlockLimit {
        /// The soft limit in bytes.
        limit: u64,
        /// Bytes that this registration pins.
        needed: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// HostMapping with the pages of another buffer.
    #[error(
        "the host pages given belong to another buffer than the dma-buf: pass the backing of the same allocation"
    )]
    ForeignBacking,
    /// HostMapping was allowed, but no backing given, or no path was allowed at all.
    #[error("no registration path is allowed: allow Verbs, Uverbs, or HostMapping with its backing")]
    NoPath,
    /// The registration itself was refused.
    #[error("{device} refused to register {length} bytes at offset {offset} of a {exporter:?} dma-buf through {path}{}", hint(.source))]
    Register {
        /// Name of the device.
        device: String,
        /// The path that was taken.
        path: crate::mr::Path,
        /// The exporter's name.
        exporter: String,
        /// Offset of the range in bytes.
        offset: u64,
        /// Length of the range in bytes.
        length: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Deregistering was refused; the region is still registered.
    #[error("cannot deregister the region with lkey {lkey:#x}{}", deregister_hint(.source))]
    Deregister {
        /// The region's local key.
        lkey: u32,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Probing gave an answer that means neither yes nor no.
    #[error("probing {device} for dma-buf import through {path} gave an answer that is neither yes nor no")]
    Probe {
        /// Name of the device.
        device: String,
        /// The path that was probed.
        path: crate::mr::Path,
        /// What the kernel answered.
        source: io::Error,
    },

    /// A set of regions, the cache, a newer verb or a self-check.
    #[error(transparent)]
    Registration(#[from] RegistrationError),

    // -- exporters ----------------------------------------------------------------------------
    /// The exporter's device, heap or card is not there.
    #[error("{device} is not there: {remedy}")]
    ExporterMissing {
        /// The device node, or what was looked for.
        device: String,
        /// What brings it.
        remedy: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The exporter's device may not be opened by this user.
    #[error("{device} may not be opened: {remedy}")]
    ExporterNotPermitted {
        /// The device node.
        device: String,
        /// What gives the permission.
        remedy: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The exporter's device is there and could not be opened, or is something else.
    #[error("{device} cannot be used as an exporter")]
    ExporterUnusable {
        /// The device node.
        device: String,
        /// What the kernel answered: `EMFILE`, `EBUSY`, `ENOTTY`, …
        source: io::Error,
    },
    /// A size that no allocator can make.
    #[error("no buffer has {size} bytes: at most 2^63 - 1, rounded up to whole pages")]
    SizeTooLarge {
        /// Bytes that were asked for.
        size: u64,
    },
    /// A huge page size that is no power of two.
    #[error("no huge page has {size} bytes: /sys/kernel/mm/hugepages lists the sizes of this machine")]
    HugePageSize {
        /// The size that was asked for, in bytes.
        size: u64,
    },
    /// More than one udmabuf may hold.
    #[error(
        "udmabuf takes at most {parameter}={value} and {requested} {unit} were asked for: raise /sys/module/udmabuf/parameters/{parameter} or ask for less"
    )]
    UdmabufLimit {
        /// The module's parameter: `size_limit_mb` or `list_limit`.
        parameter: &'static str,
        /// Its value now.
        value: u64,
        /// What was asked for, in the parameter's unit, rounded up.
        requested: u64,
        /// "MiB" or "pieces".
        unit: &'static str,
    },
    /// A memfd that cannot stand behind a udmabuf.
    #[error("the memfd cannot back a udmabuf: {reason}")]
    UnfitMemfd {
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The pool of huge pages is too small.
    #[error("{size} bytes need {} huge pages of {page_size} bytes that the pool does not have free: raise /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", .size / .page_size, .page_size / 1024)]
    HugePages {
        /// Bytes that were asked for.
        size: u64,
        /// The huge page's size in bytes.
        page_size: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// More memory than there is: the kernel would kill processes to find it.
    #[error(
        "{requested} bytes were asked of {exporter} and there are {available} to give: ask for less or free some"
    )]
    OutOfMemory {
        /// The exporter: "dma-heap system", …
        exporter: String,
        /// Bytes that were asked for.
        requested: u64,
        /// Bytes that the system, swap included, or the device could give.
        available: u64,
    },
    /// The exporter was there and did not make the buffer.
    #[error("{exporter} could not {operation} ({size} bytes)")]
    Export {
        /// The exporter: "udmabuf", "dma-heap system", …
        exporter: String,
        /// What it was asked to do.
        operation: &'static str,
        /// Bytes that were asked for.
        size: u64,
        /// What the kernel answered.
        source: io::Error,
    },

    /// A pointer, or the runtime that is to export it, was refused.
    #[error(transparent)]
    Exporters(#[from] ExporterError),

    // -- verbs objects ------------------------------------------------------------------------
    /// libibverbs could not list the devices.
    #[error("cannot list the RDMA devices: is the module ib_uverbs loaded?")]
    ListDevices {
        /// What libibverbs answered.
        source: io::Error,
    },
    /// No device has that name.
    #[error("no RDMA device is named {name:?}; {}", listed(.present))]
    UnknownDevice {
        /// The name that was asked for.
        name: String,
        /// The names that are there.
        present: Vec<String>,
    },
    /// A verbs object could not be made, changed or read.
    #[error("{device}: cannot {operation}")]
    Verbs {
        /// Name of the device.
        device: String,
        /// What was tried, with its arguments.
        operation: String,
        /// What libibverbs or the kernel answered.
        source: io::Error,
    },
    /// No GID of the port fits.
    #[error("{device} port {port} has no usable GID: give its network interface an address and bring it up")]
    NoGid {
        /// Name of the device.
        device: String,
        /// Port number, from 1.
        port: u8,
    },
    /// An endpoint description that cannot be connected to.
    #[error("the peer's endpoint is not usable: {reason}")]
    InvalidEndpoint {
        /// What is wrong with it.
        reason: String,
    },
    /// A queue pair that another library made, and connects.
    #[error("queue pair {qp_num} was made by another library, which has to connect it")]
    ForeignQueuePair {
        /// Number of the queue pair.
        qp_num: u32,
    },
    /// Objects of two contexts that were to work together.
    #[error(
        "the {object} is of another context (an open of {device}) than the protection domain: make both of one"
    )]
    ContextMismatch {
        /// What does not belong: "completion queue".
        object: &'static str,
        /// The device that it is of.
        device: String,
    },
    /// A work request that the provider refused to queue.
    #[error("cannot post {opcode:?}{}", post_hint(.source))]
    Post {
        /// The operation.
        opcode: Opcode,
        /// What the provider answered.
        source: io::Error,
    },
    /// An atomic on something else than one aligned u64.
    #[error("{opcode:?} at {addr:#x} with {length} local bytes: atomics act on 8 bytes at a multiple of 8")]
    InvalidAtomic {
        /// The operation.
        opcode: Opcode,
        /// Address at the peer.
        addr: u64,
        /// Local bytes that were given.
        length: u64,
    },
    /// More scatter/gather elements than the queue pair was made for.
    #[error(
        "{count} scatter/gather elements posted to a queue pair made for {limit}: create it with more or split the request"
    )]
    TooManySge {
        /// Elements that were passed.
        count: usize,
        /// What the queue pair takes.
        limit: u32,
    },
    /// A work request completed, but not with success.
    #[error("work request {wr_id} ended with {status}")]
    Completion {
        /// The work request's identifier.
        wr_id: u64,
        /// How it ended.
        status: CompletionStatus,
    },
    /// No completion within the time limit.
    #[error("no completion within {limit:?}: is the peer alive, and is something posted that completes?")]
    CompletionTimeout {
        /// The time limit that was given.
        limit: Duration,
    },
}

impl Error {
    /// The errno behind this error, where a system call or a provider gave one.
    pub fn errno(&self) -> Option<i32> {
        // The errno may be that of one part, such as a chunk of a set.
        let mut cause = std::error::Error::source(self);
        while let Some(source) = cause {
            if let Some(error) = source.downcast_ref::<io::Error>() {
                return error.raw_os_error();
            }
            cause = source.source();
        }
        None
    }
}
