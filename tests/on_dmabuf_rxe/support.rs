//! What the device says it can do, and the paths.

use dmabuf_rdma::Error;
use dmabuf_rdma::exporter::Pages;
use dmabuf_rdma::mr::{MemoryRegion, Path, Refusal, RefusalReason, probe};

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap, udmabuf};
use crate::common::census::Census;
use crate::common::peers::{device, domain};

#[test]
fn the_probe_finds_the_kernels_path_and_leaves_nothing() {
    let census = Census::take();
    let support = probe(&device().open().unwrap()).unwrap();
    assert_eq!(support.path(), Some(Path::Uverbs));
    let refusal = Refusal { path: Path::Verbs, reason: RefusalReason::NotSupported };
    assert_eq!((support.verbs, support.uverbs), (Err(refusal), Ok(())));
    census.assert_unchanged();
}

#[test]
fn every_exporters_buffer_is_imported_through_uverbs() {
    let domain = domain();
    for kind in every_kind() {
        let buffer = (kind.allocate)(64 << 10).dmabuf;
        let region = MemoryRegion::builder(&domain, &buffer).register();
        assert_eq!(region.unwrap_or_else(|e| panic!("{}: {e}", kind.name)).path(), Path::Uverbs);
    }
}

#[test]
fn a_path_that_the_provider_lacks_is_refused_by_name() {
    let (domain, buffer) = (domain(), heap(4096));
    let refused = MemoryRegion::builder(&domain, &buffer).paths(&[Path::Verbs]).register();
    let message = assert_refused!(refused, Error::ImportUnsupported { refusals, .. } if refusals.len() == 1);
    assert!(message.contains("Verbs: EOPNOTSUPP, the user-space provider has no reg_dmabuf_mr"), "{message}");
}

#[test]
fn importing_is_preferred_to_host_mapping() {
    let (domain, allocation) = (domain(), udmabuf(Pages::Base, 4096));
    let backing = allocation.backing.as_ref().unwrap();
    let builder = || MemoryRegion::builder(&domain, &allocation.dmabuf).host_mapping(backing);
    assert_eq!(builder().register().unwrap().path(), Path::Uverbs);
    assert_eq!(builder().paths(&[]).register().unwrap().path(), Path::HostMapping);
}
