//! Sets by HostMapping, and what a cache says of a device that imports nothing.

use dmabuf_rdma::error::RegistrationError;
use dmabuf_rdma::exporter::Pages;
use dmabuf_rdma::mr::{Access, Path, RegionCache};
use dmabuf_rdma::verbs::Operation;
use dmabuf_rdma::{Error, RegionSet};

use crate::assert_refused;
use crate::common::buffers::{pieces, udmabuf};
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
        let allocations = [udmabuf(Pages::Base, 1 << 20), pieces(1 << 20)];
        let backings: Vec<_> = allocations.iter().map(|each| each.backing.clone().unwrap()).collect();
        let buffers: Vec<_> = allocations.into_iter().map(|each| each.dmabuf).collect();
        let before = regions();
        let set = RegionSet::of_buffers(&buffers).access(Access::REMOTE).chunk_size(CHUNK).threads(3);
        let set = set.host_mapping(&backings).register(&peers.domain).unwrap();
        // The pages live on in the set.
        drop(backings);
        assert_eq!((set.path(), set.chunks().len(), regions()), (Path::HostMapping, 8, before + 8));
        set.self_check().unwrap();

        let (first, second) = (pattern(1 << 20, 1), pattern(1 << 20, 2));
        buffers[0].map().unwrap().write(0, &first).unwrap();
        buffers[1].map().unwrap().write(0, &second).unwrap();
        // The first half over the second, an element and a run at a time.
        for offset in (0..1 << 20).step_by(CHUNK as usize) {
            let remote = set.remote().at((1 << 20) + offset, CHUNK).unwrap();
            peers.ours.succeed(Operation::Write { remote }, &set.sges(offset, CHUNK).unwrap());
        }
        assert_same(&contents(&buffers[1]), &first, "the second buffer");
        set.deregister().unwrap();
        assert_eq!(regions(), before);
    }
    census.assert_unchanged();
}

#[test]
fn a_chunk_over_the_memlock_limit_takes_the_set_with_it() {
    let census = Census::take();
    {
        let allocation = udmabuf(Pages::Base, 4 << 20);
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
            Error::Registration(RegistrationError::Chunk { chunk: 2, chunks: 4, offset: 0x20_0000, source, .. })
                if matches!(**source, Error::MemlockLimit { .. })
        );
        assert_eq!(refused.unwrap_err().errno(), Some(libc::ENOMEM));
    }
    census.assert_unchanged();
}

#[test]
fn a_cache_on_a_device_without_import_says_so() {
    let census = Census::take();
    {
        let (domain, allocation) = (domain(), udmabuf(Pages::Base, 4096));
        let cache = RegionCache::default();
        for _ in 0..2 {
            let refused = cache.get(&domain, &allocation.dmabuf, 0, 4096, Access::REMOTE);
            assert_refused!(refused, Error::ImportUnsupported { .. });
        }
        let now = cache.gauges();
        assert_eq!((now.hits, now.misses, now.entries, now.bytes), (0, 2, 0, 0));
    }
    census.assert_unchanged();
}
