//! Transfers of more bytes than 32 bits count, with one call each.

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::transfer::ConnectionOptions;

use crate::common::buffers::heap;
use crate::common::wire::Wire;
use crate::common::{assert_same, pattern};

const GIB: u64 = 1 << 30;
const BLOCK: usize = 4 << 20;

/// Buffer contents of which no two blocks are alike, for any seeds. They are only copied and compared, since
/// computing each byte would take longer than the wire.
struct Contents {
    table: Vec<u8>,
}

impl Contents {
    const SEEDS: usize = 16;
    /// Blocks of the longest buffer.
    const BLOCKS: usize = (5 * GIB) as usize / BLOCK + 1;

    fn new() -> Self {
        Self { table: pattern(BLOCK + 8 * Self::BLOCKS * Self::SEEDS, 0) }
    }

    /// A block: the table from a different word on for each seed and offset. No two words of the table are
    /// alike.
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

    /// Checks that the first `length` bytes have the seed `moved`, and the others the seed `before`.
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
    let Wire { near, far } = Wire::new();
    let (ours, theirs) = (heap(5 * GIB), heap(5 * GIB));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    contents.fill(&ours, 1);
    assert_eq!(near.connection.write(&source, target.remote()).unwrap().wait().unwrap().bytes, 5 * GIB);
    contents.assert_moved(&theirs, 5 * GIB, 1, 1);
    contents.fill(&theirs, 2);
    near.connection.read(&source, target.remote()).unwrap().wait().unwrap();
    contents.assert_moved(&ours, 5 * GIB, 2, 2);
}

/// Lengths around 2^31 and 2^32, in messages of the default size.
#[test]
fn lengths_around_the_limits_of_32_bits() {
    let contents = Contents::new();
    let Wire { near, far } = Wire::new();
    let (ours, theirs) = (heap(4 * GIB + 4096), heap(4 * GIB + 4096));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    let remote = target.remote();
    contents.fill(&theirs, 1);
    for (number, length) in
        [2 * GIB - 1, 2 * GIB, 2 * GIB + 1, 4 * GIB - 1, 4 * GIB, 4 * GIB + 1].into_iter().enumerate()
    {
        let seed = 3 + number;
        contents.fill(&ours, seed);
        let (local, remote) = (source.slice(..length).unwrap(), remote.slice(..length).unwrap());
        near.connection.write(&local, &remote).unwrap().wait().unwrap();
        // Each length is longer than the one before, so the bytes behind it are still the first ones.
        contents.assert_moved(&theirs, length, seed, 1);
        // Back, over other bytes.
        contents.fill(&ours, 2);
        near.connection.read(&local, &remote).unwrap().wait().unwrap();
        contents.assert_moved(&ours, length, seed, 2);
    }
}

/// The largest messages of a connection: two of 1 GiB and the rest.
#[test]
fn messages_of_the_largest_size() {
    let options = ConnectionOptions::default().message_size(u64::MAX).window(4);
    let contents = Contents::new();
    let Wire { near, far } = Wire::with(options);
    let (ours, theirs) = (heap(2 * GIB + 8192), heap(2 * GIB + 8192));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    contents.fill(&ours, 1);
    contents.fill(&theirs, 2);
    let length = 2 * GIB + 5;
    let (local, remote) = (source.slice(..length).unwrap(), target.remote().slice(..length).unwrap());
    near.connection.write(&local, &remote).unwrap().wait().unwrap();
    contents.assert_moved(&theirs, length, 1, 2);
    contents.fill(&ours, 3);
    near.connection.read(&local, &remote).unwrap().wait().unwrap();
    contents.assert_moved(&ours, length, 1, 3);
}
