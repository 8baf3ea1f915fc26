//! What a peer, and this side, may not do.

use dma_sg::RangeError;
use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::{self, CompletionStatus, Operation, RemoteAddr, Rkey, WorkRequest};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::contents;
use crate::common::peers::{Peers, remote_addr};

struct Scene {
    peers: Peers,
    source: MemoryRegion,
    target: DmaBuf,
}

fn scene() -> Scene {
    let peers = Peers::new();
    let buffer = heap(4096);
    buffer.map().unwrap().write(0, &[0xee; 4096]).unwrap();
    let source = peers.register(&buffer);
    Scene { peers, source, target: heap(8192) }
}

impl Scene {
    fn write(&self, remote: RemoteAddr) -> CompletionStatus {
        self.peers.ours.complete(Operation::Write { remote }, &[self.source.sge(..64).unwrap()]).status
    }

    fn read(&self, remote: RemoteAddr) -> CompletionStatus {
        self.peers.ours.complete(Operation::Read { remote }, &[self.source.sge(..64).unwrap()]).status
    }

    fn region(&self, access: Access) -> MemoryRegion {
        MemoryRegion::builder(&self.peers.domain, &self.target).access(access).register().unwrap()
    }

    #[track_caller]
    fn assert_untouched(&self) {
        assert!(contents(&self.target).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_region_for_reading_is_not_written() {
    let scene = scene();
    let region = scene.region(Access::REMOTE_READ);
    let remote = remote_addr(&region, 0..64);
    assert_eq!(scene.read(remote), CompletionStatus::SUCCESS);
    assert_eq!(scene.write(remote), CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn a_region_for_writing_is_not_read() {
    let scene = scene();
    let region = scene.region(Access::LOCAL_WRITE | Access::REMOTE_WRITE);
    assert_eq!(scene.read(remote_addr(&region, 0..64)), CompletionStatus::REM_ACCESS_ERR);
}

#[test]
fn a_region_without_remote_access_is_neither() {
    let scene = scene();
    let region = scene.region(Access::LOCAL_WRITE);
    // Its key is not meant for a peer; the device gives none, or one that it refuses.
    let remote = RemoteAddr { addr: region.iova().0, rkey: region.rkey() };
    assert_eq!(scene.write(remote), CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn atomics_need_their_flag() {
    let scene = scene();
    let region = scene.region(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ);
    let add = Operation::FetchAdd { remote: remote_addr(&region, 0..8), add: 1 };
    let ended = scene.peers.ours.complete(add, &[scene.source.sge(..8).unwrap()]);
    assert_eq!(ended.status, CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn a_key_that_nobody_gave_is_refused() {
    let scene = scene();
    let region = scene.region(Access::REMOTE);
    let guessed = Rkey(region.rkey().0 ^ 0x5a);
    assert_eq!(scene.write(RemoteAddr { addr: 0, rkey: guessed }), CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn a_deregistered_region_is_out_of_reach() {
    let scene = scene();
    let region = scene.region(Access::REMOTE);
    let remote = remote_addr(&region, 0..64);
    assert_eq!(scene.read(remote), CompletionStatus::SUCCESS);
    region.deregister().unwrap();
    assert_eq!(scene.write(remote), CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn a_dropped_region_is_out_of_reach() {
    let scene = scene();
    let remote = remote_addr(&scene.region(Access::REMOTE), 0..64);
    assert_eq!(scene.write(remote), CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn a_read_does_not_land_in_a_region_without_local_write() {
    let scene = scene();
    let region = scene.region(Access::REMOTE_READ);
    let remote = remote_addr(&scene.source, 0..64);
    let ended = scene.peers.ours.complete(Operation::Read { remote }, &[region.sge(..64).unwrap()]);
    assert_ne!(ended.status, CompletionStatus::SUCCESS);
    scene.assert_untouched();
}

#[test]
fn ranges_of_a_region_are_checked_before_posting() {
    let scene = scene();
    let region = scene.region(Access::REMOTE);
    let past_the_end = region.sge(8192..=8192);
    assert_refused!(past_the_end, verbs::Error::Range(RangeError::OutOfRange { size: 8192, .. }));
    assert_refused!(region.sge(0..0), verbs::Error::Range(RangeError::Empty { .. }));
    let past_64_bits = region.sge(u64::MAX..=u64::MAX);
    assert_refused!(past_64_bits, verbs::Error::Range(RangeError::OutOfRange { .. }));
    assert_refused!(region.remote().slice(8000..8193), RangeError::OutOfRange { .. });
    let elements = [region.sge(..8).unwrap(); 5];
    let remote = remote_addr(&region, 0..64);
    let refused =
        scene.peers.ours.pair.post(WorkRequest::new(1, Operation::Write { remote }, &elements).signaled());
    assert_refused!(refused, verbs::Error::RequestTooLarge { count: 5, limit: 4, .. });
    let refused = scene.peers.ours.pair.post_recv(1, &elements);
    assert_refused!(refused, verbs::Error::RequestTooLarge { count: 5, limit: 4, .. });
}
