//! Why an exporter, a pointer's runtime or a VFIO device refused an operation.

use std::io;

use dma_sg::RangeError;
use dma_sg::pci::{self, PciAddress};

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
    /// The huge page size is not a power of two.
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
    /// The address is in host memory: no loaded runtime has it, or one reports it as host memory.
    #[error(
        "{address:#x} is host memory{}, which has no dma-buf: put the data into a memfd and make a udmabuf of it (exporter::Udmabuf), or register it with ibv_reg_mr", known_to(.runtime)
    )]
    HostMemory {
        /// The runtime that pinned or allocated it, if any.
        runtime: Option<&'static str>,
        /// The address.
        address: u64,
    },
    /// The runtime moves this memory between host and device.
    #[error(
        "{address:#x} is managed memory of {runtime}, which moves between host and device: allocate device memory and copy the data there"
    )]
    ManagedMemory {
        /// The runtime.
        runtime: &'static str,
        /// The address.
        address: u64,
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
            Self::HostMemory { .. }
            | Self::ManagedMemory { .. }
            | Self::RuntimeTooOld { .. }
            | Self::NotExportable { .. } => ErrorKind::Unsupported,
            Self::OutOfDescriptors { .. } => ErrorKind::Limit,
            Self::RuntimeCall { .. } => ErrorKind::System,
            Self::DmaBuf(error) => error.kind(),
        }
    }
}

fn known_to(runtime: &Option<&'static str>) -> String {
    runtime.map(|runtime| format!(" of {runtime}")).unwrap_or_default()
}

/// Why a PCI device could not be opened through VFIO, or its BAR not be exported.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum VfioError {
    /// The device is in no IOMMU group.
    #[error(
        "{device} is in no IOMMU group, which VFIO requires: switch the IOMMU on in the firmware, on Intel also with intel_iommu=on"
    )]
    NoIommu {
        /// The device.
        device: PciAddress,
    },
    /// The device is bound to another driver or to none.
    #[error(
        "{device} is bound to {}: write vfio-pci to its driver_override in sysfs, unbind it from its driver, and write its address to drivers_probe", driver.as_deref().unwrap_or("no driver")
    )]
    NotBound {
        /// The device.
        device: PciAddress,
        /// The driver that it is bound to.
        driver: Option<String>,
    },
    /// Kernel drivers hold other devices of the IOMMU group.
    #[error(
        "{device} shares IOMMU group {group} with devices that kernel drivers hold: bind all of /sys/kernel/iommu_groups/{group}/devices to vfio-pci"
    )]
    GroupNotViable {
        /// The device.
        device: PciAddress,
        /// Its group.
        group: u32,
    },
    /// A step of opening the device failed.
    #[error("cannot {operation} for {device}{}", open_hint(.source))]
    Open {
        /// The device.
        device: PciAddress,
        /// The step: "open /dev/vfio/vfio", "open its IOMMU group", …
        operation: &'static str,
        /// The system call's error.
        source: io::Error,
    },
    /// The kernel or the driver does not export BARs (`ENOTTY`, `EOPNOTSUPP`).
    #[error(
        "the kernel does not export BARs of {device} as dma-bufs: use Linux 6.19 or later with CONFIG_VFIO_PCI_DMABUF, and the driver vfio-pci"
    )]
    Unsupported {
        /// The device.
        device: PciAddress,
        /// The system call's error.
        source: io::Error,
    },
    /// The region is the expansion ROM or another one after the BARs.
    #[error("region {bar} of {device} is not a BAR: export one of 0 to 5")]
    NotABar {
        /// The device.
        device: PciAddress,
        /// The region that was requested.
        bar: u8,
    },
    /// The BAR is smaller than a page.
    #[error(
        "BAR {bar} of {device} has {size} bytes, less than the page of {page_size} bytes that a dma-buf takes: access it with the CPU"
    )]
    BarTooSmall {
        /// The device.
        device: PciAddress,
        /// The BAR.
        bar: u8,
        /// Its size in bytes.
        size: u64,
        /// The system's page size in bytes.
        page_size: u64,
    },
    /// The range does not begin or end at a page boundary.
    #[error(
        "{length} bytes at offset {offset} of BAR {bar} of {device} are not whole pages of {page_size} bytes: widen the range to whole pages"
    )]
    Unaligned {
        /// The device.
        device: PciAddress,
        /// The BAR.
        bar: u8,
        /// Offset of the range in bytes.
        offset: u64,
        /// Length of the range in bytes.
        length: u64,
        /// The system's page size in bytes.
        page_size: u64,
    },
    /// The kernel refused to export the BAR for another reason.
    #[error("cannot export {size} bytes of BAR {bar} of {device}")]
    Export {
        /// The device.
        device: PciAddress,
        /// The BAR.
        bar: u8,
        /// Length of all ranges in bytes.
        size: u64,
        /// The system call's error.
        source: io::Error,
    },
    /// A range is empty or not inside the BAR, or there is none.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// sysfs has no such device, or the BAR cannot be a target of DMA.
    #[error(transparent)]
    Pci(#[from] pci::Error),
    /// The exported descriptor.
    #[error(transparent)]
    DmaBuf(#[from] dmabuf::Error),
}

readable_error!(VfioError);

impl VfioError {
    /// What a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotBound { .. } | Self::GroupNotViable { .. } => ErrorKind::Busy,
            Self::NoIommu { .. } | Self::Unsupported { .. } | Self::BarTooSmall { .. } => {
                ErrorKind::Unsupported
            }
            Self::NotABar { .. } | Self::Unaligned { .. } | Self::Range(_) => ErrorKind::Misuse,
            Self::Open { source, .. } | Self::Export { source, .. } => ErrorKind::of(source),
            Self::Pci(pci::Error::NotInSysfs { .. }) => ErrorKind::NotFound,
            Self::Pci(pci::Error::BarUnusable { .. }) => ErrorKind::Unsupported,
            Self::Pci(_) => ErrorKind::System,
            Self::DmaBuf(error) => error.kind(),
        }
    }
}

/// What the errno of a step of opening a device usually means.
fn open_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::EINVAL) => {
            ": load the modules vfio_pci and vfio_iommu_type1"
        }
        Some(libc::EACCES) => ": run as root, or give this user the node",
        Some(libc::EPERM) => {
            ": the IOMMU does not remap interrupts (see allow_unsafe_interrupts of vfio_iommu_type1), or run as root"
        }
        Some(libc::EBUSY) => ": another process has the group",
        _ => "",
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

    #[test]
    fn a_vfio_step_that_failed_says_what_to_do() {
        let device: PciAddress = "0000:03:00.0".parse().unwrap();
        let open = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            VfioError::Open { device, operation: "open its IOMMU group", source }
        };
        let busy = open(libc::EBUSY);
        assert_eq!(
            busy.to_string(),
            "cannot open its IOMMU group for 0000:03:00.0: another process has the group"
        );
        assert_eq!(busy.kind(), ErrorKind::Busy);
        assert_eq!(open(libc::EACCES).kind(), ErrorKind::Permission);
        assert_eq!(open(libc::EIO).to_string(), "cannot open its IOMMU group for 0000:03:00.0");
    }
}
