//! What takes minutes: `cargo xtask test --long`, on the device that imports dma-bufs.

mod transfer;

use dmabuf_rdma::mr::{Access, MemoryRegion};

use crate::common::buffers::{every_kind, heap};
use crate::common::census::Census;
use crate::common::peers::{Peers, domain};
use crate::common::{assert_same, contents, pattern};

#[test]
fn fifty_thousand_cycles_leave_nothing() {
    let domain = domain();
    let kinds = every_kind();
    let buffers: Vec<_> = kinds.iter().map(|kind| (kind.allocate)(64 << 10)).collect();
    let census = Census::take();
    for cycle in 0..50_000 {
        let buffer = &buffers[cycle % buffers.len()].dmabuf;
        drop(MemoryRegion::builder(&domain, buffer).access(Access::REMOTE).register().unwrap());
    }
    census.assert_unchanged();
}

#[test]
fn every_byte_of_a_gibibyte() {
    let peers = Peers::new();
    let (from, to) = (heap(1 << 30), heap(1 << 30));
    let put = pattern(1 << 30, 77);
    from.map().unwrap().write(0, &put).unwrap();
    peers.write(&peers.register(&from), &peers.register(&to));
    assert_same(&contents(&to), &put, "a gibibyte");
}
