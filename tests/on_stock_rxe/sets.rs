//! Sets through HostMapping, and a cache on a device without import.

use dmabuf_rdma::RegionSet;
use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{Access, Path, RegionCache, RegisterError, SetError};
use dmabuf_rdma::verbs::Operation;

use crate::assert_refused;
use crate::common::buffers::{four_ranges, udmabuf};
use crate::common::census::{Census, regions};
use crate::common::peers::{Peers, domain};
use crate::common::system::{Memlock, unprivileged};
use crate::common::{assert_same, contents, pattern};

const CHUNK: u64 = 256 << 10;

#[test]
fn chunks_of_host_pages_move_every_byte() {
    let census = Census::take();
    {
        let peers = Peers::new();
        let allocations = [udmabuf(PageKind::Base, 1 << 20), four_ranges(1 << 20)];
        let backings: Vec<_> = allocations.iter().map(|each| each.backing.clone().unwrap()).collect();
        let buffers: Vec<_> = allocations.into_iter().map(|each| each.dmabuf).collect();
        let before = regions();
        let set = RegionSet::of_buffers(&buffers).access(Access::REMOTE).chunk_size(CHUNK).threads(3);
        let set = set.host_mapping(&backings).register(&peers.domain).unwrap();
        // The set keeps the pages.
        drop(backings);
        assert_eq!((set.path(), set.chunks().len(), regions()), (Path::HostMapping, 8, before + 8));
        set.self_check().unwrap();

        let (first, second) = (pattern(1 << 20, 1), pattern(1 << 20, 2));
        buffers[0].map().unwrap().write(0, &first).unwrap();
        buffers[1].map().unwrap().write(0, &second).unwrap();
        // Writes the first half over the second, one element of one run at a time.
        for offset in (0..1 << 20).step_by(CHUNK as usize) {
            let to = (1 << 20) + offset;
            let remote = set.remote().slice(to..to + CHUNK).unwrap().addr().unwrap();
            let chunk = set.slice(offset..offset + CHUNK).unwrap();
            peers.ours.succeed(Operation::Write { remote }, &chunk.sges());
        }
        assert_same(&contents(&buffers[1]), &first, "the second buffer");
        set.deregister().unwrap();
        assert_eq!(regions(), before);
    }
    census.assert_unchanged();
}

#[test]
fn a_chunk_over_the_memlock_limit_ends_the_set() {
    let census = Census::take();
    {
        let allocation = udmabuf(PageKind::Base, 4 << 20);
        let backings = [allocation.backing.clone().unwrap()];
        let _limit = Memlock::new((5 << 20) / 2);
        let refused = unprivileged(|| {
            RegionSet::builder(&allocation.dmabuf)
                .chunk_size(1 << 20)
                .threads(1)
                .host_mapping(&backings)
                .register(&domain())
                .map(drop)
        });
        assert_refused!(
            refused,
            SetError::Chunk { chunk: 2, chunks: 4, offset: 0x20_0000, source, .. }
                if matches!(**source, RegisterError::MemlockLimit { .. })
        );
        assert_eq!(refused.unwrap_err().errno(), Some(libc::ENOMEM));
    }
    census.assert_unchanged();
}

#[test]
fn a_cache_on_a_device_without_import_keeps_nothing() {
    let census = Census::take();
    {
        let (domain, allocation) = (domain(), udmabuf(PageKind::Base, 4096));
        let cache = RegionCache::default();
        for _ in 0..2 {
            let refused = cache.get(&domain, &allocation.dmabuf, .., Access::REMOTE);
            assert_refused!(refused, RegisterError::ImportUnsupported { .. });
        }
        let now = cache.gauges();
        assert_eq!((now.hits, now.misses, now.entries, now.bytes), (0, 2, 0, 0));
    }
    census.assert_unchanged();
}
