//! What a peer, and this side, may not do.

use dmabuf_rdma::mr::{Access, MemoryRegion, Rkey};
use dmabuf_rdma::transfer::RemoteAddr;
use dmabuf_rdma::verbs::{CompletionStatus, Operation};
use dmabuf_rdma::{DmaBuf, Error};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::contents;
use crate::common::peers::Peers;

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
        self.peers.ours.complete(Operation::Write { remote }, &[self.source.sge(0, 64).unwrap()]).status
    }

    fn read(&self, remote: RemoteAddr) -> CompletionStatus {
        self.peers.ours.complete(Operation::Read { remote }, &[self.source.sge(0, 64).unwrap()]).status
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
    let remote = region.remote().at(0, 64).unwrap();
    assert_eq!(scene.read(remote), CompletionStatus::SUCCESS);
    assert_eq!(scene.write(remote), CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn a_region_for_writing_is_not_read() {
    let scene = scene();
    let region = scene.region(Access::LOCAL_WRITE | Access::REMOTE_WRITE);
    assert_eq!(scene.read(region.remote().at(0, 64).unwrap()), CompletionStatus::REM_ACCESS_ERR);
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
    let add = Operation::FetchAdd { remote: region.remote().at(0, 8).unwrap(), add: 1 };
    let ended = scene.peers.ours.complete(add, &[scene.source.sge(0, 8).unwrap()]);
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
    let remote = region.remote().at(0, 64).unwrap();
    assert_eq!(scene.read(remote), CompletionStatus::SUCCESS);
    region.deregister().unwrap();
    assert_eq!(scene.write(remote), CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn a_dropped_region_is_out_of_reach() {
    let scene = scene();
    let remote = scene.region(Access::REMOTE).remote().at(0, 64).unwrap();
    assert_eq!(scene.write(remote), CompletionStatus::REM_ACCESS_ERR);
    scene.assert_untouched();
}

#[test]
fn a_read_does_not_land_in_a_region_without_local_write() {
    let scene = scene();
    let region = scene.region(Access::REMOTE_READ);
    let remote = scene.source.remote().at(0, 64).unwrap();
    let ended = scene.peers.ours.complete(Operation::Read { remote }, &[region.sge(0, 64).unwrap()]);
    assert_ne!(ended.status, CompletionStatus::SUCCESS);
    scene.assert_untouched();
}

#[test]
fn ranges_of_a_region_are_checked_before_posting() {
    let scene = scene();
    let region = scene.region(Access::REMOTE);
    assert_refused!(region.sge(8192, 1), Error::OutOfRange { size: 8192, .. });
    assert_refused!(region.sge(0, 0), Error::ZeroLength { .. });
    assert_refused!(region.sge(u64::MAX, u64::MAX), Error::OutOfRange { .. });
    assert_refused!(region.remote().at(8000, 193), Error::OutOfRange { .. });
    let elements = [region.sge(0, 8).unwrap(); 5];
    let remote = region.remote().at(0, 64).unwrap();
    let refused = scene.peers.ours.pair.post(1, Operation::Write { remote }, &elements, true);
    assert_refused!(refused, Error::TooManySge { count: 5, limit: 4 });
    let refused = scene.peers.ours.pair.post_recv(1, &elements);
    assert_refused!(refused, Error::TooManySge { count: 5, limit: 4 });
}
