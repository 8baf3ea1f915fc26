//! What the probe reports, and which path a registration takes.

use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{MemoryRegion, Path, RegisterError, probe, probe_path};

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap, udmabuf};
use crate::common::census::Census;
use crate::common::peers::{device, domain};

#[test]
fn the_probe_finds_uverbs_and_leaves_nothing() {
    let census = Census::take();
    let context = device().open().unwrap();
    assert_eq!(probe(&context).unwrap(), Path::Uverbs);
    assert_eq!(probe_path(&context, Path::Uverbs).unwrap(), None);
    let refusal = probe_path(&context, Path::Verbs).unwrap().unwrap();
    assert_eq!((refusal.path(), refusal.errno()), (Path::Verbs, Some(libc::EOPNOTSUPP)));
    drop(context);
    census.assert_unchanged();
}

#[test]
fn every_exporters_buffer_registers_through_uverbs() {
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
    let message =
        assert_refused!(refused, RegisterError::ImportUnsupported { refusals, .. } if refusals.len() == 1);
    assert!(message.contains("Verbs: EOPNOTSUPP, the user-space provider has no reg_dmabuf_mr"), "{message}");
}

#[test]
fn importing_is_preferred_to_host_mapping() {
    let (domain, allocation) = (domain(), udmabuf(PageKind::Base, 4096));
    let backing = allocation.backing.as_ref().unwrap();
    let builder = || MemoryRegion::builder(&domain, &allocation.dmabuf).host_mapping(backing);
    assert_eq!(builder().register().unwrap().path(), Path::Uverbs);
    assert_eq!(builder().paths(&[]).register().unwrap().path(), Path::HostMapping);
}
