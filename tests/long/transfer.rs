//! Lengths that do not fit in 32 bits, by one call each.

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::transfer::{ConnectionOptions, LocalRange};

use crate::common::buffers::heap;
use crate::common::wire::Wire;

const GIB: u64 = 1 << 30;
const BLOCK: usize = 4 << 20;

/// The word at an offset, of 8 bytes: no two of a buffer are alike.
fn word(seed: u64, offset: u64) -> u64 {
    let word = (seed ^ offset).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word ^ (word >> 29)
}

/// The bytes of a block.
fn block(seed: u64, offset: u64, into: &mut [u8]) {
    for (at, bytes) in into.chunks_mut(8).enumerate() {
        let word = word(seed, offset + 8 * at as u64).to_le_bytes();
        bytes.copy_from_slice(&word[..bytes.len()]);
    }
}

fn fill(buffer: &DmaBuf, seed: u64) {
    let mapping = buffer.map().unwrap();
    let memory = mapping.begin(CpuAccess::Write).unwrap();
    let mut bytes = vec![0; BLOCK];
    for offset in (0..buffer.size()).step_by(BLOCK) {
        let bytes = &mut bytes[..BLOCK.min((buffer.size() - offset) as usize)];
        block(seed, offset, bytes);
        memory.write(offset, bytes).unwrap();
    }
    memory.end().unwrap();
}

/// The first `length` bytes are of one seed, the others of the other.
#[track_caller]
fn assert_moved(buffer: &DmaBuf, length: u64, moved: u64, before: u64) {
    let mapping = buffer.map().unwrap();
    let memory = mapping.begin(CpuAccess::Read).unwrap();
    let (mut seen, mut expected, mut rest) = (vec![0; BLOCK], vec![0; BLOCK], vec![0; BLOCK]);
    for offset in (0..buffer.size()).step_by(BLOCK) {
        let size = BLOCK.min((buffer.size() - offset) as usize);
        memory.read(offset, &mut seen[..size]).unwrap();
        block(moved, offset, &mut expected[..size]);
        let inside = length.saturating_sub(offset).min(size as u64) as usize;
        if inside < size {
            block(before, offset, &mut rest[..size]);
            expected[inside..size].copy_from_slice(&rest[inside..size]);
        }
        if seen[..size] != expected[..size] {
            let at = (0..size).find(|at| seen[*at] != expected[*at]).unwrap();
            panic!("{length} bytes moved: differs at {:#x}", offset + at as u64);
        }
    }
    memory.end().unwrap();
}

#[test]
fn five_gibibytes_by_one_call() {
    let Wire { mut near, far } = Wire::new();
    let (ours, theirs) = (heap(5 * GIB), heap(5 * GIB));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    fill(&ours, 1);
    assert_eq!(near.connection.write(&source, &target.remote()).unwrap().bytes, 5 * GIB);
    assert_moved(&theirs, 5 * GIB, 1, 0);
    fill(&theirs, 2);
    near.connection.read(&source, &target.remote()).unwrap();
    assert_moved(&ours, 5 * GIB, 2, 0);
}

/// Around 2^31 and 2^32, in ordinary messages.
#[test]
fn lengths_around_the_limits_of_32_bits() {
    let Wire { mut near, far } = Wire::new();
    let (ours, theirs) = (heap(4 * GIB + 4096), heap(4 * GIB + 4096));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    let remote = target.remote();
    fill(&theirs, 1);
    for (number, length) in
        [2 * GIB - 1, 2 * GIB, 2 * GIB + 1, 4 * GIB - 1, 4 * GIB, 4 * GIB + 1].into_iter().enumerate()
    {
        let seed = 10 + number as u64;
        fill(&ours, seed);
        let local = LocalRange::from(&source).range(0, length).unwrap();
        near.connection.write(local, remote.range(0, length).unwrap()).unwrap();
        // Each is longer than the one before, so what lies beyond is as it was at first.
        assert_moved(&theirs, length, seed, 1);
        // And back, over other bytes.
        fill(&ours, 2);
        let local = LocalRange::from(&source).range(0, length).unwrap();
        near.connection.read(local, remote.range(0, length).unwrap()).unwrap();
        assert_moved(&ours, length, seed, 2);
    }
}

/// The largest messages that the device says it takes: 2 GiB.
#[test]
fn messages_of_the_largest_size() {
    let options = ConnectionOptions { message: u64::MAX, window: 4, ..Default::default() };
    let Wire { mut near, far } = Wire::with(options);
    let (ours, theirs) = (heap(2 * GIB + 8192), heap(2 * GIB + 8192));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    let remote = target.remote();
    fill(&ours, 1);
    fill(&theirs, 2);
    let length = 2 * GIB + 5;
    let local = LocalRange::from(&source).range(0, length).unwrap();
    near.connection.write(local, remote.range(0, length).unwrap()).unwrap();
    assert_moved(&theirs, length, 1, 2);
    fill(&ours, 3);
    let local = LocalRange::from(&source).range(0, length).unwrap();
    near.connection.read(local, remote.range(0, length).unwrap()).unwrap();
    assert_moved(&ours, length, 1, 3);
}
