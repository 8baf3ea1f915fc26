//! From a pointer to the dma-buf that it lies in: what a GPU's runtime says about its memory.
//!
//! ```no_run
//! use dmabuf_rdma::exporter::Runtimes;
//! use dmabuf_rdma::mr::MemoryRegion;
//! # use dmabuf_rdma::verbs::ProtectionDomain;
//! # fn register(domain: &ProtectionDomain, address: u64, length: u64) -> dmabuf_rdma::Result<()> {
//! let exported = Runtimes::loaded()?.export(address, length)?;
//! for piece in exported.pieces() {
//!     let region =
//!         MemoryRegion::builder(domain, &piece.dmabuf).range(piece.offset, piece.length).register()?;
//! }
//! # Ok(())
//! # }
//! ```

use std::fmt;

#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
use super::Allocation;
use crate::dmabuf::DmaBuf;
use crate::error::ExporterError;
use crate::pci::PciAddress;
use crate::umem::page_size;
use crate::{Error, Result};

/// A runtime that hands out pointers and can say what is under one.
///
/// Addresses are those that the runtime's allocator returned or any inside; they are numbers here,
/// and nothing is read through them.
pub trait Runtime: fmt::Debug + Send + Sync {
    /// Its name: `CUDA`, `ROCm`, `Level Zero`.
    fn name(&self) -> &'static str;

    /// What is at an address; `None` when it is not this runtime's, or was freed.
    ///
    /// # Errors
    /// - [`ExporterError::NullPointer`].
    /// - [`ExporterError::RuntimeCall`]: the runtime failed, which an unknown address does not make it.
    fn find(&self, address: u64) -> Result<Option<Found>>;

    /// Exports `length` bytes from the address that was found, in as many pieces as there are
    /// allocations, in order and without gaps.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`ExporterError::PastAllocation`]: the range.
    /// - [`ExporterError::HostMemory`], [`ExporterError::ManagedMemory`]: memory of a kind that is not
    ///   exported.
    /// - [`ExporterError::Freed`]: it is not what was found any more.
    /// - [`ExporterError::NotExportable`]: the device or its driver does not, or not this memory.
    /// - [`ExporterError::OutOfDescriptors`] (`EMFILE`), [`ExporterError::RuntimeCall`].
    fn export(&self, found: &Found, length: u64) -> Result<Exported>;

    /// Exports `length` bytes from `address`, which has to be this runtime's.
    ///
    /// # Errors
    /// [`ExporterError::ForeignPointer`]: it is not; else as [`find`](Self::find) and
    /// [`export`](Self::export).
    fn export_at(&self, address: u64, length: u64) -> Result<Exported> {
        match self.find(address)? {
            Some(found) => self.export(&found, length),
            None => Err(foreign(self.name(), address)),
        }
    }
}

/// What a runtime has at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The runtime's name.
    pub runtime: &'static str,
    /// The address that was asked for.
    pub address: u64,
    /// First byte of the allocation, or of the range that several are mapped into.
    pub base: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where the memory is.
    pub kind: MemoryKind,
    /// The runtime's number of this allocation, never used again by this process; `None` where it has none.
    pub id: Option<u64>,
    /// The PCI device whose memory it is, `None` for host memory and where the runtime does not say.
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
    /// Where it was used last.
    Managed,
}

impl Found {
    /// Refuses what has no dma-buf, and a range of `length` bytes from the address that is empty or ends past
    /// the allocation.
    ///
    /// # Errors
    /// [`ExporterError::HostMemory`], [`ExporterError::ManagedMemory`], [`Error::ZeroLength`],
    /// [`ExporterError::PastAllocation`].
    pub fn check(&self, length: u64) -> Result<()> {
        let (runtime, address) = (self.runtime, self.address);
        match self.kind {
            MemoryKind::Device => {}
            MemoryKind::Host => {
                return Err(ExporterError::HostMemory { runtime: Some(runtime), address }.into());
            }
            MemoryKind::Managed => return Err(ExporterError::ManagedMemory { runtime, address }.into()),
        }
        if length == 0 {
            return Err(Error::ZeroLength { offset: address - self.base });
        }
        let end = address.checked_add(length);
        if end.is_none_or(|end| end > self.base.saturating_add(self.size)) {
            return Err(self.past(length, self.base, self.size));
        }
        Ok(())
    }

    /// The range is not all in an allocation of `size` bytes from `base`.
    pub(super) fn past(&self, length: u64, base: u64, size: u64) -> Error {
        let (runtime, address) = (self.runtime, self.address);
        ExporterError::PastAllocation { runtime, address, length, base, size }.into()
    }

    /// The allocation is there as before, given what is at the address now.
    #[cfg(any(test, feature = "cuda", feature = "hsa", feature = "level-zero"))]
    pub(super) fn check_alive(&self, now: Option<Self>) -> Result<()> {
        match now {
            Some(now) if now == *self => Ok(()),
            _ => Err(ExporterError::Freed { runtime: self.runtime, address: self.address }.into()),
        }
    }
}

/// A range of device memory as dma-bufs: one, or several where it spans several allocations.
#[derive(Debug)]
pub struct Exported {
    found: Found,
    pieces: Vec<Piece>,
}

/// A part of the range, in one dma-buf.
#[derive(Debug)]
#[non_exhaustive]
pub struct Piece {
    /// The buffer.
    pub dmabuf: DmaBuf,
    /// Where the part begins in the buffer, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// How a device that imports it is to reach it.
    pub route: Route,
}

/// How a device that imports device memory is to reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Route {
    /// As the driver chooses.
    #[default]
    Default,
    /// Over PCIe, through the BAR, also where there is a nearer way, such as NVLink to the processor.
    Pcie,
}

impl Exported {
    /// The parts of a range, in order of their addresses and without gaps.
    pub fn new(found: &Found, pieces: Vec<Piece>) -> Self {
        Self { found: *found, pieces }
    }

    /// What the range is in.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// The parts in order of their addresses, without gaps; never none.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Length of all parts in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range is refused
    pub fn len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.length).sum()
    }

    /// The parts, to own.
    pub fn into_pieces(self) -> Vec<Piece> {
        self.pieces
    }

    /// The one buffer of an allocation that was just made.
    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
    pub(super) fn into_allocation(self) -> Result<Allocation> {
        let mut pieces = self.pieces;
        let piece = pieces.pop().filter(|_| pieces.is_empty());
        let runtime = self.found.runtime;
        let remedy = "a new allocation came in several parts, which an exporter cannot give as one buffer";
        let piece = piece.ok_or(ExporterError::NotExportable { runtime, remedy })?;
        Ok(Allocation { dmabuf: piece.dmabuf, backing: None })
    }
}

impl Piece {
    /// A part of a buffer, which has to contain it.
    ///
    /// # Errors
    /// [`Error::ZeroLength`], [`Error::OutOfRange`].
    pub fn new(dmabuf: DmaBuf, offset: u64, length: u64, route: Route) -> Result<Self> {
        crate::umem::check_range(offset, length, dmabuf.size())?;
        Ok(Self { dmabuf, offset, length, route })
    }
}

/// All runtimes that may own a pointer.
#[derive(Debug, Default)]
pub struct Runtimes {
    all: Vec<Box<dyn Runtime>>,
}

impl Runtimes {
    /// Those of the features `cuda`, `hsa` and `level-zero` whose library is loaded in this process: a
    /// pointer of one that is not loaded cannot exist. Loads none itself.
    ///
    /// # Errors
    /// As the runtimes' own `load`, except that a runtime without a device is left out.
    pub fn loaded() -> Result<Self> {
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
    fn add<R: Runtime + 'static>(all: &mut Vec<Box<dyn Runtime>>, runtime: Result<Option<R>>) -> Result<()> {
        match runtime {
            Ok(runtime) => all.extend(runtime.map(|runtime| Box::new(runtime) as Box<dyn Runtime>)),
            // Without a device it has no memory that a pointer could be in.
            Err(Error::Exporters(ExporterError::NoDevice { .. })) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// These, asked in this order; also for runtimes of your own.
    pub fn new(all: Vec<Box<dyn Runtime>>) -> Self {
        Self { all }
    }

    /// Names of the runtimes, in the order in which they are asked.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.all.iter().map(|runtime| runtime.name())
    }

    /// What is at an address; `None` for host memory, which no runtime knows.
    ///
    /// # Errors
    /// As [`Runtime::find`].
    pub fn find(&self, address: u64) -> Result<Option<Found>> {
        Ok(self.owner(address)?.map(|(_, found)| found))
    }

    /// Exports `length` bytes from `address`, whichever runtime's they are.
    ///
    /// # Errors
    /// [`ExporterError::HostMemory`] when no runtime knows the address; else as [`Runtime::export`].
    pub fn export(&self, address: u64, length: u64) -> Result<Exported> {
        match self.owner(address)? {
            Some((runtime, found)) => runtime.export(&found, length),
            None => Err(ExporterError::HostMemory { runtime: None, address }.into()),
        }
    }

    fn owner(&self, address: u64) -> Result<Option<(&dyn Runtime, Found)>> {
        not_null(address)?;
        for runtime in &self.all {
            if let Some(found) = runtime.find(address)? {
                return Ok(Some((runtime.as_ref(), found)));
            }
        }
        Ok(None)
    }
}

/// The runtime knows no allocation there.
pub(super) fn foreign(runtime: &'static str, address: u64) -> Error {
    ExporterError::ForeignPointer { runtime, address }.into()
}

pub(super) fn not_null(address: u64) -> Result<()> {
    if address == 0 { Err(ExporterError::NullPointer.into()) } else { Ok(()) }
}

/// The whole pages around `length` bytes from `address`: their first byte and length. Drivers export
/// whole pages of the host, which may be 64 KiB.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) fn pages_around(address: u64, length: u64, page: u64) -> Option<(u64, u64)> {
    let start = address - address % page;
    let end = address.checked_add(length)?.checked_next_multiple_of(page)?;
    Some((start, end - start))
}

/// The same with pages of this host.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) fn host_pages_around(address: u64, length: u64) -> Option<(u64, u64)> {
    pages_around(address, length, page_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUND: Found = Found {
        runtime: "test",
        address: 0x7f00_0010_2000,
        base: 0x7f00_0010_0000,
        size: 1 << 20,
        kind: MemoryKind::Device,
        id: Some(7),
        device: None,
    };

    #[test]
    fn exports_are_of_whole_pages_of_whatever_size() {
        assert_eq!(pages_around(0x10_0200, 0x200, 4096), Some((0x10_0000, 4096)));
        assert_eq!(pages_around(0x10_0000, 0x1000, 4096), Some((0x10_0000, 4096)));
        assert_eq!(pages_around(0x10_fe00, 0x400, 4096), Some((0x10_f000, 8192)));
        assert_eq!(pages_around(0x11_1200, 0x200, 64 << 10), Some((0x11_0000, 64 << 10)));
        assert_eq!(pages_around(0x11_f000, 0x2000, 64 << 10), Some((0x11_0000, 128 << 10)));
        assert_eq!(pages_around(u64::MAX - 10, 100, 4096), None);
    }

    #[test]
    fn ranges_end_inside_the_allocation() {
        assert!(FOUND.check((1 << 20) - 0x2000).is_ok());
        assert_error!(FOUND.check((1 << 20) - 0x1fff), ExporterError::PastAllocation { size: 0x10_0000, .. });
        assert_error!(FOUND.check(u64::MAX), ExporterError::PastAllocation { .. });
        assert!(matches!(FOUND.check(0), Err(Error::ZeroLength { offset: 0x2000 })));
        let host = Found { kind: MemoryKind::Host, ..FOUND };
        assert_error!(host.check(1), ExporterError::HostMemory { runtime: Some("test"), .. });
        let managed = Found { kind: MemoryKind::Managed, ..FOUND };
        assert_error!(managed.check(1), ExporterError::ManagedMemory { .. });
    }

    #[test]
    fn another_allocation_at_the_same_address_is_another() {
        assert!(FOUND.check_alive(Some(FOUND)).is_ok());
        assert_error!(FOUND.check_alive(Some(Found { id: Some(8), ..FOUND })), ExporterError::Freed { .. });
        assert_error!(FOUND.check_alive(None), ExporterError::Freed { .. });
    }

    #[test]
    fn what_no_runtime_knows_is_host_memory() {
        let none = Runtimes::new(Vec::new());
        assert_eq!(none.find(0x1000).unwrap(), None);
        assert_error!(none.find(0), ExporterError::NullPointer);
        let error = none.export(0x1000, 1).unwrap_err().to_string();
        assert!(error.contains("0x1000 is host memory, of which") && error.contains("udmabuf"), "{error}");
    }
}
