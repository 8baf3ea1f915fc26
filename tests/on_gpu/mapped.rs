//! Memory of CUDA that is mapped into reserved addresses.

use dmabuf_rdma::exporter::{ExportOptions, Extent, MemoryKind, PointerError, Runtime};

use super::each_cuda;
use crate::assert_refused;
use crate::common::cuda::Segment;
use crate::common::report::say;

#[test]
fn ranges_across_mappings_come_out_exact() {
    each_cuda(|cuda, driver, ordinal| {
        let mut segment = Segment::reserve(driver, ordinal, 4);
        for place in 0..3 {
            if let Err(reason) = segment.map(place, true) {
                return say(&format!("note: GPU {ordinal}: no mapped memory: {reason}"));
            }
        }
        let granule = segment.granule;
        let info = cuda.find(segment.place(1) - 100).unwrap().expect("its own memory");
        assert_eq!((info.kind, info.base, info.size), (MemoryKind::Virtual, segment.base, 4 * granule));
        let length = granule + 200;
        let exported = cuda.export(&info, length, ExportOptions::default()).unwrap();
        assert_eq!(exported.iter().map(|part| part.len()).sum::<u64>(), length);
        say(&format!("note: GPU {ordinal}: a range across 3 mappings: {} dma-bufs", exported.len()));
        let whole = ExportOptions::default().extent(Extent::Allocation);
        let all = cuda.export(&info, 1, whole).unwrap().remove(0);
        say(&format!(
            "note: GPU {ordinal}: all 3 mappings as one dma-buf: {}",
            all.memory() == (0..3 * granule)
        ));
        say(&format!("note: GPU {ordinal}: SYNC_MEMOPS for mapped memory: {}", all.sync_memops));
        let refused = cuda.export_at(segment.place(2) + granule - 10, 20);
        assert_refused!(refused, PointerError::PastAllocation { .. });
        drop((exported, all));
    });
}

/// What the library takes for the identity of mapped memory, and what it does not trust.
#[test]
fn memory_mapped_anew_has_another_handle() {
    each_cuda(|cuda, driver, ordinal| {
        let mut segment = Segment::reserve(driver, ordinal, 1);
        if let Err(reason) = segment.map(0, true) {
            return say(&format!("note: GPU {ordinal}: no mapped memory: {reason}"));
        }
        let before = (driver.physical(segment.base).unwrap(), cuda.find(segment.base).unwrap().unwrap().id);
        assert_eq!(
            driver.physical(segment.base + segment.granule - 1),
            Ok(before.0),
            "the handle that was mapped"
        );
        // The export retains the handle, so that no other memory gets it.
        let exported = cuda.export_at(segment.base, 1).unwrap();
        segment.unmap(0);
        assert_eq!(cuda.find(segment.base).unwrap(), None, "unmapped");
        segment.map(0, true).unwrap();
        let after = (driver.physical(segment.base).unwrap(), cuda.find(segment.base).unwrap().unwrap().id);
        assert_ne!(before.0, after.0, "other memory");
        say(&format!(
            "note: GPU {ordinal}: BUFFER_ID changes when memory is mapped anew: {}",
            before.1 != after.1
        ));
        drop(exported);
    });
}

#[test]
fn memory_that_no_nic_can_use_is_named() {
    each_cuda(|cuda, driver, ordinal| {
        let mut segment = Segment::reserve(driver, ordinal, 1);
        if let Err(reason) = segment.map(0, false) {
            return say(&format!("note: GPU {ordinal}: no mapped memory: {reason}"));
        }
        let message = assert_refused!(cuda.export_at(segment.base, 1), PointerError::NotExportable { .. });
        assert!(message.contains("gpuDirectRDMACapable"), "{message}");
    });
}
