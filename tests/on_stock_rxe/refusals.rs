//! A device without dma-buf import.

use dmabuf_rdma::Error;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, Refusal, RefusalReason, probe};

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap};
use crate::common::census::Census;
use crate::common::drm::card;
use crate::common::peers::{device, domain};

fn refusal(path: Path) -> Refusal {
    Refusal { path, reason: RefusalReason::NotSupported }
}

#[test]
fn the_probe_says_which_path_refuses() {
    let census = Census::take();
    let support = probe(&device().open().unwrap()).unwrap();
    assert_eq!(support.path(), None);
    assert_eq!(support.verbs, Err(refusal(Path::Verbs)));
    assert_eq!(support.uverbs, Err(refusal(Path::Uverbs)));
    census.assert_unchanged();
}

#[test]
fn every_exporters_buffer_is_refused_with_both_paths_named() {
    let domain = domain();
    for kind in every_kind() {
        let buffer = (kind.allocate)(64 << 10).dmabuf;
        let refused = MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register();
        let message = assert_refused!(
            refused,
            Error::ImportUnsupported { refusals, .. }
                if *refusals == [refusal(Path::Verbs), refusal(Path::Uverbs)]
        );
        for part in ["rxe0 cannot import a dma-buf", "Verbs: EOPNOTSUPP", "Uverbs: EOPNOTSUPP", "HostMapping"]
        {
            assert!(message.contains(part), "{}: {message}", kind.name);
        }
    }
}

#[test]
fn memory_without_pages_is_refused_for_the_devices_sake() {
    use dmabuf_rdma::exporter::Exporter;
    let (domain, buffer) = (domain(), card("bochs-drm").allocate(64 << 10).unwrap().dmabuf);
    let refused = MemoryRegion::builder(&domain, &buffer).register();
    assert_refused!(refused, Error::ImportUnsupported { .. });
}

#[test]
fn only_the_paths_that_were_asked_are_reported() {
    let (domain, buffer) = (domain(), heap(4096));
    for path in [Path::Verbs, Path::Uverbs] {
        let refused = MemoryRegion::builder(&domain, &buffer).paths(&[path]).register();
        assert_refused!(refused, Error::ImportUnsupported { refusals, .. } if *refusals == [refusal(path)]);
    }
}

#[test]
fn refusals_leave_nothing_behind() {
    let census = Census::take();
    for _ in 0..100 {
        let (domain, buffer) = (domain(), heap(4096));
        MemoryRegion::builder(&domain, &buffer).register().unwrap_err();
    }
    census.assert_unchanged();
}
