//! A child of `fork` drops its copies of connections, queues, queue pairs, contexts and librdmacm's ids. Those of
//! the parent go on.

use std::net::SocketAddr;
use std::time::Duration;

use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::exporter::CaptureDevice;
use dmabuf_rdma::transfer::{self, ConnectionOptions};
use dmabuf_rdma::verbs::CompletionQueue;

use super::fork::in_a_child;
use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::peers::Peers;
use crate::common::system::cameras;
use crate::common::wire::{End, FAR, Wire};
use crate::common::{assert_same, contents, pattern};

const SIZE: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn a_childs_queue_pairs_and_queues_leave_the_parents_connected() {
    let census = Census::take();
    {
        let (from, to) = (heap(SIZE), heap(SIZE));
        let bytes = pattern(SIZE as usize, 8);
        from.map().unwrap().write(0, &bytes).unwrap();
        let peers = Peers::new();
        let queue = CompletionQueue::new(peers.context(), 16).unwrap();
        let objects = (peers.register(&from), peers.register(&to), queue, peers);
        let (from, into, queue, peers) = in_a_child(objects, drop);
        peers.write(&from, &into);
        assert_same(&contents(&to), &bytes, "after the fork");
        // An event of the parent's channel still arrives.
        queue.arm().unwrap();
        assert!(queue.poll().unwrap().next().is_none());
    }
    census.assert_unchanged();
}

#[test]
fn a_childs_connections_leave_the_parents_usable() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
        // Whole, in two halves, and ended by name.
        let (near, far) = in_a_child((near, far), |(near, far)| {
            near.connection.disconnect();
            drop((near, far.connection.split()));
        });
        assert!(near.connection.is_usable() && far.connection.is_usable());
        near.connection.write(&source, target.remote()).unwrap().wait().unwrap();
        assert_same(&contents(&theirs), &contents(&ours), "after the fork");
    }
    census.assert_unchanged();
}

#[test]
fn a_childs_transfer_leaves_the_parents_in_flight() {
    let census = Census::take();
    {
        // More than the window, so it cannot be there before somebody waits.
        let options = ConnectionOptions::default().message_size(64 << 10);
        let Wire { near, far } = Wire::with(options);
        let ((ours, source), (theirs, target)) = (near.filled(16 * SIZE, 1), far.filled(16 * SIZE, 2));
        let transfer = near.connection.write(&source, target.remote()).unwrap();
        assert_eq!(transfer.try_wait().unwrap(), None, "the window holds half of it");
        let transfer = in_a_child(transfer, drop);
        assert_eq!(transfer.wait().unwrap().bytes, 16 * SIZE);
        assert_same(&contents(&theirs), &contents(&ours), "after the fork");
    }
    census.assert_unchanged();
}

#[test]
fn a_childs_librdmacm_ids_leave_the_parents_connected() {
    let any: SocketAddr = SocketAddr::new(FAR.parse().unwrap(), 0);
    // librdmacm keeps both devices open from the first use on.
    drop(Outgoing::resolve(Listener::bind(any).unwrap().local_addr(), None, TIMEOUT).unwrap());
    let census = Census::take();
    {
        let listener = Listener::bind(any).unwrap();
        let outgoing = Outgoing::resolve(listener.local_addr(), None, TIMEOUT).unwrap();
        // Dropped in the child: a listener, a resolved route, …
        let (listener, outgoing) = in_a_child((listener, outgoing), drop);
        let (mut near, far) = (End::new("rxe0", Default::default()), End::new("rxe1", Default::default()));
        let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
        let mut far = std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let mut far = far;
                // … a request that waits for an answer, …
                let incoming = in_a_child(listener.accept_request(TIMEOUT).unwrap(), drop);
                incoming.accept(&mut far.connection, &[], TIMEOUT).unwrap();
                far
            });
            outgoing.connect(&mut near.connection, &[], TIMEOUT).unwrap();
            server.join().unwrap()
        });
        // … and both ends of an established connection.
        (near, far) = in_a_child((near, far), |(near, far)| {
            far.connection.disconnect();
            drop((near, far));
        });
        // The peer's notice of an end would have arrived by then.
        std::thread::sleep(Duration::from_millis(200));
        assert!(near.connection.is_usable() && far.connection.is_usable());
        near.connection.write(&source, target.remote()).unwrap().wait().unwrap();
        assert_same(&contents(&theirs), &contents(&ours), "after the fork");
        near.connection.disconnect();
        assert_refused!(
            far.connection.recv(&target).and_then(|transfer| transfer.wait()),
            transfer::Error::PeerDisconnected { .. }
        );
    }
    census.assert_unchanged();
}

#[test]
fn a_childs_camera_leaves_the_parents_capturing() {
    for node in cameras() {
        let mut camera = CaptureDevice::open(node).unwrap();
        camera.start(3).unwrap();
        let mut camera = in_a_child(camera, drop);
        for _ in 0..4 {
            let frame = camera.next_frame(TIMEOUT).unwrap();
            camera.requeue(frame.buffer).unwrap();
        }
    }
}
