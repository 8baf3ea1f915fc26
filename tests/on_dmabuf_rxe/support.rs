//! What the probe reports, and which path a registration takes.

use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{MemoryRegion, Path, probe, probe_path};

use crate::common::buffers::{every_kind, udmabuf};
use crate::common::census::Census;
use crate::common::peers::{device, domain, import_path};

#[test]
fn the_probe_finds_the_path_and_leaves_nothing() {
    let census = Census::take();
    let context = device().open().unwrap();
    assert_eq!(probe(&context).unwrap(), import_path());
    assert_eq!(probe_path(&context, import_path()).unwrap(), None);
    assert_eq!(probe_path(&context, Path::Uverbs).unwrap(), None);
    drop(context);
    census.assert_unchanged();
}

#[test]
fn every_exporters_buffer_registers_through_the_same_path() {
    let domain = domain();
    for kind in every_kind() {
        let buffer = (kind.allocate)(64 << 10).dmabuf;
        let region = MemoryRegion::builder(&domain, &buffer).register();
        assert_eq!(region.unwrap_or_else(|e| panic!("{}: {e}", kind.name)).path(), import_path());
    }
}

#[test]
fn importing_is_preferred_to_host_mapping() {
    let (domain, allocation) = (domain(), udmabuf(PageKind::Base, 4096));
    let backing = allocation.backing.as_ref().unwrap();
    let builder = || MemoryRegion::builder(&domain, &allocation.dmabuf).host_mapping(backing);
    assert_eq!(builder().register().unwrap().path(), import_path());
    assert_eq!(builder().paths(&[]).register().unwrap().path(), Path::HostMapping);
}
