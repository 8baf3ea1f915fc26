//! A device without dma-buf import.

use dmabuf_rdma::exporter::Exporter;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, Refusal, RegisterError, probe, probe_path};

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap};
use crate::common::census::Census;
use crate::common::drm::card;
use crate::common::peers::{device, domain};

/// Whether exactly these paths refused, each because it does not support dma-bufs.
fn unsupported(refusals: &[Refusal], paths: &[Path]) -> bool {
    refusals.iter().map(Refusal::path).eq(paths.iter().copied())
        && refusals.iter().all(|refusal| refusal.errno() == Some(libc::EOPNOTSUPP))
}

#[test]
fn the_probe_names_the_paths_that_refuse() {
    let census = Census::take();
    let context = device().open().unwrap();
    assert_refused!(
        probe(&context),
        RegisterError::ImportUnsupported { refusals, .. }
            if unsupported(refusals, &[Path::Verbs, Path::Uverbs])
    );
    for path in [Path::Verbs, Path::Uverbs] {
        let refusal = probe_path(&context, path).unwrap().unwrap();
        assert!(unsupported(std::slice::from_ref(&refusal), &[path]), "{refusal:?}");
    }
    drop(context);
    census.assert_unchanged();
}

#[test]
fn every_exporters_buffer_is_refused_by_both_paths() {
    let domain = domain();
    for kind in every_kind() {
        let buffer = (kind.allocate)(64 << 10).dmabuf;
        let refused = MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register();
        let message = assert_refused!(
            refused,
            RegisterError::ImportUnsupported { refusals, .. }
                if unsupported(refusals, &[Path::Verbs, Path::Uverbs])
        );
        for part in ["rxe0 cannot import a dma-buf", "Verbs: EOPNOTSUPP", "Uverbs: EOPNOTSUPP", "HostMapping"]
        {
            assert!(message.contains(part), "{}: {message}", kind.name);
        }
    }
}

#[test]
fn memory_without_pages_is_refused_because_of_the_device() {
    let (domain, buffer) = (domain(), card("bochs-drm").allocate(64 << 10).unwrap().dmabuf);
    let refused = MemoryRegion::builder(&domain, &buffer).register();
    assert_refused!(refused, RegisterError::ImportUnsupported { .. });
}

#[test]
fn only_the_allowed_paths_are_reported() {
    let (domain, buffer) = (domain(), heap(4096));
    for path in [Path::Verbs, Path::Uverbs] {
        let refused = MemoryRegion::builder(&domain, &buffer).paths(&[path]).register();
        assert_refused!(refused, RegisterError::ImportUnsupported { refusals, .. } if unsupported(refusals, &[path]));
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
