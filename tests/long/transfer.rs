//! Lengths that do not fit in 32 bits, by one call each.

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::transfer::{ConnectionOptions, LocalRange};

use crate::common::buffers::heap;
use crate::common::wire::Wire;
use crate::common::{assert_same, pattern};

const GIB: u64 = 1 << 30;
const BLOCK: usize = 4 << 20;

/// Contents of which no two blocks are alike, of one seed or of two, made and compared by copying only:
/// what computes each byte takes longer than the wire.
struct Contents {
    table: Vec<u8>,
}

impl Contents {
    const SEEDS: usize = 16;
    /// Of the longest buffer.
    const BLOCKS: usize = (5 * GIB) as usize / BLOCK + 1;

    fn new() -> Self {
        Self { table: pattern(BLOCK + 8 * Self::BLOCKS * Self::SEEDS, 0) }
    }

    /// A block: the table from a word of its own on. No two words of the table are alike.
    fn block(&self, seed: usize, offset: u64) -> &[u8] {
        let number = offset as usize / BLOCK;
        assert!(seed < Self::SEEDS && number < Self::BLOCKS);
        &self.table[8 * (seed * Self::BLOCKS + number)..][..BLOCK]
    }

    fn fill(&self, buffer: &DmaBuf, seed: usize) {
        let mapping = buffer.map().unwrap();
        let memory = mapping.begin(CpuAccess::Write).unwrap();
        for offset in (0..buffer.size()).step_by(BLOCK) {
            let size = BLOCK.min((buffer.size() - offset) as usize);
            memory.write(offset, &self.block(seed, offset)[..size]).unwrap();
        }
        memory.end().unwrap();
    }

    /// The first `length` bytes are of one seed, the others of the other.
    #[track_caller]
    fn assert_moved(&self, buffer: &DmaBuf, length: u64, moved: usize, before: usize) {
        let mapping = buffer.map().unwrap();
        let memory = mapping.begin(CpuAccess::Read).unwrap();
        let mut seen = vec![0; BLOCK];
        for offset in (0..buffer.size()).step_by(BLOCK) {
            let size = BLOCK.min((buffer.size() - offset) as usize);
            memory.read(offset, &mut seen[..size]).unwrap();
            let inside = length.saturating_sub(offset).min(size as u64) as usize;
            let what = format!("{length} bytes moved, block at {offset:#x}");
            assert_same(&seen[..inside], &self.block(moved, offset)[..inside], &what);
            assert_same(&seen[inside..size], &self.block(before, offset)[inside..size], &what);
        }
        memory.end().unwrap();
    }
}

#[test]
fn five_gibibytes_by_one_call() {
    let contents = Contents::new();
    let Wire { mut near, far } = Wire::new();
    let (ours, theirs) = (heap(5 * GIB), heap(5 * GIB));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    contents.fill(&ours, 1);
    assert_eq!(near.connection.write(&source, &target.remote()).unwrap().bytes, 5 * GIB);
    contents.assert_moved(&theirs, 5 * GIB, 1, 1);
    contents.fill(&theirs, 2);
    near.connection.read(&source, &target.remote()).unwrap();
    contents.assert_moved(&ours, 5 * GIB, 2, 2);
}

/// Around 2^31 and 2^32, in ordinary messages.
#[test]
fn lengths_around_the_limits_of_32_bits() {
    let contents = Contents::new();
    let Wire { mut near, far } = Wire::new();
    let (ours, theirs) = (heap(4 * GIB + 4096), heap(4 * GIB + 4096));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    let remote = target.remote();
    contents.fill(&theirs, 1);
    for (number, length) in
        [2 * GIB - 1, 2 * GIB, 2 * GIB + 1, 4 * GIB - 1, 4 * GIB, 4 * GIB + 1].into_iter().enumerate()
    {
        let seed = 3 + number;
        contents.fill(&ours, seed);
        let local = LocalRange::from(&source).range(0, length).unwrap();
        near.connection.write(local, remote.range(0, length).unwrap()).unwrap();
        // Each is longer than the one before, so what lies beyond is as it was at first.
        contents.assert_moved(&theirs, length, seed, 1);
        // And back, over other bytes.
        contents.fill(&ours, 2);
        let local = LocalRange::from(&source).range(0, length).unwrap();
        near.connection.read(local, remote.range(0, length).unwrap()).unwrap();
        contents.assert_moved(&ours, length, seed, 2);
    }
}

/// The largest messages that a connection makes: two of 1 GiB and the rest.
#[test]
fn messages_of_the_largest_size() {
    let options = ConnectionOptions { message: u64::MAX, window: 4, ..Default::default() };
    let contents = Contents::new();
    let Wire { mut near, far } = Wire::with(options);
    let (ours, theirs) = (heap(2 * GIB + 8192), heap(2 * GIB + 8192));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    let remote = target.remote();
    contents.fill(&ours, 1);
    contents.fill(&theirs, 2);
    let length = 2 * GIB + 5;
    let local = LocalRange::from(&source).range(0, length).unwrap();
    near.connection.write(local, remote.range(0, length).unwrap()).unwrap();
    contents.assert_moved(&theirs, length, 1, 2);
    contents.fill(&ours, 3);
    let local = LocalRange::from(&source).range(0, length).unwrap();
    near.connection.read(local, remote.range(0, length).unwrap()).unwrap();
    contents.assert_moved(&ours, length, 1, 3);
}
