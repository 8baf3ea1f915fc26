//! Exports memory of a CUDA device.
//!
//! `unsafe` is here for entering the memory's context and for the descriptor that the driver returns.

use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use dma_sg::page_size;

use super::api::{Attributes, Context, Refused, code};
use super::context::Primary;
use super::mappings::Mappings;
use super::{Cuda, LIBRARY, UNSUPPORTED, no_device, not_exportable};
use crate::dmabuf::DmaBuf;
use crate::exporter::library::{check_descriptor, out_of_descriptors};
use crate::exporter::runtime::{
    ExportOptions, ExportedRange, Extent, MemoryKind, PointerInfo, Witness, pages_around,
};
use crate::exporter::{Exporter, PointerError};

type Result<T, E = PointerError> = std::result::Result<T, E>;

/// Why one way of exporting a range did not succeed.
enum Refusal {
    /// Another way may.
    Way(PointerError),
    /// No other way will.
    Memory(PointerError),
}

impl Cuda {
    /// Exports memory that was looked up, with its own context or the primary one current.
    pub(super) fn export_found(
        &self,
        info: &PointerInfo,
        attributes: &Attributes,
        length: u64,
        options: ExportOptions,
    ) -> Result<Vec<ExportedRange>> {
        let _span = crate::observe::exporting(|| Exporter::name(self), length);
        let export = Export { cuda: self, info, length, options };
        let context = attributes.context as Context;
        if context.is_null() {
            // Such memory belongs to a device but to no context.
            let ordinal = usize::try_from(attributes.ordinal).map_err(|_| no_device())?;
            return Primary::retain(&self.driver, ordinal)?.inside(|| Ok(export.ranges()))?;
        }
        let api = &self.driver.api;
        // SAFETY: the memory was alive a moment ago, and so was its context. The owner must not free either
        // during the export, and the driver checks the handle.
        let _entered = unsafe { api.enter(context) }.map_err(|refused| match refused.code {
            // The context took the memory with it.
            code::CONTEXT_IS_DESTROYED => {
                PointerError::Freed { runtime: LIBRARY.runtime, address: info.address }
            }
            _ => api.error(refused),
        })?;
        export.ranges()
    }
}

/// A request, with the memory's context current.
struct Export<'a> {
    cuda: &'a Cuda,
    info: &'a PointerInfo,
    length: u64,
    options: ExportOptions,
}

impl Export<'_> {
    /// The requested addresses. `PointerInfo::check` has shown that their end fits.
    fn wanted(&self) -> Range<u64> {
        self.info.address..self.info.address + self.length
    }

    fn ranges(&self) -> Result<Vec<ExportedRange>> {
        if self.info.kind == MemoryKind::Virtual {
            return self.mapped();
        }
        let allocation = self.info.base..self.info.base.saturating_add(self.info.size);
        self.first_of(&[self.wanted(), allocation.clone()], &allocation, None).map_err(Refusal::into)
    }

    /// Memory mapped into reserved addresses: one dma-buf across the mappings, or one for each.
    fn mapped(&self) -> Result<Vec<ExportedRange>> {
        let find = |extent| Mappings::find(&self.cuda.driver, self.info, self.length, extent);
        let mappings = Arc::new(find(self.options.extent)?);
        let all = mappings.addresses();
        let witness: Arc<dyn Witness> = mappings.clone();
        let refused = match self.first_of(&[self.wanted(), all.clone()], &all, Some(&witness)) {
            Err(Refusal::Way(refused)) if mappings.each().nth(1).is_some() => refused,
            answer => return answer.map_err(Refusal::into),
        };
        tracing::debug!(error = %refused, "a range across mappings was refused: exporting each by itself");
        let wanted = self.wanted();
        let touched = mappings.each().filter(|each| each.start < wanted.end && wanted.start < each.end);
        let piece = |mapping: &Range<u64>| {
            let part = wanted.start.max(mapping.start)..wanted.end.min(mapping.end);
            self.one(mapping, mapping, part, Some(&witness)).map_err(Refusal::into)
        };
        touched.map(piece).collect()
    }

    /// The first of these addresses that the driver exports, in the order that the extent asks for. `memory` belongs to
    /// one allocation.
    fn first_of(
        &self,
        addresses: &[Range<u64>; 2],
        memory: &Range<u64>,
        witness: Option<&Arc<dyn Witness>>,
    ) -> Result<Vec<ExportedRange>, Refusal> {
        let [range, allocation] = addresses;
        let (first, second) = match self.options.extent {
            Extent::Range => (range, allocation),
            Extent::Allocation => (allocation, range),
        };
        let one = |way: &Range<u64>| self.one(way, memory, self.wanted(), witness).map(|range| vec![range]);
        match one(first) {
            Err(Refusal::Way(_)) if self.pages(first).ok() != self.pages(second).ok() => one(second),
            answer => answer,
        }
    }

    fn pages(&self, addresses: &Range<u64>) -> Result<(u64, u64)> {
        let Range { start, end } = *addresses;
        pages_around(start, end - start, page_size())
            .ok_or_else(|| self.info.past(self.length, self.info.base, self.info.size))
    }

    /// One dma-buf of the pages around `addresses`, of which `part` was requested.
    fn one(
        &self,
        addresses: &Range<u64>,
        memory: &Range<u64>,
        part: Range<u64>,
        witness: Option<&Arc<dyn Witness>>,
    ) -> Result<ExportedRange, Refusal> {
        let (start, length) = self.pages(addresses).map_err(Refusal::Memory)?;
        let (dmabuf, pcie) = self.dmabuf(start, length)?;
        let in_buffer = |range: &Range<u64>| {
            range.start.max(start) - start..range.end.min(start.saturating_add(length)) - start
        };
        let (size, memory) = (dmabuf.size(), in_buffer(memory));
        let nonsense = |_| {
            let what = format!("a dma-buf of {size} bytes for {length} bytes from {start:#x}");
            let (runtime, call) = (LIBRARY.runtime, "cuMemGetHandleForAddressRange");
            Refusal::Memory(PointerError::InvalidAnswer { runtime, call, what })
        };
        let dmabuf = dmabuf.with_device(self.info.device).with_pcie_mapping(pcie);
        let range = ExportedRange::new(dmabuf, in_buffer(&part)).map_err(nonsense)?;
        let mut range = range.with_memory(memory).map_err(nonsense)?.with_witness(witness.cloned());
        range.pcie = pcie;
        range.sync_memops = self.options.sync_memops && self.sync_memops(part.start)?;
        Ok(range)
    }

    /// A dma-buf of whole pages, and whether it is mapped through the PCIe BAR.
    fn dmabuf(&self, start: u64, length: u64) -> Result<(DmaBuf, bool), Refusal> {
        let api = &self.cuda.driver.api;
        let export = |pcie| api.export(start, length, pcie).map(|fd| (fd, pcie));
        let exported = match export(self.options.pcie) {
            // An older driver does not know the flag, and a GPU with PCIe as its only path refuses it.
            Err(Refused { code: code::NOT_SUPPORTED | code::INVALID_VALUE, .. }) if self.options.pcie => {
                export(false)
            }
            answer => answer,
        };
        let (fd, pcie) = exported.map_err(|refused| {
            if let Some(exhausted) = out_of_descriptors(LIBRARY.runtime) {
                return Refusal::Memory(exhausted);
            }
            match refused.code {
                code::NOT_SUPPORTED => Refusal::Memory(not_exportable(self.unsupported())),
                // A limit of the driver's, on ranges or on the window that they are mapped through.
                code::INVALID_VALUE => Refusal::Way(not_exportable(self.refused())),
                code::OUT_OF_MEMORY => Refusal::Way(api.error(refused)),
                _ => Refusal::Memory(api.error(refused)),
            }
        })?;
        check_descriptor(fd, LIBRARY.runtime, UNSUPPORTED).map_err(Refusal::Memory)?;
        // SAFETY: the driver has just made this descriptor for the caller.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok((DmaBuf::from_fd(fd).map_err(|error| Refusal::Memory(error.into()))?, pcie))
    }

    fn unsupported(&self) -> &'static str {
        if self.info.kind == MemoryKind::Pool { super::POOLED } else { UNSUPPORTED }
    }

    fn refused(&self) -> &'static str {
        if self.info.kind == MemoryKind::Pool { super::POOLED } else { super::REFUSED }
    }

    /// Makes synchronous memory operations always synchronize; false if the driver cannot.
    fn sync_memops(&self, address: u64) -> Result<bool, Refusal> {
        let api = &self.cuda.driver.api;
        let synced = match api.sync_memory(address) {
            // Memory of no context: UCX sets the flag of the context too.
            Err(Refused { code: code::NOT_SUPPORTED, .. }) => api.sync_context(),
            answer => answer.map(|()| true),
        };
        match synced {
            Ok(false) => {
                tracing::debug!("the driver has neither SYNC_MEMOPS for this memory nor for a context");
                Ok(false)
            }
            Err(Refused { code: code::NOT_SUPPORTED, .. }) => Ok(false),
            answer => answer.map_err(|refused| Refusal::Memory(api.error(refused))),
        }
    }
}

impl From<Refusal> for PointerError {
    fn from(refusal: Refusal) -> Self {
        let (Refusal::Way(error) | Refusal::Memory(error)) = refusal;
        error
    }
}
