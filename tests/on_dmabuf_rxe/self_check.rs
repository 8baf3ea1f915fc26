//! The self-check: what registers must also transfer.

use std::sync::atomic::{AtomicBool, Ordering};

use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::mr::{Access, MemoryRegion, SelfCheckError};
use dmabuf_rdma::{RegionSet, verbs};

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap};
use crate::common::census::Census;
use crate::common::faults::WrongKeys;
use crate::common::peers::{domain, import_path};
use crate::common::{assert_same, contents, pattern};

#[test]
fn every_exporters_buffer_passes_and_keeps_its_contents() {
    let census = Census::take();
    {
        let domain = domain();
        for kind in every_kind() {
            let buffer = (kind.allocate)(256 << 10).dmabuf;
            let bytes = pattern(buffer.size() as usize, 4);
            buffer.map().unwrap().write(0, &bytes).unwrap();
            // Checked by the remote key, by the local key, and each for reading only.
            for access in [Access::REMOTE, Access::LOCAL_WRITE, Access::REMOTE_READ, Access::empty()] {
                let region = MemoryRegion::builder(&domain, &buffer).access(access).range(5..8197);
                region.register().unwrap().self_check().unwrap_or_else(|e| panic!("{}: {e}", kind.name));
                let set = RegionSet::builder(&buffer).access(access).chunk_size(64 << 10);
                set.register(&domain).unwrap().self_check().unwrap_or_else(|e| panic!("{}: {e}", kind.name));
            }
            assert_same(&contents(&buffer), &bytes, kind.name);
        }
        let page = heap(4096);
        let one_byte = MemoryRegion::builder(&domain, &page).range(4095..).access(Access::REMOTE);
        one_byte.register().unwrap().self_check().unwrap();
    }
    census.assert_unchanged();
}

#[test]
fn a_region_that_does_not_transfer_is_found() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(8192));
        let region = {
            let _fault = WrongKeys::new();
            MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register().unwrap()
        };
        let message = assert_refused!(
            region.self_check(),
            SelfCheckError::Transfer {
                path,
                step: "reading",
                offset: 0,
                source,
                ..
            } if *path == import_path() && matches!(**source, verbs::Error::Completion { .. })
        );
        assert!(
            message.contains(&format!("rxe0 registered the region through {}", import_path())),
            "{message}"
        );
    }
    census.assert_unchanged();
}

/// The CPU overwrites the byte all the time, so that the device reads another value than it wrote.
#[test]
fn a_byte_that_differs_from_what_was_written_is_found() {
    let (domain, buffer) = (domain(), heap(4096));
    let region = MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register().unwrap();
    let mapping = buffer.map().unwrap();
    let stop = AtomicBool::new(false);
    let found = std::thread::scope(|scope| {
        scope.spawn(|| {
            let guard = mapping.begin(CpuAccess::Write).unwrap();
            while !stop.load(Ordering::Relaxed) {
                guard.write(0, &[0x55]).unwrap();
            }
            guard.end().unwrap();
        });
        let found = (0..1000).find_map(|_| region.self_check().err());
        stop.store(true, Ordering::Relaxed);
        found
    });
    let refused: Result<(), _> = Err(found.expect("a mismatch"));
    assert_refused!(refused, SelfCheckError::Mismatch { offset: 0, wrote, read, .. } if wrote != read);
}
