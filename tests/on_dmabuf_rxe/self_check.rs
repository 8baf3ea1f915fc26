//! What registers must also transfer.

use std::sync::atomic::{AtomicBool, Ordering};

use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::error::RegistrationError;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path};
use dmabuf_rdma::{Error, RegionSet};

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap};
use crate::common::census::Census;
use crate::common::faults::WrongKeys;
use crate::common::peers::domain;
use crate::common::{assert_same, contents, pattern};

#[test]
fn every_kind_of_buffer_passes_and_keeps_its_contents() {
    let census = Census::take();
    {
        let domain = domain();
        for kind in every_kind() {
            let buffer = (kind.allocate)(256 << 10).dmabuf;
            let bytes = pattern(buffer.size() as usize, 4);
            buffer.map().unwrap().write(0, &bytes).unwrap();
            // By remote keys, by local ones, and for reading only.
            for access in [Access::REMOTE, Access::LOCAL_WRITE, Access::REMOTE_READ, Access::empty()] {
                let region = MemoryRegion::builder(&domain, &buffer).access(access).range(5, 8192);
                region.register().unwrap().self_check().unwrap_or_else(|e| panic!("{}: {e}", kind.name));
                let set = RegionSet::builder(&buffer).access(access).chunk_size(64 << 10);
                set.register(&domain).unwrap().self_check().unwrap_or_else(|e| panic!("{}: {e}", kind.name));
            }
            assert_same(&contents(&buffer), &bytes, kind.name);
        }
        let page = heap(4096);
        let one_byte = MemoryRegion::builder(&domain, &page).range(4095, 1).access(Access::REMOTE);
        one_byte.register().unwrap().self_check().unwrap();
    }
    census.assert_unchanged();
}

#[test]
fn a_region_that_registers_and_does_not_transfer_is_found() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(8192));
        let region = {
            let _fault = WrongKeys::new();
            MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register().unwrap()
        };
        let message = assert_refused!(
            region.self_check(),
            Error::Registration(RegistrationError::SelfCheck { path: Path::Uverbs, step: "reading", offset: 0, source, .. })
                if matches!(**source, Error::Completion { .. })
        );
        assert!(message.contains("registered by Uverbs on rxe0"), "{message}");
    }
    census.assert_unchanged();
}

/// Somebody writes the byte all the time, as a device would that reads one place and writes another.
#[test]
fn another_byte_than_was_written_is_found() {
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
    let refused: Result<(), Error> = Err(found.expect("a byte that somebody else writes"));
    assert_refused!(
        refused,
        Error::Registration(RegistrationError::SelfCheckMismatch { offset: 0, wrote, read, .. }) if wrote != read
    );
}
