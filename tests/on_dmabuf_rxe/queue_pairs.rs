//! What a queue pair refuses: elements of another protection domain, and READs that neither side has room for.

use std::net::SocketAddr;
use std::time::Duration;

use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::transfer::{self, ConnectionOptions};
use dmabuf_rdma::verbs::{self, Operation, ProtectionDomain, QueuePair, QueuePairOptions, Sge, WorkRequest};
use dmabuf_rdma::{MemoryRegion, RegionSlice};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::peers::{Peers, device, domain, remote_addr};
use crate::common::wire::{End, FAR, Wire};
use crate::common::{assert_same, contents};

const SIZE: u64 = 64 << 10;
const TIMEOUT: Duration = Duration::from_secs(30);

const ELEMENT: &str = "scatter/gather element";

#[test]
fn elements_of_another_domain_are_refused() {
    let peers = Peers::new();
    let ours = peers.register(&heap(SIZE));
    let of = |domain: &ProtectionDomain| MemoryRegion::builder(domain, &heap(SIZE)).register().unwrap();
    let second = ProtectionDomain::new(peers.context()).unwrap();
    // SAFETY: the queue pair lives until the end of this function.
    let wrapped = unsafe { QueuePair::from_raw(peers.ours.pair.as_raw()).unwrap() };
    let remote = remote_addr(&ours, 0..8);
    // Of another device, of another context of the same device, and of another domain in the same context.
    let others = [End::new("rxe1", Default::default()).domain, domain(), second];
    for other in others {
        let theirs = of(&other);
        let mixed = RegionSlice::concat([ours.slice(..8).unwrap(), theirs.slice(..8).unwrap()]).unwrap();
        for elements in [vec![theirs.sge(..8).unwrap()], mixed.sges()] {
            for pair in [&peers.ours.pair, &wrapped] {
                let refused =
                    pair.post(WorkRequest::new(1, Operation::Write { remote }, &elements).signaled());
                let message = assert_refused!(refused, verbs::Error::ContextMismatch { object: ELEMENT, .. });
                assert!(message.contains("another protection domain than the queue pair"), "{message}");
                assert_refused!(
                    pair.post_recv(1, &elements),
                    verbs::Error::ContextMismatch { object: ELEMENT, .. }
                );
            }
        }
    }
    // Of the same domain by another name, and of memory that another library registered.
    // SAFETY: the domain lives as long as `peers`.
    let same = of(&unsafe { ProtectionDomain::from_raw(peers.domain.as_raw()) });
    let place = ours.iova().0;
    // SAFETY: the bytes are registered until the end of this function, and only the device uses them.
    let raw = unsafe { Sge::from_raw(verbs::ffi::ibv_sge { addr: place, length: 8, lkey: ours.lkey().0 }) };
    for element in [same.sge(..8).unwrap(), raw] {
        peers.ours.succeed(Operation::Write { remote }, &[element]);
    }
}

#[test]
fn limits_of_reads_and_atomics_are_those_of_rxe() {
    let limits = device().open().unwrap().limits().unwrap();
    assert_eq!((limits.max_sge, limits.max_sge_read), (32, 32));
    assert_eq!((limits.max_rd_atomic, limits.max_init_rd_atomic, limits.atomics), (128, 128, true));
}

fn without_reads() -> ConnectionOptions {
    ConnectionOptions::default().queue_pair(QueuePairOptions::default().rd_atomic(0))
}

/// Reads and atomics are refused before anything is posted; a write still arrives.
#[track_caller]
fn only_writes(near: &mut End, far: &End) {
    let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let word = source.slice(..8).unwrap();
    for refused in [
        near.connection.read(&source, target.remote()).and_then(|transfer| transfer.wait()),
        near.connection
            .fetch_add(&word, target.remote().slice(..8).unwrap(), 1)
            .and_then(|transfer| transfer.wait()),
    ] {
        let message = assert_refused!(refused, transfer::Error::Verbs(verbs::Error::Unavailable { .. }));
        assert!(message.contains("rd_atomic above 0 on both sides"), "{message}");
    }
    assert!(near.connection.is_usable());
    near.connection.write(&source, target.remote()).unwrap().wait().unwrap();
    assert_same(&contents(&theirs), &contents(&ours), "written");
}

#[test]
fn reads_are_refused_if_either_side_has_no_room_for_them() {
    for (ours, theirs) in
        [(without_reads(), ConnectionOptions::default()), (ConnectionOptions::default(), without_reads())]
    {
        let (mut near, mut far) = (End::new("rxe0", ours), End::new("rxe1", theirs));
        near.connection.connect(&far.connection.endpoint()).unwrap();
        far.connection.connect(&near.connection.endpoint()).unwrap();
        only_writes(&mut near, &far);
        only_writes(&mut far, &near);
    }
    let Wire { near, far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    near.connection.read(&source, target.remote()).unwrap().wait().unwrap();
    assert_same(&contents(&ours), &contents(&theirs), "read");
}

#[test]
fn reads_are_refused_by_address_too() {
    let listener = Listener::bind(SocketAddr::new(FAR.parse().unwrap(), 0)).unwrap();
    for (ours, theirs) in
        [(without_reads(), ConnectionOptions::default()), (ConnectionOptions::default(), without_reads())]
    {
        let (mut near, mut far) = (End::new("rxe0", ours), End::new("rxe1", theirs));
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                listener.accept_request(TIMEOUT).unwrap().accept(&mut far.connection, &[], TIMEOUT).unwrap();
            });
            let outgoing = Outgoing::resolve(listener.local_addr(), None, TIMEOUT).unwrap();
            outgoing.connect(&mut near.connection, &[], TIMEOUT).unwrap();
            server.join().unwrap();
        });
        only_writes(&mut near, &far);
        only_writes(&mut far, &near);
    }
}
