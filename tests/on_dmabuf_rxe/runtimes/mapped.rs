//! CUDA memory mapped into reserved addresses, as PyTorch's expandable segments are.
#![allow(clippy::single_range_in_vec_init)] // one dma-buf is a list of one range

use std::collections::HashSet;
use std::ops::Range;

use dmabuf_rdma::RemoteSlice;
use dmabuf_rdma::exporter::{Cuda, ExportOptions, ExportedRange, Extent, MemoryKind, PointerError, Runtime};
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::Operation;
use gpu_stubs::Stub;

use super::{CUDA, clean};
use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::peers::Peers;
use crate::common::{assert_same, pattern};

pub const PART: u64 = 256 << 10;

/// A reservation of the stub for so many mappings of `PART` bytes, unmapped when dropped.
pub struct Reservation {
    pub base: u64,
    pub parts: u64,
}

impl Reservation {
    /// Mappings back to back, with one hole at the end.
    pub fn mapped(count: u64, device: i32) -> Self {
        type Map = unsafe extern "C" fn(i32, usize, i32) -> u64;
        // SAFETY: the type in the stub's source.
        let base = unsafe { CUDA.function::<Map>("stub_map")(count as i32, PART as usize, device) };
        assert_ne!(base, 0);
        Self { base, parts: count + 1 }
    }

    /// Only holes.
    pub fn empty(parts: u64) -> Self {
        let size = (parts * PART) as usize;
        // SAFETY: the type in the stub's source.
        let base = unsafe { CUDA.function::<unsafe extern "C" fn(usize) -> u64>("stub_reserve")(size) };
        Self { base, parts }
    }

    pub fn part(&self, part: u64) -> u64 {
        self.base + part * PART
    }

    /// Maps new physical memory.
    pub fn map(&self, part: u64, device: i32, capable: bool) {
        type Create = unsafe extern "C" fn(usize, i32, i32) -> u64;
        type Place = unsafe extern "C" fn(u64, usize, u64, u64) -> i32;
        // SAFETY: the types in the stub's source and in cuda.h. The mapping holds the memory.
        unsafe {
            let handle = CUDA.function::<Create>("stub_create")(PART as usize, device, capable.into());
            let place = CUDA.function::<Place>("stub_place");
            assert_eq!(place(self.base, (self.parts * PART) as usize, self.part(part), handle), 0);
            assert_eq!(CUDA.function::<unsafe extern "C" fn(u64) -> i32>("cuMemRelease")(handle), 0);
        }
    }

    pub fn unmap(&self, part: u64) {
        // SAFETY: the type in the stub's source.
        unsafe { CUDA.function::<unsafe extern "C" fn(u64)>("stub_remove")(self.part(part)) };
    }

    /// The bytes as the processor sees them, which the stub's memory permits.
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let (start, length) = (self.base + range.start, range.end - range.start);
        // SAFETY: the stub maps its memory for the processor at this address, and nothing writes it now.
        unsafe { std::slice::from_raw_parts(start as *const u8, length as usize) }.to_vec()
    }

    /// Fills a mapping.
    pub fn write(&self, part: u64, byte: u8) {
        // SAFETY: as above, and nothing else accesses it now.
        unsafe { std::ptr::write_bytes(self.part(part) as *mut u8, byte, PART as usize) };
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        for part in 0..self.parts {
            // SAFETY: the type in the stub's source. It unmaps up to the next hole.
            unsafe { CUDA.function::<unsafe extern "C" fn(u64)>("stub_unmap")(self.part(part)) };
        }
    }
}

fn ranges(exported: &[ExportedRange]) -> Vec<Range<u64>> {
    exported.iter().map(ExportedRange::range).collect()
}

/// Exports across mappings, with a check of how many dma-bufs the driver made.
fn export(cuda: &Cuda, address: u64, length: u64, extent: Extent, buffers: i32) -> Vec<ExportedRange> {
    let stub: &Stub = &CUDA;
    let before = stub.exports();
    let info = cuda.find(address).unwrap().unwrap();
    assert_eq!(info.kind, MemoryKind::Virtual);
    let exported = cuda.export(&info, length, ExportOptions::default().extent(extent)).unwrap();
    assert_eq!(stub.exports() - before, buffers, "dma-bufs");
    assert!(exported.iter().all(|part| part.dmabuf.pci_device() == info.device));
    exported
}

/// A peer writes each range at its place.
fn write(exported: &[ExportedRange], bytes: &[u8]) {
    let peers = Peers::new();
    let source = heap(bytes.len() as u64);
    source.map().unwrap().write(0, bytes).unwrap();
    let source_region = peers.register(&source);
    let mut at = 0;
    for part in exported {
        let builder = MemoryRegion::builder(&peers.domain, &part.dmabuf);
        let region = builder.range(part.range()).access(Access::REMOTE).register().unwrap();
        let remote = RemoteSlice::from(region.remote()).addr().unwrap();
        let local = source_region.sge(at..at + part.len()).unwrap();
        peers.ours.succeed(Operation::Write { remote }, &[local]);
        at += part.len();
    }
    assert_eq!(at, bytes.len() as u64);
}

#[test]
fn a_range_across_mappings_is_one_buffer() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        let memory = Reservation::mapped(3, 1);
        let info = cuda.find(memory.base + 100).unwrap().unwrap();
        assert_eq!((info.base, info.size), (memory.base, 4 * PART), "the reserved range");
        // Not on page boundaries.
        let (offset, length) = (PART - 8192 + 100, PART + 3 * 8192);
        let exported = export(&cuda, memory.base + offset, length, Extent::Range, 1);
        assert_eq!(
            (ranges(&exported), exported[0].memory()),
            (vec![100..100 + length], 0..PART + 4 * 8192 - 4096)
        );
        let bytes = pattern(length as usize, 31);
        write(&exported, &bytes);
        assert_same(&memory.bytes(offset..offset + length), &bytes, "across three mappings");

        // All mappings up to the hole.
        let exported = export(&cuda, memory.base + offset, 1, Extent::Allocation, 1);
        assert_eq!((ranges(&exported), exported[0].memory()), (vec![offset..offset + 1], 0..3 * PART));
        assert_eq!(exported[0].dmabuf.size(), 3 * PART);
    });
}

/// Hundreds of mappings: one export, not hundreds.
#[test]
fn an_expandable_segment_is_one_buffer() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        let memory = Reservation::mapped(300, 0);
        let exported = export(&cuda, memory.part(299), PART, Extent::Allocation, 1);
        assert_eq!((ranges(&exported), exported[0].memory()), (vec![299 * PART..300 * PART], 0..300 * PART));
        let exported = export(&cuda, memory.base, 300 * PART, Extent::Range, 1);
        assert_eq!(ranges(&exported), vec![0..300 * PART]);
    });
}

/// The way back where a driver exports each mapping only by itself.
#[test]
fn a_driver_that_refuses_several_mappings_exports_each() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        let memory = Reservation::mapped(3, 1);
        CUDA.set("spans", 0);
        let (offset, length) = (PART - 8192, PART + 3 * 8192);
        let exported = export(&cuda, memory.base + offset, length, Extent::Range, 3);
        assert_eq!(ranges(&exported), [PART - 8192..PART, 0..PART, 0..2 * 8192]);
        let ids: HashSet<_> = exported.iter().map(|part| part.dmabuf.id()).collect();
        assert_eq!(ids.len(), 3);
        let bytes = pattern(length as usize, 32);
        write(&exported, &bytes);
        assert_same(&memory.bytes(offset..offset + length), &bytes, "three mappings side by side");
        // One mapping needs no way back, and the whole run is refused before it.
        export(&cuda, memory.base + 4096, 8192, Extent::Range, 1);
        let exported = export(&cuda, memory.base + 4096, 8192, Extent::Allocation, 1);
        assert_eq!(ranges(&exported), [0..8192]);
        CUDA.set("spans", 1);
    });
}

/// A window (BAR1) that is smaller than the memory.
#[test]
fn what_the_window_cannot_hold_is_exported_by_ranges() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        let memory = Reservation::mapped(4, 0);
        CUDA.set("window", (2 * PART) as usize);
        let exported = export(&cuda, memory.part(1), PART + 1, Extent::Allocation, 1);
        assert_eq!((ranges(&exported), exported[0].dmabuf.size()), (vec![0..PART + 1], PART + 4096));
        let info = cuda.find(memory.base).unwrap().unwrap();
        let refused = cuda.export(&info, 3 * PART, ExportOptions::default());
        // Each mapping by itself fits.
        assert_eq!(refused.unwrap().len(), 3);
        CUDA.set("window", 4096);
        let refused = cuda.export(&info, PART, ExportOptions::default());
        let message = assert_refused!(refused, PointerError::RuntimeCall { .. });
        assert!(message.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{message}");
        CUDA.set("window", 0);
    });
}

#[test]
fn holes_and_other_devices_end_a_range() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        let memory = Reservation::empty(6);
        for (part, device) in [(0, 0), (1, 0), (2, 1), (4, 0)] {
            memory.map(part, device, true);
        }
        // Into the memory of the other device, and into a hole. The message says how far the memory goes.
        for (address, length, start, end) in [
            (memory.part(1), PART + 1, 1, 2),
            (memory.part(0) + 5, 2 * PART, 0, 2),
            (memory.part(2) + 4096, PART, 2, 3),
        ] {
            let refused = cuda.export_at(address, length);
            let message = assert_refused!(refused, PointerError::PastAllocation { .. });
            let expected = format!("which has {} bytes from {:#x}", (end - start) * PART, memory.part(start));
            assert!(message.contains(&expected), "{message}");
        }
        assert_eq!(ranges(&cuda.export_at(memory.part(0), 2 * PART).unwrap()), [0..2 * PART]);
        assert_refused!(cuda.export_at(memory.part(2), PART + 1), PointerError::PastAllocation { .. });
        assert_eq!(cuda.find(memory.part(3)).unwrap(), None, "a hole");
        // What is mapped around an address ends there as well.
        for (part, run) in [(1, 0..2 * PART), (2, 0..PART), (4, 0..PART)] {
            let exported = export(&cuda, memory.part(part), 1, Extent::Allocation, 1);
            assert_eq!(exported[0].memory(), run, "part {part}");
        }
        // Unmapped between the look-up and the export.
        let info = cuda.find(memory.part(4)).unwrap().unwrap();
        memory.unmap(4);
        assert_refused!(cuda.export(&info, 1, ExportOptions::default()), PointerError::Freed { .. });
        // A pool that shrank: the first bytes are there, the last are not.
        let info = cuda.find(memory.part(0)).unwrap().unwrap();
        memory.unmap(1);
        let refused = cuda.export(&info, 2 * PART, ExportOptions::default());
        assert_refused!(refused, PointerError::PastAllocation { .. });
        // The stub returns no mapping for the address any more, right after the attributes did.
        CUDA.refuse("cuMemGetAddressRange", 500);
        assert_refused!(cuda.export_at(memory.part(0), 1), PointerError::Freed { .. });
        CUDA.refuse("cuMemRetainAllocationHandle", 1);
        assert_refused!(cuda.export_at(memory.part(0), 1), PointerError::Freed { .. });
    });
}

/// Without the flag the export may succeed, and a registration would fail: the flag is read before either.
#[test]
fn memory_that_no_nic_can_use_is_named() {
    clean(&CUDA, || {
        let cuda = Cuda::load().unwrap();
        let memory = Reservation::empty(4);
        for (part, capable) in [(0, true), (1, false), (2, true)] {
            memory.map(part, 0, capable);
        }
        let before = CUDA.exports();
        for (address, length) in [(memory.part(1), 1), (memory.part(0), PART + 1)] {
            let refused = cuda.export_at(address, length);
            let message = assert_refused!(refused, PointerError::NotExportable { runtime: "CUDA", .. });
            assert!(message.contains("without allocFlags.gpuDirectRDMACapable"), "{message}");
        }
        assert_eq!(CUDA.exports(), before, "nothing was exported");
        // Its neighbours are exported without it.
        for part in [0, 2] {
            let exported = export(&cuda, memory.part(part), 1, Extent::Allocation, 1);
            assert_eq!(exported[0].memory(), 0..PART);
        }
        CUDA.refuse("cuMemGetAllocationPropertiesFromHandle", 999);
        let refused = cuda.export_at(memory.part(0), 1);
        assert_refused!(refused, PointerError::RuntimeCall { .. });
    });
}

/// SYNC_MEMOPS is an attribute of memory, or a flag of its context where the memory does not take it.
#[test]
fn copies_synchronize_once_memory_is_exported() {
    // SAFETY: the types in the stub's source.
    let (synced, unsync) = unsafe {
        (
            CUDA.function::<unsafe extern "C" fn(i32) -> u32>("stub_synced"),
            CUDA.function::<unsafe extern "C" fn(i32)>("stub_unsync"),
        )
    };
    // SAFETY: as above.
    let synced = |device| unsafe { synced(device) };
    clean(&CUDA, || {
        // SAFETY: as above. Other tests have exported mapped memory.
        [0, 1].into_iter().for_each(|device| unsafe { unsync(device) });
        let cuda = Cuda::load().unwrap();
        let plain = cuda.device_memory(1 << 20).unwrap();
        let before = synced(-1);
        let info = cuda.find(plain.address()).unwrap().unwrap();
        let no = ExportOptions::default().sync_memops(false);
        assert!(!cuda.export(&info, 1, no).unwrap()[0].sync_memops);
        assert_eq!(synced(-1), before);
        assert!(cuda.export_at(plain.address(), 1).unwrap()[0].sync_memops);
        assert_eq!((synced(-1), synced(0) & 0x80), (before + 1, 0), "the memory takes it");

        let memory = Reservation::mapped(1, 1);
        assert!(cuda.export_at(memory.base, 1).unwrap()[0].sync_memops);
        assert_eq!((synced(-1), synced(1)), (before + 1, 0x8c), "the context takes it, and keeps its flags");
        CUDA.refuse("cuCtxSetFlags", 801);
        assert!(cuda.export_at(memory.base, 1).unwrap()[0].sync_memops, "it is set already");
        // SAFETY: as above.
        unsafe { unsync(1) };
        assert!(!cuda.export_at(memory.base, 1).unwrap()[0].sync_memops, "neither takes it");
        CUDA.refuse("cuPointerSetAttribute", 999);
        let refused = cuda.export_at(plain.address(), 1);
        let message = assert_refused!(refused, PointerError::RuntimeCall { .. });
        assert!(message.contains("cuPointerSetAttribute"), "{message}");
        // SAFETY: as above.
        unsafe { unsync(1) };
    });
}
