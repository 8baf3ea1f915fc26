//! Data checks for any registration path.

use dmabuf_rdma::exporter::Allocation;
use dmabuf_rdma::mr::{Access, MemoryRegion, MemoryRegionBuilder, Path};
use dmabuf_rdma::verbs::{CompletionStatus, Operation};
use dmabuf_rdma::{DmaSg, Iova};

use super::buffers::{Kind, heap, udmabuf};
use super::peers::{Peers, TIMEOUT, remote_addr};
use super::{assert_same, contents, pattern};

const SIZE: u64 = 6 << 20;

/// A builder for a registration through `path`.
pub fn builder<'a>(peers: &'a Peers, path: Path, allocation: &'a Allocation) -> MemoryRegionBuilder<'a> {
    let builder = MemoryRegion::builder(&peers.domain, &allocation.dmabuf).access(Access::REMOTE);
    match path {
        Path::HostMapping => {
            builder.paths(&[]).host_mapping(allocation.backing.as_ref().expect("a buffer with host pages"))
        }
        _ => builder,
    }
}

/// A buffer for the other side of a transfer, of the simplest kind that the path accepts.
fn plain(path: Path, size: u64) -> Allocation {
    match path {
        Path::HostMapping => udmabuf(Default::default(), size),
        _ => Allocation { dmabuf: heap(size), backing: None },
    }
}

/// Checks every byte of a buffer after a peer's WRITE, a peer's READ and a WRITE from the buffer.
#[track_caller]
pub fn whole_buffer(path: Path, kind: &Kind) {
    let peers = Peers::new();
    let subject = (kind.allocate)(SIZE);
    let region = builder(&peers, path, &subject).register().unwrap_or_else(|e| panic!("{}: {e}", kind.name));
    assert_eq!(region.path(), path, "{}", kind.name);
    assert_eq!((region.len(), region.iova()), (subject.dmabuf.size(), Iova(0)));
    assert_eq!(region.umem().sg(), DmaSg { addr: 0, len: region.len() });
    let size = subject.dmabuf.size();
    let other = plain(path, size);
    let other_region = builder(&peers, path, &other).register().expect("the other side");

    // A peer writes the buffer.
    let written = pattern(size as usize, 1);
    other.dmabuf.map().unwrap().write(0, &written).unwrap();
    peers.write(&other_region, &region);
    assert_same(&contents(&subject.dmabuf), &written, &format!("{}: after WRITE", kind.name));

    // A peer reads bytes that the CPU wrote.
    let put = pattern(size as usize, 2);
    subject.dmabuf.map().unwrap().write(0, &put).unwrap();
    peers.read(&region, &other_region);
    assert_same(&contents(&other.dmabuf), &put, &format!("{}: after READ", kind.name));

    // The device sends the buffer.
    let sent = pattern(size as usize, 3);
    subject.dmabuf.map().unwrap().write(0, &sent).unwrap();
    peers.write(&region, &other_region);
    assert_same(&contents(&other.dmabuf), &sent, &format!("{}: as the source of a WRITE", kind.name));
}

/// Checks a range that begins and ends inside pages, with its own iova: no byte outside it changes.
#[track_caller]
pub fn odd_range(path: Path, kind: &Kind) {
    let (offset, length, iova) = (0x20_1a37_u64, 1_300_001_u64, Iova(0x7f00_dead_0000_0a37));
    let range = offset..offset + length;
    let peers = Peers::new();
    let subject = (kind.allocate)(SIZE);
    let size = subject.dmabuf.size() as usize;
    let before = pattern(size, 7);
    subject.dmabuf.map().unwrap().write(0, &before).unwrap();
    let region = builder(&peers, path, &subject).range(range).iova(iova).register().unwrap();
    assert_eq!((region.iova(), region.len(), region.umem().offset()), (iova, length, offset));

    let other = plain(path, SIZE);
    let sent = pattern(length as usize, 8);
    other.dmabuf.map().unwrap().write(0, &sent).unwrap();
    let source = builder(&peers, path, &other).range(..length).register().unwrap();
    peers.write(&source, &region);
    let mut expected = before;
    expected[offset as usize..][..length as usize].copy_from_slice(&sent);
    assert_same(&contents(&subject.dmabuf), &expected, &format!("{}: odd range", kind.name));

    // The last byte alone, and one byte past it.
    let last = remote_addr(&region, length - 1..length);
    peers.ours.succeed(Operation::Write { remote: last }, &[source.sge(..1).unwrap()]);
    expected[(offset + length - 1) as usize] = sent[0];
    assert_same(&contents(&subject.dmabuf), &expected, &format!("{}: last byte", kind.name));
    let mut past = last;
    past.addr += 1;
    let ended = peers.ours.complete(Operation::Write { remote: past }, &[source.sge(..1).unwrap()]);
    assert_eq!(ended.status, CompletionStatus::REM_ACCESS_ERR, "{}: one byte past the region", kind.name);
    assert_same(&contents(&subject.dmabuf), &expected, &format!("{}: past the end", kind.name));
}

/// Checks SEND from one range of a buffer to two others, both atomics, and WRITE with immediate data.
#[track_caller]
pub fn send_and_atomics(path: Path, kind: &Kind) {
    let peers = Peers::new();
    let subject = (kind.allocate)(64 << 10);
    let region = builder(&peers, path, &subject).register().unwrap();
    let mapping = subject.dmabuf.map().unwrap();
    let message = pattern(6000, 4);
    mapping.write(100, &message).unwrap();

    let into = [region.sge(20_001..21_001).unwrap(), region.sge(40_000..45_000).unwrap()];
    peers.theirs.pair.post_recv(12, &into).unwrap();
    peers.ours.succeed(Operation::SendWithImm { imm: 7 }, &[region.sge(100..6100).unwrap()]);
    let received = peers.theirs.queue.wait(TIMEOUT).unwrap().success().unwrap();
    assert_eq!((received.wr_id, received.byte_len, received.imm), (12, 6000, Some(7)));
    let seen = contents(&subject.dmabuf);
    assert_same(&seen[20_001..21_001], &message[..1000], "first element");
    assert_same(&seen[40_000..45_000], &message[1000..], "second element");

    let counter = 8192;
    mapping.write(counter, &40_u64.to_ne_bytes()).unwrap();
    let remote = remote_addr(&region, counter..counter + 8);
    let old = [region.sge(16..24).unwrap()];
    let value = |at| {
        let mut word = [0; 8];
        mapping.read(at, &mut word).unwrap();
        u64::from_ne_bytes(word)
    };
    peers.ours.succeed(Operation::FetchAdd { remote, add: 2 }, &old);
    assert_eq!((value(16), value(counter)), (40, 42), "{}: fetch and add", kind.name);
    peers.ours.succeed(Operation::CompareSwap { remote, compare: 41, swap: 1 }, &old);
    assert_eq!((value(16), value(counter)), (42, 42), "{}: a compare that fails", kind.name);
    peers.ours.succeed(Operation::CompareSwap { remote, compare: 42, swap: 1 }, &old);
    assert_eq!((value(16), value(counter)), (42, 1), "{}: a compare that succeeds", kind.name);

    let imm = Operation::WriteWithImm { remote, imm: 99 };
    peers.theirs.pair.post_recv(13, &[]).unwrap();
    peers.ours.succeed(imm, &[region.sge(100..108).unwrap()]);
    let received = peers.theirs.queue.wait(TIMEOUT).unwrap().success().unwrap();
    assert_eq!((received.wr_id, received.imm), (13, Some(99)));
    assert_eq!(value(counter).to_ne_bytes(), message[..8]);
}
