//! Handles of registered memory: which of them keep it registered, and that transfers take all of them.

use std::mem;
use std::ops::Range;

use dma_sg::RangeError;
use dmabuf_rdma::mr::{Access, DeregisterError, MemoryRegion, RegionCache, RemoteRun};
use dmabuf_rdma::transfer;
use dmabuf_rdma::verbs::Operation;
use dmabuf_rdma::{Connection, DmaBuf, ErrorKind, Iova, RegionSet, RegionSlice, RemoteRegion, RemoteSlice};

use super::fork::in_a_child;
use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::{Census, dma_bufs, regions};
use crate::common::peers::{Peers, domain};
use crate::common::wire::{End, Wire};
use crate::common::{assert_same, contents, pattern};

const SIZE: u64 = 1 << 20;
const CHUNK: u64 = 256 << 10;

/// Regions and dma-bufs in the whole guest.
fn counts() -> (usize, usize) {
    (regions(), dma_bufs())
}

#[test]
fn the_last_handle_deregisters_a_region() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let (theirs, target) = far.filled(SIZE, 2);
        let before = counts();
        let (ours, region) = near.filled(SIZE, 1);
        let registered = (before.0 + 1, before.1 + 1);
        let clone = region.clone();
        let slice = clone.slice(4096..8192).unwrap();
        drop((ours, region, clone));
        assert_eq!(counts(), registered);
        near.connection.write(&slice, target.remote().slice(..4096).unwrap()).unwrap().wait().unwrap();
        assert_same(
            &contents(&theirs)[..4096],
            &pattern(SIZE as usize, 1)[4096..8192],
            "written by the slice",
        );
        // The slice also keeps the protection domain and the context.
        drop(near);
        assert_eq!(counts(), registered);
        drop(slice);
        assert_eq!(counts(), before);
    }
    census.assert_unchanged();
}

#[test]
fn the_last_handle_deregisters_a_set() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(SIZE));
        let before = regions();
        let set = RegionSet::builder(&buffer).chunk_size(CHUNK).register(&domain).unwrap();
        let (clone, slice) = (set.clone(), set.slice(CHUNK - 1..=CHUNK).unwrap());
        let chunk = set.chunks()[3].clone();
        drop((domain, buffer, set));
        drop(clone);
        // The slice lies in two chunks, and keeps all four.
        assert_eq!(regions(), before + 4);
        assert_eq!(slice.regions().count(), 2);
        slice.region().self_check().unwrap();
        drop(slice);
        assert_eq!(regions(), before + 1, "the chunk has a handle of its own");
        chunk.self_check().unwrap();
        drop(chunk);
        assert_eq!(regions(), before);
    }
    census.assert_unchanged();
}

#[test]
fn deregistering_a_region_in_use_gives_the_handle_back() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(SIZE));
        let before = regions();
        let region = MemoryRegion::builder(&domain, &buffer).register().unwrap();
        let (lkey, clone, slice) = (region.lkey(), region.clone(), region.slice(..4096).unwrap());
        let in_use = region.deregister().unwrap_err();
        assert_eq!((in_use.kind(), in_use.errno(), regions()), (ErrorKind::Busy, None, before + 1));
        assert!(in_use.to_string().contains("has 2 other handles"), "{in_use}");
        let DeregisterError::InUse { region, handles: 2 } = in_use else { panic!("{in_use:?}") };
        drop(clone);
        match region.deregister() {
            Err(DeregisterError::InUse { region, handles: 1 }) => {
                assert_eq!((region.lkey(), regions()), (lkey, before + 1));
                drop(slice);
                region.deregister().unwrap();
            }
            other => panic!("expected InUse, got {other:?}"),
        }
        assert_eq!(regions(), before);
    }
    census.assert_unchanged();
}

#[test]
fn deregistering_a_set_in_use_gives_the_handle_back() {
    let census = Census::take();
    {
        let (domain, buffer) = (domain(), heap(SIZE));
        let before = regions();
        let set = RegionSet::builder(&buffer).chunk_size(CHUNK).register(&domain).unwrap();
        let (clone, slice) = (set.clone(), set.slice(..).unwrap());
        let in_use = set.deregister().unwrap_err();
        assert_eq!((in_use.kind(), regions()), (ErrorKind::Busy, before + 4));
        let DeregisterError::SetInUse { set, handles: 2 } = in_use else { panic!("{in_use:?}") };
        drop((clone, slice));
        set.self_check().unwrap();

        // The set has no other handle, one of its chunks does.
        let chunk = set.chunks()[2].clone();
        let in_use = set.deregister().unwrap_err();
        assert_eq!(in_use.kind(), ErrorKind::Busy);
        let DeregisterError::Chunks { source, others, chunks: 4 } = in_use else { panic!("{in_use:?}") };
        assert!(others.is_empty(), "{others:?}");
        let DeregisterError::InUse { region, handles: 1 } = *source else { panic!("{source:?}") };
        assert_eq!((region.lkey(), regions()), (chunk.lkey(), before + 1));
        drop(chunk);
        region.deregister().unwrap();
        assert_eq!(regions(), before);
    }
    census.assert_unchanged();
}

/// In a child, since a forgotten handle lasts until its process ends.
#[test]
fn a_forgotten_handle_keeps_its_memory_registered() {
    let census = Census::take();
    in_a_child((), |()| {
        let peers = Peers::new();
        let sink = heap(SIZE);
        let target = peers.register(&sink);
        let forget: [fn(MemoryRegion); 3] = [
            mem::forget,
            |region| mem::forget(region.slice(10..20).unwrap()),
            |region| mem::forget(RegionSlice::concat([&region]).unwrap()),
        ];
        let before = counts();
        for (round, forget) in forget.into_iter().enumerate() {
            let buffer = heap(SIZE);
            let bytes = pattern(SIZE as usize, 30 + round as u64);
            buffer.map().unwrap().write(0, &bytes).unwrap();
            let region = peers.register(&buffer);
            let remote = region.remote().slice(..).unwrap().addr().unwrap();
            forget(region);
            drop(buffer);
            assert_eq!(counts(), (before.0 + round + 1, before.1 + round + 1));
            peers.ours.succeed(Operation::Read { remote }, &[target.sge(..).unwrap()]);
            assert_same(&contents(&sink), &bytes, "read through a forgotten handle's region");
        }
    });
    // The kernel deregisters them when the process ends.
    census.assert_unchanged();
}

/// Two buffers of two sides, and the same byte range of both.
struct Buffers {
    ours: DmaBuf,
    theirs: DmaBuf,
    range: Range<usize>,
}

impl Buffers {
    /// Writes `local` to `remote`, reads it back, and compares every byte of both buffers each time. Both
    /// arguments cover the range.
    #[track_caller]
    fn check(
        &self,
        connection: &mut Connection,
        local: impl Into<RegionSlice>,
        remote: impl Into<RemoteSlice>,
    ) {
        let (local, remote) = (local.into(), remote.into());
        let Range { start, end } = self.range;
        let fill = |buffer: &DmaBuf, seed| {
            let bytes = pattern(buffer.size() as usize, seed);
            buffer.map().unwrap().write(0, &bytes).unwrap();
            bytes
        };
        let (put, before) = (fill(&self.ours, 1), fill(&self.theirs, 2));
        assert_eq!(connection.write(&local, &remote).unwrap().wait().unwrap().bytes, local.len());
        let expected = [&before[..start], &put[start..end], &before[end..]].concat();
        assert_same(&contents(&self.theirs), &expected, "written");
        let answer = fill(&self.theirs, 3);
        assert_eq!(connection.read(&local, &remote).unwrap().wait().unwrap().bytes, local.len());
        let expected = [&put[..start], &answer[start..end], &put[end..]].concat();
        assert_same(&contents(&self.ours), &expected, "read");
    }
}

#[test]
fn regions_sets_and_cached_regions_go_into_the_same_transfer() {
    let census = Census::take();
    {
        let Wire { mut near, far } = Wire::new();
        // Begins and ends inside pages and chunks.
        let range = 0x1a37..0x1a37 + SIZE;
        let buffers = Buffers {
            ours: heap(2 * SIZE),
            theirs: heap(2 * SIZE),
            range: range.start as usize..range.end as usize,
        };
        let cache = RegionCache::default();
        let register = |end: &End, buffer, chunk_size| {
            let slice = end.register(buffer).slice(range.clone()).unwrap();
            let set = RegionSet::builder(buffer).range(range.clone()).access(Access::REMOTE);
            let set = set.chunk_size(chunk_size).register(&end.domain).unwrap();
            cache.get(&end.domain, buffer, range.clone(), Access::REMOTE).unwrap();
            let hit = cache.get(&end.domain, buffer, range.clone(), Access::REMOTE).unwrap();
            (slice, set, hit)
        };
        let (slice, set, hit) = register(&near, &buffers.ours, CHUNK);
        let (their_slice, their_set, their_hit) = register(&far, &buffers.theirs, 3 * CHUNK);
        assert_eq!((set.chunks().len(), their_set.remote().runs().len()), (5, 2));
        assert_eq!(cache.gauges().hits, 2);
        let connection = &mut near.connection;
        buffers.check(connection, slice, their_set.remote());
        buffers.check(connection, &set, their_hit.remote());
        buffers.check(connection, hit, their_slice.remote());
        buffers.check(connection, set.slice(..).unwrap(), their_set.slice(..).unwrap().remote());
    }
    census.assert_unchanged();
}

#[test]
fn concatenated_slices_of_two_regions_are_sent_in_order() {
    let Wire { near, far } = Wire::new();
    let ((one, first), (two, second)) = (near.filled(SIZE, 1), near.filled(SIZE, 2));
    let (theirs, target) = far.filled(SIZE, 3);
    let parts =
        [second.slice(5..70_001).unwrap(), first.slice(4095..4097).unwrap(), second.slice(..9).unwrap()];
    let local = RegionSlice::concat(&parts).unwrap();
    let (one, two) = (contents(&one), contents(&two));
    let sent = [&two[5..70_001], &one[4095..4097], &two[..9]].concat();
    assert_eq!((local.len(), local.regions().count()), (sent.len() as u64, 3));
    let place = 777..777 + local.len();
    let mut expected = contents(&theirs);
    expected[777..777 + sent.len()].copy_from_slice(&sent);

    std::thread::scope(|scope| {
        let into = target.slice(place.clone()).unwrap();
        let received = scope.spawn(|| far.connection.recv(into).unwrap().wait().unwrap());
        near.connection.send(&local).unwrap().wait().unwrap();
        assert_eq!(received.join().unwrap().bytes, local.len());
    });
    assert_same(&contents(&theirs), &expected, "received");

    theirs.map().unwrap().write(0, &pattern(SIZE as usize, 3)).unwrap();
    near.connection.write(local, target.remote().slice(place).unwrap()).unwrap().wait().unwrap();
    assert_same(&contents(&theirs), &expected, "written");
}

#[test]
fn a_peer_gets_only_the_range_of_a_slice() {
    let Wire { near, far } = Wire::new();
    let (ours, source) = near.filled(SIZE, 1);
    let (theirs, target) = far.filled(SIZE, 2);
    let part = target.slice(4097..12_289).unwrap().remote();
    // As the peer receives it.
    let part = RemoteRegion::from_bytes(&part.to_bytes()).unwrap();
    assert_eq!(part.len(), 8192);
    assert_eq!(part.runs(), [RemoteRun { iova: Iova(4097), length: 8192, rkey: target.rkey() }]);
    near.connection.read(source.slice(..8192).unwrap(), &part).unwrap().wait().unwrap();
    assert_same(&contents(&ours)[..8192], &contents(&theirs)[4097..12_289], "the slice");

    let past = RangeError::OutOfRange { offset: 0, length: 8193, size: 8192 };
    assert_eq!(part.slice(..=8192).unwrap_err(), past);
    assert_eq!(part.slice(8192..).unwrap_err(), RangeError::Empty { offset: 8192 });
    let inner = part.slice(100..200).unwrap();
    assert_refused!(inner.slice(50..101), RangeError::OutOfRange { offset: 50, length: 51, size: 100 });
    // Nor does a longer local side reach further.
    assert_refused!(
        near.connection.read(source.slice(..8193).unwrap(), &part).and_then(|transfer| transfer.wait()),
        transfer::Error::Request(transfer::RequestError::LengthMismatch { local: 8193, remote: 8192, .. })
    );
    assert!(near.connection.is_usable());
}
