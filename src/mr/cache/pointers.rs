//! Memory of runtimes in the cache, by pointer.
//!
//! Each export of an allocation may be a dma-buf of its own, so the key of such an entry is the allocation: its runtime,
//! device, base, size, and the number that the runtime never uses again. Memory mapped into reserved addresses has no
//! such number; there a hit asks the runtime whether the mappings are still those that were exported.

use std::ops::Range;
use std::sync::Arc;

use dma_sg::pci::PciAddress;

use super::entries::{Key, Memory, touches};
use super::{Growth, Inner, RegionCache, Registered, Wanted};
use crate::exporter::{ExportOptions, ExportedRange, Extent, MemoryKind, PointerError, PointerInfo, Runtime};
use crate::kind::ErrorKind;
use crate::mr::{Access, MemoryRegion, Path, RegionSlice, RegisterError};
use crate::verbs::ProtectionDomain;

type Result<T, E = RegisterError> = std::result::Result<T, E>;

/// An allocation of a runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allocation {
    pub runtime: &'static str,
    pub device: Option<PciAddress>,
    pub base: u64,
    pub size: u64,
    /// `None` for memory mapped into reserved addresses.
    pub id: Option<u64>,
}

impl Allocation {
    fn of(info: &PointerInfo) -> Self {
        let PointerInfo { runtime, device, base, size, .. } = *info;
        let id = info.id.filter(|_| info.kind != MemoryKind::Virtual);
        Self { runtime, device, base, size, id }
    }

    fn addresses(&self) -> Range<u64> {
        self.base..self.base.saturating_add(self.size)
    }
}

/// What a runtime exported. It holds a descriptor of each dma-buf, so that several devices import one dma-buf: a GPU maps
/// each dma-buf through its window (BAR1) anew.
pub(super) struct Exported {
    base: u64,
    ranges: Vec<ExportedRange>,
    /// The bytes of the allocation that the ranges have.
    pub(super) covers: Range<u64>,
}

impl Exported {
    /// `wanted` is the range of the allocation that was requested.
    pub(super) fn new(info: &PointerInfo, wanted: &Range<u64>, ranges: Vec<ExportedRange>) -> Self {
        let before = ranges.first().map_or(0, |first| first.range().start - first.memory().start);
        let after = ranges.last().map_or(0, |last| last.memory().end - last.range().end);
        let covers = wanted.start.saturating_sub(before)..wanted.end.saturating_add(after);
        Self { base: info.base, ranges, covers }
    }

    pub(super) fn is_watched(&self) -> bool {
        self.ranges.iter().any(ExportedRange::is_watched)
    }

    /// Whether a later request could not tell if the memory is still the exported one: another crate's runtime has no
    /// witness of what is mapped into reserved addresses.
    pub(super) fn is_untold(&self, of: &Memory) -> bool {
        matches!(of, Memory::Allocation(Allocation { id: None, .. })) && !self.is_watched()
    }

    /// Checks that the ranges have all bytes that were requested.
    fn check(&self, info: &PointerInfo) -> Result<()> {
        let lengths = self.ranges.iter().map(|range| range.memory().end - range.memory().start);
        let (found, needed) = (lengths.fold(0, u64::saturating_add), self.covers.end - self.covers.start);
        if found == needed {
            return Ok(());
        }
        let what = format!("dma-bufs of {found} bytes for {needed} bytes around {:#x}", info.address);
        Err(PointerError::InvalidAnswer { runtime: info.runtime, call: "the export", what }.into())
    }

    /// Whether this range of the allocation still has the memory that was exported. Asks the runtime.
    fn is_current(&self, range: &Range<u64>) -> bool {
        let addresses = self.base + range.start..self.base + range.end;
        self.ranges.first().is_some_and(|first| first.is_current(addresses))
    }
}

/// A request for memory at a pointer.
struct Request<'a> {
    domain: &'a ProtectionDomain,
    runtime: &'a dyn Runtime,
    info: PointerInfo,
    length: u64,
    access: Access,
}

impl RegionCache {
    /// Returns a slice of a registered region that covers `length` bytes from a pointer of a runtime, such as
    /// [`Runtimes`](crate::exporter::Runtimes). A hit looks up the pointer and finds the region in the cache. A miss
    /// exports the memory, as [`CacheOptions::extent`](super::CacheOptions::extent) says, registers it and keeps it.
    ///
    /// Memory that is freed and allocated again at the same address is other memory: the runtime's number of the
    /// allocation tells them apart, and for memory mapped into reserved addresses, the handles of the physical memory.
    /// ROCm has neither for memory that it did not allocate from a pool; such memory is exported each time, and its
    /// dma-buf looked up. The memory must stay allocated during the call.
    ///
    /// Memory that another crate's runtime maps into reserved addresses is registered each time, and not kept.
    ///
    /// An entry holds one descriptor of the exported dma-buf, and a registration on another device takes the same
    /// dma-buf. It keeps freed memory allocated until its addresses are looked up again, or until
    /// [`invalidate_pointer`](Self::invalidate_pointer). An entry of memory without a number is one of
    /// [`get`](Self::get): only eviction, [`invalidate`](Self::invalidate) and [`clear`](Self::clear) remove it.
    ///
    /// With [`Path::DataDirect`] among [`CacheOptions::paths`](super::CacheOptions::paths), the memory is exported with
    /// the mapping through the PCIe BAR and registered from offset 0 for the data-direct function. If the driver or the
    /// device refuses that, the other paths take an export with the driver's own mapping.
    ///
    /// # Errors
    /// - [`RegisterError::Pointer`], as [`Runtime::locate`] and [`Runtime::export`].
    /// - [`RegisterError::AccessNotPermitted`], [`RegisterError::LocalWriteMissing`]: the access flags.
    /// - [`RegisterError::CacheFull`]: the entries in use leave no room within the limits.
    /// - On a miss, as [`MemoryRegionBuilder::register`](crate::mr::MemoryRegionBuilder::register).
    pub fn get_pointer(
        &self,
        domain: &ProtectionDomain,
        runtime: &dyn Runtime,
        address: u64,
        length: u64,
        access: Access,
    ) -> Result<RegionSlice> {
        let info = runtime.locate(address)?;
        info.check(length)?;
        let request = Request { domain, runtime, info, length, access };
        if info.id.is_none() {
            return self.by_buffer(&request);
        }
        let start = info.address - info.base;
        let of = Allocation::of(&info);
        let key = Key::of_allocation(domain, of, access);
        let wanted = Wanted { key, range: start..start + length, size: info.size };
        // Several entries may cover the range, and a miss takes any of them.
        while let Some((slice, watched)) = self.inner.find(&wanted) {
            match watched {
                Some(changed) if !changed.is_current(&wanted.range) => self.inner.forget(&changed),
                _ => return Ok(slice),
            }
        }
        access.check_flags()?;
        // What was there before was freed.
        self.inner.remove_if(|key| match &key.memory {
            Memory::Allocation(other) => {
                other.runtime == of.runtime && *other != of && touch(&other.addresses(), &of.addresses())
            }
            Memory::Buffer(_) => false,
        });
        let growth = match self.inner.options.extent {
            Extent::Allocation => Growth::Whole,
            Extent::Range => Growth::Exact,
        };
        self.inner.miss(&wanted, growth, |range| {
            let whole = range != wanted.range;
            self.inner.register(&request, &of, &wanted.range, whole)
        })
    }

    /// Removes the entries of all allocations that have one of `length` bytes from an address, and returns how many. Call
    /// it when you free device memory: an entry keeps the memory allocated. The memory may be freed already. Entries of
    /// memory whose [`PointerInfo::id`] is `None` are of dma-bufs, and stay.
    pub fn invalidate_pointer(&self, address: u64, length: u64) -> usize {
        let range = address..address.saturating_add(length);
        self.inner.remove_if(|key| match &key.memory {
            Memory::Allocation(of) => touch(&of.addresses(), &range),
            Memory::Buffer(_) => false,
        })
    }

    /// Inserts a unit test's region of a whole allocation.
    #[cfg(test)]
    pub(in crate::mr) fn insert_pointer_for_test(
        &self,
        domain: &ProtectionDomain,
        info: &PointerInfo,
        region: MemoryRegion,
        ranges: Vec<ExportedRange>,
    ) {
        let key = Key::of_allocation(domain, Allocation::of(info), region.access());
        let range = 0..region.len();
        let exported = (!ranges.is_empty()).then(|| Arc::new(Exported::new(info, &range, ranges)));
        let kept = super::Kept { slice: region.into(), exported };
        self.inner.write().insert(key, range, Growth::Exact, kept, &mut Vec::new());
    }

    /// Memory without an identity of its own: exports it, and looks up its dma-bufs.
    fn by_buffer(&self, request: &Request<'_>) -> Result<RegionSlice> {
        let Request { domain, runtime, info, length, access } = request;
        let options = ExportOptions::default().extent(self.inner.options.extent);
        let parts = runtime.export(info, *length, options)?;
        let slices = parts.iter().map(|part| self.get(domain, &part.dmabuf, part.range(), *access));
        match <[RegionSlice; 1]>::try_from(slices.collect::<Result<Vec<_>>>()?) {
            Ok([slice]) => Ok(slice),
            Err(slices) => Ok(RegionSlice::concat(slices)?),
        }
    }
}

/// Whether the driver, the provider or the device refused what it was asked for.
fn is_refusal(error: &RegisterError) -> bool {
    matches!(error, RegisterError::Refused { .. } | RegisterError::NoPath { .. })
        || error.kind() == ErrorKind::Unsupported
}

/// Whether two ranges have a byte in common.
fn touch(range: &Range<u64>, other: &Range<u64>) -> bool {
    touches(range, other) && range.start < other.end && other.start < range.end
}

impl Inner {
    /// Removes the entries of an export whose memory has changed.
    fn forget(&self, changed: &Arc<Exported>) {
        let mut removed = Vec::new();
        self.write().remove_exported(changed, &mut removed);
    }

    /// Registers the whole allocation, or the requested range, on the first path that takes it.
    fn register(
        &self,
        request: &Request<'_>,
        of: &Allocation,
        wanted: &Range<u64>,
        whole: bool,
    ) -> Result<Registered> {
        const DATA_DIRECT: &[Path] = &[Path::DataDirect];
        let others: Vec<Path> =
            self.options.paths.iter().copied().filter(|path| *path != Path::DataDirect).collect();
        if others.len() == self.options.paths.len() {
            return self.register_mapped(request, of, wanted, whole, (false, &others));
        }
        match self.register_mapped(request, of, wanted, whole, (true, DATA_DIRECT)) {
            Err(error) if !others.is_empty() && is_refusal(&error) => {
                tracing::debug!(%error, "no data-direct registration");
                self.register_mapped(request, of, wanted, whole, (false, &others))
            }
            answer => answer,
        }
    }

    fn register_mapped(
        &self,
        request: &Request<'_>,
        of: &Allocation,
        wanted: &Range<u64>,
        whole: bool,
        (pcie, paths): (bool, &[Path]),
    ) -> Result<Registered> {
        let Request { domain, runtime, info, length, access } = request;
        let kept = self.read().exported(of, wanted);
        let same = |kept: &Arc<Exported>| {
            kept.ranges.iter().all(|range| range.pcie == pcie) && kept.is_current(wanted)
        };
        // A request of another domain or with other flags exports nothing anew.
        let exported = match kept.filter(same) {
            Some(exported) => exported,
            None => {
                let extent = if whole { Extent::Allocation } else { Extent::Range };
                let options = ExportOptions::default().extent(extent).pcie(pcie);
                Arc::new(Exported::new(info, wanted, runtime.export(info, *length, options)?))
            }
        };
        exported.check(info)?;
        let target = if whole { exported.covers.clone() } else { wanted.clone() };
        let mut next = exported.covers.start;
        let register = |part: &ExportedRange| -> Option<Result<RegionSlice>> {
            let memory = part.memory();
            let at = next;
            next += memory.end - memory.start;
            // The part of it that is registered, in the allocation and then in the dma-buf.
            let range = at.max(target.start)..next.min(target.end);
            (!range.is_empty()).then(|| {
                let (start, end) = (memory.start + (range.start - at), memory.start + (range.end - at));
                // The data-direct function of GB300 takes no other offset than 0.
                let first = if pcie { 0 } else { start };
                let builder = MemoryRegion::builder(domain, &part.dmabuf).range(first..end).access(*access);
                Ok(builder.paths(paths).register()?.slice(start - first..)?)
            })
        };
        let parts = exported.ranges.iter().filter_map(register).collect::<Result<Vec<_>>>()?;
        let slice = match <[RegionSlice; 1]>::try_from(parts) {
            Ok([slice]) => slice,
            Err(slices) => RegionSlice::concat(slices)?,
        };
        Ok(Registered { slice, range: target, exported: Some(exported) })
    }
}
