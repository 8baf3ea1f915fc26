//! Tests that take minutes: `cargo xtask test --long`, on the device that imports dma-bufs.

mod transfer;

use dmabuf_rdma::RegionSet;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::Operation;

use crate::common::buffers::{every_kind, heap};
use crate::common::census::Census;
use crate::common::peers::{Peers, domain, remote_addr};
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

/// A set and one region of the same buffer, addressed at every chunk boundary.
#[test]
fn eight_gibibytes_as_a_set() {
    const GIB: u64 = 1 << 30;
    let census = Census::take();
    {
        let peers = Peers::new();
        let buffer = heap(8 * GIB);
        let mapping = buffer.map().unwrap();
        let set = RegionSet::builder(&buffer).access(Access::REMOTE).chunk_size(GIB);
        let set = set.register(&peers.domain).unwrap();
        let remote = set.remote();
        assert_eq!((set.len(), set.chunks().len(), remote.runs().len()), (8 * GIB, 8, 8));
        assert!(set.chunks().iter().all(|chunk| chunk.len() == GIB));
        set.self_check().unwrap();
        let one = RegionSet::builder(&buffer).access(Access::REMOTE).register(&peers.domain).unwrap();
        assert_eq!(one.chunks().len(), 1);

        let own = heap(8192);
        let region = peers.register(&own);
        for boundary in 0..=8 {
            // A page on each side of the boundary, where there is one. Each page lies in one run.
            for (start, seed) in [(boundary * GIB).wrapping_sub(4096), boundary * GIB].into_iter().zip(1..) {
                if start >= 8 * GIB {
                    continue;
                }
                let bytes = pattern(4096, boundary << 8 | seed);
                own.map().unwrap().write(0, &bytes).unwrap();
                let page = start..start + 4096;
                let place = remote.slice(page.clone()).unwrap().addr().unwrap();
                peers.ours.succeed(Operation::Write { remote: place }, &[region.sge(..4096).unwrap()]);
                let mut seen = vec![0; 4096];
                mapping.read(start, &mut seen).unwrap();
                assert_same(&seen, &bytes, "written through a chunk's remote key");
                // The one region and the chunk read the same through their local keys.
                for (from, at) in [(&set, 4096), (&one, 0)] {
                    let back = Operation::Write { remote: remote_addr(&region, at..at + 4096) };
                    peers.ours.succeed(back, &from.slice(page.clone()).unwrap().sges());
                }
                assert_same(&contents(&own), &[bytes.clone(), bytes].concat(), "read through local keys");
            }
        }
        set.deregister().unwrap();
    }
    census.assert_unchanged();
}
