//! Tables of blocks: thousands of scattered blocks in one transfer.

use dmabuf_rdma::mr::{Blocks, MemoryRegion, RegionSlice, RemoteSlice, SliceError};
use dmabuf_rdma::transfer::{ConnectionOptions, Error, RequestError};
use dmabuf_rdma::{RegionSet, RemoteRegion};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::peers::TIMEOUT;
use crate::common::wire::Wire;
use crate::common::{assert_same, contents, pattern};

/// A fixed permutation of `0..count`.
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let mut random = seed;
    for at in (1..count).rev() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        order.swap(at, (random >> 33) as usize % (at + 1));
    }
    order
}

fn offsets(order: &[usize], stride: u64) -> impl Iterator<Item = u64> {
    order.iter().map(move |at| *at as u64 * stride)
}

/// What a buffer holds after each block of `from` has replaced its partner in `to`.
fn moved(from: &[u8], to: &[u8], length: usize, pairs: impl Iterator<Item = (u64, u64)>) -> Vec<u8> {
    let mut result = to.to_vec();
    for (source, target) in pairs {
        let (source, target) = (source as usize, target as usize);
        result[target..target + length].copy_from_slice(&from[source..source + length]);
    }
    result
}

#[test]
fn scattered_blocks_reach_their_partners() {
    const COUNT: usize = 1024;
    const BLOCK: u64 = 4096;
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let size = COUNT as u64 * BLOCK;
        let ((ours, source), (theirs, target)) = (near.filled(size, 1), far.filled(size, 2));
        // Every second block stays as it is.
        let (from, to) = (shuffled(COUNT, 3), shuffled(COUNT, 4));
        let (from, to) = (&from[..COUNT / 2], &to[..COUNT / 2]);
        let local = RegionSlice::from(&source).blocks(BLOCK, offsets(from, BLOCK)).unwrap();
        let remote = RemoteSlice::from(target.remote()).blocks(BLOCK, offsets(to, BLOCK)).unwrap();
        let pairs = || offsets(from, BLOCK).zip(offsets(to, BLOCK));
        let before = (contents(&ours), contents(&theirs));
        let write = near.connection.write(&local, &remote).unwrap();
        assert_eq!(write.wait().unwrap().bytes, size / 2);
        assert_same(&contents(&theirs), &moved(&before.0, &before.1, 4096, pairs()), "written");

        theirs.map().unwrap().write(0, &pattern(size as usize, 5)).unwrap();
        near.connection.read(&local, &remote).unwrap().wait().unwrap();
        let back = pairs().map(|(from, to)| (to, from));
        assert_same(&contents(&ours), &moved(&pattern(size as usize, 5), &before.0, 4096, back), "read");
    }
    census.assert_unchanged();
}

/// The table is made once; each step selects its blocks. The peer sent its table in bytes.
#[test]
fn selections_of_a_table_that_the_peer_sent() {
    const BLOCK: u64 = 1000;
    let Wire { near, far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let described = RemoteRegion::from_bytes(&target.remote().to_bytes()).unwrap();
    let table = described.slice(500..).unwrap().strided(BLOCK, 2000, 500).unwrap();
    let remote = Blocks::from_bytes(&described, &table.to_bytes()).unwrap();
    let local = RegionSlice::from(&source).strided(BLOCK, BLOCK, 500).unwrap();
    let mut expected = contents(&theirs);
    for step in 0..5 {
        let (from, to) = (shuffled(500, step), shuffled(500, step + 100));
        let (from, to) = (from[..100].iter().copied(), to[..100].iter().copied());
        let write = near
            .connection
            .write(local.select(from.clone()).unwrap(), remote.select(to.clone()).unwrap())
            .unwrap();
        write.wait().unwrap();
        let pairs = from.zip(to).map(|(from, to)| (from as u64 * BLOCK, 500 + to as u64 * 2000));
        expected = moved(&contents(&ours), &expected, BLOCK as usize, pairs);
        assert_same(&contents(&theirs), &expected, "a step");
    }
    // The peer registers its memory anew.
    drop(target);
    let target = far.register(&heap(1 << 20));
    let refused = Blocks::from_bytes(&target.remote(), &table.to_bytes());
    assert_refused!(refused, SliceError::Stale { .. });
}

/// Blocks of a set of regions, of which several end inside a block, to a region and back to a set.
#[test]
fn blocks_lie_across_the_regions_of_a_set() {
    const SIZE: u64 = 1 << 20;
    const BLOCK: u64 = 10_000;
    let Wire { near, far } = Wire::new();
    let ((ours, _), (theirs, _)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let set = |domain, buffer| {
        let builder = RegionSet::builder(buffer).access(dmabuf_rdma::Access::REMOTE);
        builder.chunk_size(16 << 10).register(domain).unwrap()
    };
    let (source, target) = (set(&near.domain, &ours), set(&far.domain, &theirs));
    let (from, to) = (shuffled(100, 6), shuffled(100, 7));
    let local = source.slice(..).unwrap().blocks(BLOCK, offsets(&from, BLOCK)).unwrap();
    let remote = target.remote().slice(..).unwrap().blocks(BLOCK, offsets(&to, BLOCK)).unwrap();
    let before = (contents(&ours), contents(&theirs));
    let pairs = || offsets(&from, BLOCK).zip(offsets(&to, BLOCK));
    near.connection.write(&local, &remote).unwrap().wait().unwrap();
    assert_same(&contents(&theirs), &moved(&before.0, &before.1, 10_000, pairs()), "written");
    theirs.map().unwrap().write(0, &pattern(SIZE as usize, 8)).unwrap();
    near.connection.read(&local, &remote).unwrap().wait().unwrap();
    let back = pairs().map(|(from, to)| (to, from));
    assert_same(&contents(&ours), &moved(&pattern(SIZE as usize, 8), &before.0, 10_000, back), "read");
}

/// Neighbours at the peer are gathered, so fewer messages than blocks cross the wire, and the notification comes last.
#[test]
fn neighbours_are_gathered() {
    const BLOCK: u64 = 64;
    const COUNT: usize = 4096;
    let size = COUNT as u64 * BLOCK;
    let Wire { near, far } = Wire::with(ConnectionOptions::default().message_size(64 << 10).notifications(4));
    let ((ours, source), (theirs, target)) = (near.filled(size, 1), far.filled(size, 2));
    let order = shuffled(COUNT, 9);
    let local = RegionSlice::from(&source).blocks(BLOCK, offsets(&order, BLOCK)).unwrap();
    let remote = RemoteSlice::from(target.remote()).strided(BLOCK, BLOCK, COUNT).unwrap();
    let before = crate::common::wire::packets();
    near.connection.write_notify(&local, &remote, 77).unwrap().wait().unwrap();
    far.connection.notifications().wait(77, 1, TIMEOUT).unwrap();
    let expected: Vec<u8> =
        order.iter().flat_map(|at| contents(&ours)[at * 64..at * 64 + 64].to_vec()).collect();
    assert_same(&contents(&theirs), &expected, "gathered");
    // Four elements a message by default: 1024 packets there, and at most as many acknowledgements.
    let packets = crate::common::wire::packets() - before;
    assert!(packets < 2 * 2300, "{packets}");
}

#[test]
fn a_hundred_thousand_blocks() {
    const COUNT: usize = 102_400;
    const BLOCK: u64 = 64;
    let Wire { near, far } = Wire::new();
    let size = COUNT as u64 * BLOCK;
    let ((ours, source), (theirs, target)) = (near.filled(size, 1), far.filled(size, 2));
    let (from, to) = (shuffled(COUNT, 1), shuffled(COUNT, 2));
    let local = RegionSlice::from(&source).strided(BLOCK, BLOCK, COUNT).unwrap();
    let remote = RemoteSlice::from(target.remote()).strided(BLOCK, BLOCK, COUNT).unwrap();
    let (local, remote) =
        (local.select(from.iter().copied()).unwrap(), remote.select(to.iter().copied()).unwrap());
    near.connection.write(&local, &remote).unwrap().wait().unwrap();
    let pairs = offsets(&from, BLOCK).zip(offsets(&to, BLOCK));
    let expected = moved(&contents(&ours), &pattern(size as usize, 2), BLOCK as usize, pairs);
    assert_same(&contents(&theirs), &expected, "written");
}

#[test]
fn tables_that_do_not_fit_are_refused_before_anything_is_posted() {
    let Wire { near, far } = Wire::new();
    let ((_ours, source), (theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let (local, remote) = (RegionSlice::from(&source), RemoteSlice::from(target.remote()));
    let ours = local.strided(4096, 8192, 100).unwrap();
    let write =
        |local: &Blocks<RegionSlice>, remote: Blocks<RemoteSlice>| near.connection.write(local, remote);
    let refused = write(&ours, remote.strided(4096, 4096, 101).unwrap());
    let message =
        assert_refused!(refused, Error::Request(RequestError::CountMismatch { local: 100, remote: 101, .. }));
    assert!(message.contains("select as many on both sides"), "{message}");
    let refused = write(&ours, remote.strided(4095, 4096, 100).unwrap());
    assert_refused!(
        refused,
        Error::Request(RequestError::LengthMismatch { block: 0, local: 4096, remote: 4095, .. })
    );
    let elsewhere: MemoryRegion = far.register(&heap(1 << 20));
    let foreign = RegionSlice::from(&elsewhere).strided(4096, 8192, 100).unwrap();
    let refused = write(&foreign, remote.strided(4096, 4096, 100).unwrap());
    assert_refused!(refused, Error::Request(RequestError::ForeignRegion { .. }));
    // An atomic has one block.
    assert_same(&contents(&theirs), &pattern(1 << 20, 2), "untouched");
    assert!(near.connection.is_usable());
}

/// Which of two blocks for the same bytes wins is not specified; their bytes are those of one of them.
#[test]
fn overlapping_destinations_get_the_bytes_of_one() {
    let Wire { near, far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(8192, 1), far.filled(4096, 2));
    let local = RegionSlice::from(&source).strided(4096, 4096, 2).unwrap();
    let remote = RemoteSlice::from(target.remote()).strided(4096, 0, 2).unwrap();
    near.connection.write(&local, &remote).unwrap().wait().unwrap();
    let (seen, bytes) = (contents(&theirs), contents(&ours));
    assert!(seen == bytes[..4096] || seen == bytes[4096..], "of one block");
}
