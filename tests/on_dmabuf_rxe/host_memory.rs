//! Host memory beside dma-bufs.

use dmabuf_rdma::RegionSet;
use dmabuf_rdma::mr::{Access, Buffer, MemoryRegion, Path, RegionCache, RegionSlice, RegisterError};
use dmabuf_rdma::verbs::ProtectionDomain;

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap};
use crate::common::census::Census;
use crate::common::host::{filled, host, host_contents};
use crate::common::peers::{domain, import_path};
use crate::common::system::{Memlock, unprivileged};
use crate::common::wire::Wire;
use crate::common::{assert_same, contents, pattern};

const SIZE: u64 = 2 << 20;

#[track_caller]
fn register<'a>(domain: &'a ProtectionDomain, buffer: impl Into<Buffer<'a>>) -> MemoryRegion {
    MemoryRegion::builder(domain, buffer).access(Access::REMOTE).register().expect("register")
}

#[test]
fn bytes_between_host_memory_and_every_dma_buf() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        for kind in every_kind() {
            let (ours, theirs) = (filled(SIZE, 1), (kind.allocate)(SIZE).dmabuf);
            let (region, target) = (register(&near.domain, &ours), register(&far.domain, &theirs));
            assert_eq!((region.path(), target.path()), (Path::HostMemory, import_path()));
            let remote = target.remote().slice(..SIZE).unwrap();
            near.connection.write(&region, &remote).unwrap().wait().unwrap();
            assert_same(&contents(&theirs)[..SIZE as usize], &pattern(SIZE as usize, 1), kind.name);
            theirs.map().unwrap().write(0, &pattern(SIZE as usize, 2)).unwrap();
            near.connection.read(&region, &remote).unwrap().wait().unwrap();
            assert_same(&host_contents(&ours), &pattern(SIZE as usize, 2), kind.name);
            theirs.map().unwrap().write(0, &pattern(SIZE as usize, 3)).unwrap();
            let receiving = near.connection.recv(&region).unwrap();
            far.connection.send(target.slice(..SIZE).unwrap()).unwrap().wait().unwrap();
            receiving.wait().unwrap();
            assert_same(&host_contents(&ours), &pattern(SIZE as usize, 3), kind.name);
        }
    }
    census.assert_unchanged();
}

#[test]
fn a_set_of_both() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let (first, middle, last) = (heap(SIZE), host(3 * 4096), heap(4096));
        let total = SIZE + 4 * 4096;
        let buffers = [Buffer::from(&first), Buffer::from(&middle), Buffer::from(&last)];
        let set = RegionSet::of_buffers(buffers).access(Access::REMOTE).own_descriptors();
        let set = set.register(&far.domain).unwrap();
        let paths: Vec<_> = set.chunks().iter().map(MemoryRegion::path).collect();
        assert_eq!(paths, [import_path(), Path::HostMemory, import_path()]);
        let descriptors = [0, 1, 2].map(|chunk| set.descriptor(chunk).is_some());
        assert_eq!(descriptors, [true, false, true]);
        let source = filled(total, 4);
        let local = register(&near.domain, &source);
        near.connection.write(&local, set.remote()).unwrap().wait().unwrap();
        let seen = [contents(&first), host_contents(&middle), contents(&last)].concat();
        assert_same(&seen, &pattern(total as usize, 4), "the set");
        // A message from both at once.
        let both =
            RegionSlice::concat([set.slice(SIZE - 100..SIZE + 100).unwrap(), set.slice(..50).unwrap()]);
        let receiving = near.connection.recv(local.slice(..250).unwrap()).unwrap();
        far.connection.send(both.unwrap()).unwrap().wait().unwrap();
        receiving.wait().unwrap();
        let bytes = pattern(total as usize, 4);
        let expected = [&bytes[SIZE as usize - 100..][..200], &bytes[..50]].concat();
        assert_same(&host_contents(&source)[..250], &expected, "a message from both");
    }
    census.assert_unchanged();
}

#[test]
fn a_cache_of_both() {
    let domain = domain();
    let cache = RegionCache::default();
    let (dmabuf, memory) = (heap(SIZE), host(SIZE));
    let path =
        |buffer: Buffer<'_>| cache.get(&domain, buffer, 5..4096, Access::REMOTE).unwrap().region().path();
    for _ in 0..2 {
        assert_eq!((path((&dmabuf).into()), path((&memory).into())), (import_path(), Path::HostMemory));
    }
    assert_eq!((cache.gauges().hits, cache.gauges().misses), (2, 2));
    assert_eq!((cache.invalidate(memory.id()), cache.gauges().entries), (1, 1));
}

#[test]
fn the_memlock_limit_does_not_bind_a_dma_buf() {
    let (dmabuf, memory) = (heap(16 << 20), host(16 << 20));
    let _limit = Memlock::new(8 << 20);
    unprivileged(|| {
        let domain = domain();
        let refused = MemoryRegion::builder(&domain, &memory).register();
        let message = assert_refused!(refused, RegisterError::MemlockLimit { path: Path::HostMemory, .. });
        assert!(message.ends_with("or import a dma-buf, which is not charged"), "{message}");
        assert_eq!(register(&domain, &dmabuf).path(), import_path());
    });
}
