//! The bytes of every exporter and layout, compared at the far end.

use dmabuf_rdma::DmaSg;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::{self, Operation};

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap};
use crate::common::peers::{Peers, import_path, remote_addr};
use crate::common::{assert_same, bytes, contents, pattern};

#[test]
fn every_byte_of_every_exporter() {
    every_kind().iter().for_each(|kind| bytes::whole_buffer(import_path(), kind));
}

#[test]
fn odd_ranges_with_their_own_iova() {
    every_kind().iter().for_each(|kind| bytes::odd_range(import_path(), kind));
}

#[test]
fn sends_and_atomics() {
    every_kind().iter().for_each(|kind| bytes::send_and_atomics(import_path(), kind));
}

#[test]
fn a_region_works_after_its_fd_was_closed() {
    for kind in every_kind() {
        let peers = Peers::new();
        let subject = (kind.allocate)(1 << 20).dmabuf;
        let size = subject.size();
        let put = pattern(size as usize, 21);
        subject.map().unwrap().write(0, &put).unwrap();
        let region = peers.register(&subject);
        drop(subject);
        let other = heap(size);
        peers.read(&region, &peers.register(&other));
        assert_same(&contents(&other), &put, kind.name);
    }
}

#[test]
fn two_regions_of_one_buffer_see_the_same_bytes() {
    let peers = Peers::new();
    let buffer = heap(1 << 20);
    let whole = peers.register(&buffer);
    let upper = MemoryRegion::builder(&peers.domain, &buffer)
        .range(512 << 10..)
        .access(Access::REMOTE)
        .register()
        .unwrap();
    assert_eq!(upper.iova().0, 512 << 10, "the default iova is the offset in the buffer");
    let put = pattern(512 << 10, 22);
    buffer.map().unwrap().write(0, &put).unwrap();
    let remote = remote_addr(&upper, 0..512 << 10);
    peers.ours.succeed(Operation::Write { remote }, &[whole.sge(..512 << 10).unwrap()]);
    assert_same(&contents(&buffer)[512 << 10..], &put, "upper half");
}

/// Longer than 32 bits count: one region, addressed at its start, in the middle and at its end.
#[test]
fn four_gibibytes_are_one_region() {
    let size = 4 << 30;
    let peers = Peers::new();
    let buffer = heap(size);
    let region = peers.register(&buffer);
    assert_eq!((region.len(), region.umem().sg()), (size, DmaSg { addr: 0, len: size }));
    // An element carries at most 4 GiB less a page, so that the next one begins at a page.
    let limit = size - 4096;
    let message = assert_refused!(
        region.sge(..),
        verbs::Error::RequestTooLarge { count: 0x1_0000_0000, limit: 0xffff_f000, .. }
    );
    assert!(message.contains("RegionSlice::sges"), "{message}");
    assert_refused!(region.sge(..=limit), verbs::Error::RequestTooLarge { .. });
    assert_eq!(u64::from(region.sge(..limit).unwrap().len()), limit);
    let small = heap(4096);
    let small_region = peers.register(&small);
    let mapping = buffer.map().unwrap();
    for (number, offset) in [0, 2 << 30, size - 4096].into_iter().enumerate() {
        let put = pattern(4096, 100 + number as u64);
        small.map().unwrap().write(0, &put).unwrap();
        let remote = remote_addr(&region, offset..offset + 4096);
        peers.ours.succeed(Operation::Write { remote }, &[small_region.sge(..).unwrap()]);
        let mut seen = vec![0; 4096];
        mapping.read(offset, &mut seen).unwrap();
        assert_same(&seen, &put, &format!("the page at {offset:#x}"));
        let put = pattern(4096, 200 + number as u64);
        mapping.write(offset, &put).unwrap();
        peers.ours.succeed(Operation::Read { remote }, &[small_region.sge(..).unwrap()]);
        assert_same(&contents(&small), &put, &format!("the page at {offset:#x}, read back"));
    }
}
