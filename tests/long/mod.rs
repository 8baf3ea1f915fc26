//! What takes minutes: `cargo xtask test --long`, on the device that imports dma-bufs.

mod transfer;

use dmabuf_rdma::RegionSet;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::Operation;

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

/// As one region and as a set, addressed at every boundary by remote keys.
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
            // The bytes on both sides of it, each in its own run; nothing is before the first or past the last.
            for (start, seed) in [(boundary * GIB).wrapping_sub(4096), boundary * GIB].into_iter().zip(1..) {
                if start >= 8 * GIB {
                    continue;
                }
                let bytes = pattern(4096, boundary << 8 | seed);
                own.map().unwrap().write(0, &bytes).unwrap();
                let write = Operation::Write { remote: remote.at(start, 4096).unwrap() };
                peers.ours.succeed(write, &[region.sge(0, 4096).unwrap()]);
                let mut seen = vec![0; 4096];
                mapping.read(start, &mut seen).unwrap();
                assert_same(&seen, &bytes, "written by a chunk's key");
                // The other region and the chunk's local key see the same.
                for (from, at) in [(&set, 4096), (&one, 0)] {
                    let read = Operation::Write { remote: region.remote().at(at, 4096).unwrap() };
                    peers.ours.succeed(read, &from.sges(start, 4096).unwrap());
                }
                assert_same(&contents(&own), &[bytes.clone(), bytes].concat(), "read by local keys");
            }
        }
        set.deregister().unwrap();
    }
    census.assert_unchanged();
}
