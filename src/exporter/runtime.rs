//! From a pointer to the dma-buf behind it, by the runtime that allocated the memory.
//!
//! ```no_run
//! use dmabuf_rdma::exporter::Runtimes;
//! use dmabuf_rdma::mr::MemoryRegion;
//! # use dmabuf_rdma::verbs::ProtectionDomain;
//! # fn register(domain: &ProtectionDomain, address: u64, length: u64) -> dmabuf_rdma::Result<()> {
//! for part in Runtimes::loaded()?.export(address, length)? {
//!     let region = MemoryRegion::builder(domain, &part.dmabuf).range(part.range()).register()?;
//! }
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::ops::{Range, RangeBounds};

use dma_sg::pci::PciAddress;
use dma_sg::{RangeError, check_range, resolve_range};

use super::{Error, PointerError};
use crate::dmabuf::DmaBuf;

type Result<T, E = PointerError> = std::result::Result<T, E>;

/// A runtime that allocates device memory and identifies an allocation by a pointer into it.
///
/// An address is one that the runtime's allocator returned, or any inside the allocation. Nothing is read
/// or written through it.
pub trait Runtime: fmt::Debug + Send + Sync {
    /// The runtime's name: `CUDA`, `ROCm`, `Level Zero`.
    fn name(&self) -> &'static str;

    /// Looks up an address; `None` if the runtime has no allocation there.
    ///
    /// # Errors
    /// - [`PointerError::NullPointer`].
    /// - [`PointerError::RuntimeCall`]: the runtime failed. An unknown address is not a failure.
    fn find(&self, address: u64) -> Result<Option<PointerInfo>>;

    /// Exports `length` bytes from the address that was looked up: one range for each allocation, in order
    /// and without gaps.
    ///
    /// # Errors
    /// - [`PointerError::Range`], [`PointerError::PastAllocation`]: `length` is 0, or too long.
    /// - [`PointerError::HostMemory`], [`PointerError::ManagedMemory`]: such memory is not exported.
    /// - [`PointerError::Freed`]: the allocation is no longer the one that was looked up.
    /// - [`PointerError::NotExportable`]: the device or its driver does not export this memory.
    /// - [`PointerError::OutOfDescriptors`] (`EMFILE`, `ENFILE`).
    /// - [`PointerError::RuntimeCall`]: the runtime failed otherwise.
    fn export(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>>;

    /// Looks up an address and exports `length` bytes from it.
    ///
    /// # Errors
    /// [`PointerError::ForeignPointer`]: the runtime has no allocation there. Otherwise as
    /// [`find`](Self::find) and [`export`](Self::export).
    fn export_at(&self, address: u64, length: u64) -> Result<Vec<ExportedRange>> {
        self.export(&found(self, address)?, length)
    }
}

/// What a runtime reports about an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointerInfo {
    /// The runtime's name.
    pub runtime: &'static str,
    /// The address that was looked up.
    pub address: u64,
    /// First byte of the allocation, or of the reserved range that allocations are mapped into.
    pub base: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where the memory is.
    pub kind: MemoryKind,
    /// The runtime's number of this allocation, which it never reuses in this process; `None` if it has none.
    pub id: Option<u64>,
    /// The PCI device that the memory belongs to; `None` for host memory, and if the runtime does not say.
    pub device: Option<PciAddress>,
}

/// Where memory of a runtime is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryKind {
    /// In the device.
    Device,
    /// In the host, pinned by the runtime.
    Host,
    /// Managed: the runtime moves it to where it is used.
    Managed,
}

impl PointerInfo {
    /// Checks that `length` bytes from the address can be exported, before the runtime is asked.
    ///
    /// # Errors
    /// - [`PointerError::HostMemory`], [`PointerError::ManagedMemory`]: such memory is not exported.
    /// - [`PointerError::Range`], [`PointerError::PastAllocation`]: `length` is 0, or too long.
    pub fn check(&self, length: u64) -> Result<()> {
        let (runtime, address) = (self.runtime, self.address);
        match self.kind {
            MemoryKind::Device => {}
            MemoryKind::Host => return Err(PointerError::HostMemory { runtime: Some(runtime), address }),
            MemoryKind::Managed => return Err(PointerError::ManagedMemory { runtime, address }),
        }
        // A runtime may report a base above the address.
        let Some(offset) = address.checked_sub(self.base) else {
            return Err(self.past(length, self.base, self.size));
        };
        match check_range(offset, length, self.size) {
            Ok(()) if address.checked_add(length).is_some() => Ok(()),
            Err(empty @ RangeError::Empty { .. }) => Err(empty.into()),
            _ => Err(self.past(length, self.base, self.size)),
        }
    }

    /// The error for a range that does not lie in the allocation of `size` bytes from `base`.
    pub(super) fn past(&self, length: u64, base: u64, size: u64) -> PointerError {
        let (runtime, address) = (self.runtime, self.address);
        PointerError::PastAllocation { runtime, address, length, base, size }
    }

    /// Checks that a second look-up of the address still finds the same allocation.
    #[cfg(any(test, feature = "cuda", feature = "hsa", feature = "level-zero"))]
    pub(super) fn check_alive(&self, now: Option<Self>) -> Result<()> {
        match now {
            Some(now) if now == *self => Ok(()),
            _ => Err(PointerError::Freed { runtime: self.runtime, address: self.address }),
        }
    }
}

/// The bytes of a dma-buf that are exported memory: all of it, or a part if it spans several allocations.
#[derive(Debug)]
#[non_exhaustive]
pub struct ExportedRange {
    /// The buffer. It may begin before the exported memory and end after it.
    pub dmabuf: DmaBuf,
    /// Whether the driver maps the memory through the PCIe BAR although a nearer path exists, such as NVLink to
    /// the CPU. `Cuda::with_pcie_mapping` requests this.
    pub pcie: bool,
    range: Range<u64>,
}

impl ExportedRange {
    /// A range of a dma-buf.
    ///
    /// # Errors
    /// [`RangeError`]: the range is empty or not inside the buffer.
    pub fn new(dmabuf: DmaBuf, range: impl RangeBounds<u64>) -> Result<Self, RangeError> {
        let range = resolve_range(range, dmabuf.size())?;
        Ok(Self { dmabuf, range, pcie: false })
    }

    /// The bytes of the buffer that are the exported memory.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Length of the range in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range is refused
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// All runtimes that may have allocated a pointer.
#[derive(Debug, Default)]
pub struct Runtimes {
    all: Vec<Box<dyn Runtime>>,
}

impl Runtimes {
    /// The runtimes of the features `cuda`, `hsa` and `level-zero` whose library this process has loaded.
    ///
    /// A runtime that is not loaded cannot have allocated a pointer, so this loads none. A runtime without
    /// a device is left out.
    ///
    /// # Errors
    /// As the `load` functions of the runtimes.
    pub fn loaded() -> Result<Self, Error> {
        #[allow(unused_mut)]
        let mut all: Vec<Box<dyn Runtime>> = Vec::new();
        #[cfg(feature = "cuda")]
        Self::add(&mut all, super::Cuda::if_loaded())?;
        #[cfg(feature = "hsa")]
        Self::add(&mut all, super::Hsa::if_loaded())?;
        #[cfg(feature = "level-zero")]
        Self::add(&mut all, super::LevelZero::if_loaded())?;
        Ok(Self { all })
    }

    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
    fn add<R: Runtime + 'static>(
        all: &mut Vec<Box<dyn Runtime>>,
        runtime: Result<Option<R>, Error>,
    ) -> Result<(), Error> {
        match runtime {
            Ok(runtime) => all.extend(runtime.map(|runtime| Box::new(runtime) as Box<dyn Runtime>)),
            // Without a device it has no memory that a pointer could be in.
            Err(Error::Pointer(PointerError::NoDevice { .. })) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// These runtimes, asked in this order. They may be implemented outside this crate.
    pub fn new(all: Vec<Box<dyn Runtime>>) -> Self {
        Self { all }
    }

    /// The names of the runtimes, in the order in which they are asked.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.all.iter().map(|runtime| runtime.name())
    }

    /// Looks up an address; `None` if no runtime has an allocation there, as for ordinary host memory.
    ///
    /// # Errors
    /// As [`Runtime::find`].
    pub fn find(&self, address: u64) -> Result<Option<PointerInfo>> {
        Ok(self.owner(address)?.map(|(_, info)| info))
    }

    /// Exports `length` bytes from `address`, through the runtime that allocated them.
    ///
    /// # Errors
    /// [`PointerError::HostMemory`]: no runtime has an allocation there. Otherwise as [`Runtime::export`].
    pub fn export(&self, address: u64, length: u64) -> Result<Vec<ExportedRange>> {
        match self.owner(address)? {
            Some((runtime, info)) => runtime.export(&info, length),
            None => Err(PointerError::HostMemory { runtime: None, address }),
        }
    }

    fn owner(&self, address: u64) -> Result<Option<(&dyn Runtime, PointerInfo)>> {
        not_null(address)?;
        for runtime in &self.all {
            if let Some(info) = runtime.find(address)? {
                return Ok(Some((runtime.as_ref(), info)));
            }
        }
        Ok(None)
    }
}

/// A runtime that can export what it has just looked up, without asking again whether it is alive.
#[cfg(any(feature = "hsa", feature = "level-zero"))]
pub(super) trait ExportFound: Runtime {
    /// Exports memory that was looked up, and checked, a moment ago.
    fn export_found(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>>;

    /// [`Runtime::export`] for a look-up of any age.
    fn export_checked(&self, info: &PointerInfo, length: u64) -> Result<Vec<ExportedRange>> {
        info.check(length)?;
        info.check_alive(self.find(info.address)?)?;
        self.export_found(info, length)
    }

    /// [`Runtime::export_at`] with one look-up.
    fn find_and_export(&self, address: u64, length: u64) -> Result<Vec<ExportedRange>> {
        let info = found(self, address)?;
        info.check(length)?;
        self.export_found(&info, length)
    }
}

/// Looks up an address that has to be the runtime's.
fn found(runtime: &(impl Runtime + ?Sized), address: u64) -> Result<PointerInfo> {
    runtime.find(address)?.ok_or_else(|| foreign(runtime.name(), address))
}

pub(super) fn foreign(runtime: &'static str, address: u64) -> PointerError {
    PointerError::ForeignPointer { runtime, address }
}

pub(super) fn not_null(address: u64) -> Result<()> {
    if address == 0 { Err(PointerError::NullPointer) } else { Ok(()) }
}

/// The whole pages around `length` bytes from `address`: their first byte and length. CUDA exports whole
/// pages of the host, which may be 64 KiB.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) fn pages_around(address: u64, length: u64, page: u64) -> Option<(u64, u64)> {
    let start = address - address % page;
    let end = address.checked_add(length)?.checked_next_multiple_of(page)?;
    Some((start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: PointerInfo = PointerInfo {
        runtime: "test",
        address: 0x7f00_0010_2000,
        base: 0x7f00_0010_0000,
        size: 1 << 20,
        kind: MemoryKind::Device,
        id: Some(7),
        device: None,
    };

    #[test]
    fn exports_are_of_whole_pages_of_any_size() {
        assert_eq!(pages_around(0x10_0200, 0x200, 4096), Some((0x10_0000, 4096)));
        assert_eq!(pages_around(0x10_0000, 0x1000, 4096), Some((0x10_0000, 4096)));
        assert_eq!(pages_around(0x10_fe00, 0x400, 4096), Some((0x10_f000, 8192)));
        assert_eq!(pages_around(0x11_1200, 0x200, 64 << 10), Some((0x11_0000, 64 << 10)));
        assert_eq!(pages_around(0x11_f000, 0x2000, 64 << 10), Some((0x11_0000, 128 << 10)));
        assert_eq!(pages_around(u64::MAX - 10, 100, 4096), None);
    }

    #[test]
    fn ranges_end_inside_the_allocation() {
        assert!(INFO.check((1 << 20) - 0x2000).is_ok());
        assert_error!(INFO.check((1 << 20) - 0x1fff), PointerError::PastAllocation { size: 0x10_0000, .. });
        assert_error!(INFO.check(u64::MAX), PointerError::PastAllocation { .. });
        assert_error!(INFO.check(0), PointerError::Range(RangeError::Empty { offset: 0x2000 }));
        let host = PointerInfo { kind: MemoryKind::Host, ..INFO };
        assert_error!(host.check(1), PointerError::HostMemory { runtime: Some("test"), .. });
        let managed = PointerInfo { kind: MemoryKind::Managed, ..INFO };
        assert_error!(managed.check(1), PointerError::ManagedMemory { .. });
    }

    /// What passes the check can be subtracted and added without overflow.
    #[test]
    fn any_numbers_of_a_runtime_are_accepted_or_refused() {
        let edges = [0, 1, 2, 4095, 4096, 1 << 63, u64::MAX - 1, u64::MAX];
        for address in edges {
            for base in edges {
                for size in edges {
                    for length in edges {
                        let info = PointerInfo { address, base, size, ..INFO };
                        let inside = length > 0
                            && address >= base
                            && u128::from(address - base) + u128::from(length) <= size.into()
                            && address.checked_add(length).is_some();
                        let answer = info.check(length);
                        assert_eq!(answer.is_ok(), inside, "{info:?}, {length}: {answer:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn another_allocation_at_the_same_address_is_another() {
        assert!(INFO.check_alive(Some(INFO)).is_ok());
        let other = PointerInfo { id: Some(8), ..INFO };
        assert_error!(INFO.check_alive(Some(other)), PointerError::Freed { .. });
        assert_error!(INFO.check_alive(None), PointerError::Freed { .. });
    }

    #[test]
    fn an_address_of_no_runtime_is_host_memory() {
        let none = Runtimes::new(Vec::new());
        assert_eq!(none.find(0x1000).unwrap(), None);
        assert_error!(none.find(0), PointerError::NullPointer);
        let error = none.export(0x1000, 1).unwrap_err().to_string();
        assert!(error.contains("0x1000 is host memory, which") && error.contains("udmabuf"), "{error}");
    }
}
