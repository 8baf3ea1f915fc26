//! Physical memory mapped into reserved addresses: `cuMemCreate`, `cuMemMap`.
//!
//! Nothing in the attributes of a pointer tells for certain that an address was mapped anew: whether
//! `CU_POINTER_ATTRIBUTE_BUFFER_ID` changes then is not documented. The handle of the physical memory tells: the
//! driver documents that it returns the handle that was mapped, and a handle that is retained is given to no other
//! memory. So the mappings of an export retain theirs.
//!
//! `unsafe` is here for releasing handles.

use std::ops::Range;
use std::sync::Arc;

use super::api::{Handle, Refused, code};
use super::{Driver, no_device};
use crate::exporter::PointerError;
use crate::exporter::runtime::{Extent, PointerInfo, Witness};
use crate::observe::Process;

/// Mappings side by side, of one device.
#[derive(Debug)]
pub(super) struct Mappings {
    driver: Arc<Driver>,
    /// In the order of their addresses, without gaps. At least one.
    all: Vec<Mapping>,
    creator: Process,
}

#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) addresses: Range<u64>,
    /// Retained once.
    handle: Handle,
    ordinal: i32,
    rdma_capable: bool,
}

/// What is at an address of a reservation.
enum Found {
    Mapping(Mapping),
    Hole,
}

impl Mappings {
    /// The mappings of the range, or of all addresses around it up to the next gap. A context must be current.
    pub(super) fn find(
        driver: &Arc<Driver>,
        info: &PointerInfo,
        length: u64,
        extent: Extent,
    ) -> Result<Self, PointerError> {
        let mut found = Self { driver: Arc::clone(driver), all: Vec::new(), creator: Process::current() };
        let end = info.address + length;
        let mut at = info.address;
        while at < end {
            let refused = |base: u64, until: u64| Err(info.past(length, base, until - base));
            match found.mapping(info, at)? {
                Found::Hole if found.all.is_empty() => {
                    return Err(PointerError::Freed { runtime: info.runtime, address: info.address });
                }
                Found::Hole => return refused(found.addresses().start, at),
                Found::Mapping(mapping) => {
                    let other = found.all.first().is_some_and(|first| first.ordinal != mapping.ordinal);
                    let (capable, next) = (mapping.rdma_capable, mapping.addresses.end);
                    let start =
                        found.all.first().map_or(mapping.addresses.start, |first| first.addresses.start);
                    found.all.push(mapping);
                    if other {
                        return refused(start, at);
                    }
                    if !capable {
                        return Err(super::not_exportable(super::NOT_CAPABLE));
                    }
                    at = next;
                }
            }
        }
        if extent == Extent::Allocation {
            found.widen(info)?;
        }
        Ok(found)
    }

    /// Adds the mappings before and after these, up to a gap, another device or memory that cannot be exported.
    fn widen(&mut self, info: &PointerInfo) -> Result<(), PointerError> {
        let (first, last) = (info.base, info.base.saturating_add(info.size));
        let ordinal = self.all.first().ok_or_else(no_device)?.ordinal;
        while self.addresses().end < last {
            match self.mapping(info, self.addresses().end)? {
                Found::Mapping(next) if next.ordinal == ordinal && next.rdma_capable => self.all.push(next),
                found => {
                    self.discard(found);
                    break;
                }
            }
        }
        let mut before = Vec::new();
        let mut start = self.addresses().start;
        while start > first {
            match self.mapping(info, start - 1) {
                Ok(Found::Mapping(next)) if next.ordinal == ordinal && next.rdma_capable => {
                    start = next.addresses.start;
                    before.push(next);
                }
                found => {
                    before.reverse();
                    self.all.splice(..0, before);
                    self.discard(found?);
                    return Ok(());
                }
            }
        }
        before.reverse();
        self.all.splice(..0, before);
        Ok(())
    }

    /// The mapping around an address.
    fn mapping(&self, info: &PointerInfo, at: u64) -> Result<Found, PointerError> {
        let api = &self.driver.api;
        let hole = |refused: Refused| matches!(refused.code, code::NOT_FOUND | code::INVALID_VALUE);
        let (base, size) = match api.address_range(at) {
            Ok(found) => found,
            Err(refused) if hole(refused) => return Ok(Found::Hole),
            Err(refused) => return Err(api.error(refused)),
        };
        let end = base.checked_add(size).filter(|end| (base..*end).contains(&at));
        let end = end.ok_or_else(|| PointerInfo { address: at, ..*info }.impossible(base, size))?;
        let handle = match api.retain_handle(at) {
            Ok(handle) => handle,
            // Unmapped since the call before.
            Err(refused) if hole(refused) => return Ok(Found::Hole),
            Err(refused) => return Err(api.error(refused)),
        };
        // Releases the handle unless the mapping is kept.
        let mut mapping = Mapping { addresses: base..end, handle, ordinal: -1, rdma_capable: false };
        match api.physical(handle) {
            Ok((ordinal, capable)) => (mapping.ordinal, mapping.rdma_capable) = (ordinal, capable),
            Err(refused) => {
                self.release(&mapping);
                return Err(api.error(refused));
            }
        }
        Ok(Found::Mapping(mapping))
    }

    fn discard(&self, found: Found) {
        if let Found::Mapping(mapping) = found {
            self.release(&mapping);
        }
    }

    fn release(&self, mapping: &Mapping) {
        // SAFETY: `mapping` retained the handle, and its owner releases it once.
        if let Err(refused) = unsafe { self.driver.api.release_handle(mapping.handle) } {
            tracing::warn!(error = %self.driver.api.error(refused), "cannot release CUDA memory");
        }
    }

    /// All their addresses.
    pub(super) fn addresses(&self) -> Range<u64> {
        match (self.all.first(), self.all.last()) {
            (Some(first), Some(last)) => first.addresses.start..last.addresses.end,
            _ => 0..0,
        }
    }

    pub(super) fn each(&self) -> impl Iterator<Item = &Range<u64>> {
        self.all.iter().map(|mapping| &mapping.addresses)
    }

    /// Whether an address has this physical memory.
    fn has(&self, address: u64, mapping: &Mapping) -> bool {
        let Ok(handle) = self.driver.api.retain_handle(address) else { return false };
        // SAFETY: retained above, and released once.
        let released = unsafe { self.driver.api.release_handle(handle) };
        released.is_ok() && handle == mapping.handle
    }
}

impl Witness for Mappings {
    /// Compares the memory at the first and the last byte of each mapping. `cuMemMap` maps all of it, so both are the
    /// same only if all between them is.
    fn is_current(&self, addresses: Range<u64>) -> bool {
        let all = self.addresses();
        let first = self.all.partition_point(|mapping| mapping.addresses.end <= addresses.start);
        all.start <= addresses.start
            && addresses.end <= all.end
            && self.all[first..].iter().take_while(|mapping| mapping.addresses.start < addresses.end).all(
                |mapping| {
                    let Range { start, end } = mapping.addresses;
                    self.has(start, mapping) && self.has(end - 1, mapping)
                },
            )
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        if self.creator.is_current() {
            self.all.iter().for_each(|mapping| self.release(mapping));
        }
    }
}
