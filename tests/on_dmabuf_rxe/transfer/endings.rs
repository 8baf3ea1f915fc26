//! How transfers end, what both directions learn of a failure, and which endings leave the connection usable.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::mr::{RegionSlice, RemoteRun};
use dmabuf_rdma::transfer::{ConnectionOptions, Error};
use dmabuf_rdma::verbs::{self, AsyncEvent, CompletionStatus, QueuePairOptions, Rkey};
use dmabuf_rdma::{Connection, ErrorKind, MemoryRegion, RemoteRegion};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::link::Link;
use crate::common::system::run;
use crate::common::wire::{End, FAR, Fault, Wire};
use crate::common::{assert_same, contents, pattern};

/// Not a measurement: what takes this long took the stall timeout of 30 s, or a minute.
const AT_ONCE: Duration = Duration::from_secs(20);

/// Shorter than any wait in these tests.
const SHORT: Duration = Duration::from_millis(100);

/// A description with a key that the peer does not have.
fn wrong_key(region: &MemoryRegion) -> RemoteRegion {
    let remote = region.remote();
    let runs = remote.runs().iter().map(|run| RemoteRun { rkey: Rkey(run.rkey.0 ^ 0x5a00), ..*run });
    RemoteRegion::new(runs, remote.access(), remote.buffer()).unwrap()
}

#[track_caller]
fn assert_wrong_key<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert_refused!(result, Error::Failed { status: CompletionStatus::REM_ACCESS_ERR, done: 0, .. });
}

/// Whether a side knows that its device refused a request of the peer: from an event, which soft-RoCE of Linux 7 reports,
/// or only from what was flushed.
#[track_caller]
fn assert_names_a_refused_request(message: &str) {
    let known = ["look at the peer's error", "received a request that its memory does not permit"];
    assert!(known.iter().any(|known| message.contains(known)), "{message}");
}

/// A window of chains is in flight behind the write that fails, and receives are posted on both sides.
#[test]
pub fn a_wrong_key_ends_both_directions_of_both_sides() {
    let start = Instant::now();
    let Wire { near, far } = Wire::with(ConnectionOptions::default().message_size(64 << 10));
    let ((_ours, source), (_theirs, target)) = (near.filled(4 << 20, 1), far.filled(4 << 20, 2));
    let (sender, receiver) = near.connection.split();
    let (far_sender, far_receiver) = far.connection.split();
    let (receiving, far_receiving) = (receiver.recv(&source).unwrap(), far_receiver.recv(&target).unwrap());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| receiving.wait());
        let far_waiting = scope.spawn(|| far_receiving.wait());
        assert_wrong_key(sender.write(&source, wrong_key(&target)).and_then(|transfer| transfer.wait()));
        // Either direction may be the first to see it, and both name the cause.
        let message = assert_refused!(waiting.join().unwrap(), Error::Unusable { done: 0, .. });
        assert!(message.contains("completed with REM_ACCESS_ERR (the remote key"), "{message}");
        // The peer's device refused a request, of which the peer has no completion.
        let message = assert_refused!(
            far_waiting.join().unwrap(),
            Error::Failed { status: CompletionStatus::WR_FLUSH_ERR, done: 0, .. }
                | Error::DeviceEvent { event: AsyncEvent::QueuePairAccessError { .. }, done: 0, .. }
        );
        assert_names_a_refused_request(&message);
        assert!(!message.contains("earlier"), "{message}");
    });
    assert!(sender.failure().unwrap().contains("REM_ACCESS_ERR"));
    assert!(!far_sender.is_usable());
    assert!(start.elapsed() < AT_ONCE);
}

/// One thread, as in an event loop, in both orders.
#[test]
fn the_other_direction_names_the_first_reason() {
    for receiver_first in [false, true] {
        let Wire { near, far } = Wire::new();
        let ((_ours, source), (_theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
        let (sender, receiver) = near.connection.split();
        let receiving = receiver.recv(&source).unwrap();
        let write = sender.write(&source, wrong_key(&target)).unwrap();
        if receiver_first {
            // Only its own completions tell this direction, and the other one's have the reason.
            let message = assert_refused!(receiving.wait(), Error::Unusable { done: 0, .. });
            assert!(message.contains("completed with REM_ACCESS_ERR"), "{message}");
            assert_wrong_key(write.wait());
        } else {
            assert_wrong_key(write.wait());
            let message = assert_refused!(receiving.wait(), Error::Unusable { done: 0, .. });
            assert!(message.contains("Write of bytes 0..4096 (at iova"), "{message}");
        }
    }
}

/// Nothing of this direction is in flight, so no completion tells it.
#[test]
fn a_direction_without_requests_hears_of_the_failure() {
    // More than the window, so it cannot be there before somebody waits.
    let Wire { near, far } = Wire::with(ConnectionOptions::default().message_size(64 << 10));
    let ((_ours, source), (_theirs, target)) = (near.filled(32 << 20, 1), far.filled(32 << 20, 2));
    let (sender, receiver) = near.connection.split();
    let write = sender.write(&source, target.remote()).unwrap();
    receiver.disconnect();
    let message = assert_refused!(write.wait(), Error::Unusable { .. });
    assert!(message.contains("it was disconnected"), "{message}");
}

#[test]
fn a_receive_may_wait_longer_than_the_stall_timeout() {
    let Wire { near, far } = Wire::with(ConnectionOptions::default().stall_timeout(SHORT));
    let ((ours, source), (theirs, target)) = (near.filled(8192, 1), far.filled(8192, 2));
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| far.connection.recv(&target).unwrap().wait().unwrap());
        sleep(5 * SHORT);
        near.connection.send(&source).unwrap().wait().unwrap();
        receiving.join().unwrap();
    });
    assert_same(&contents(&theirs), &contents(&ours), "received");
}

/// The peer has begun to send, so what is missing is overdue.
#[test]
fn a_receive_stalls_after_its_first_message() {
    let options = ConnectionOptions::default().message_size(4096).stall_timeout(SHORT);
    let Wire { near, far } = Wire::with(options);
    let ((_ours, source), (_theirs, target)) = (near.filled(8192, 1), far.filled(8192, 2));
    let receiving = far.connection.recv(&target).unwrap();
    near.connection.send(source.slice(..4096).unwrap()).unwrap().wait().unwrap();
    assert_refused!(receiving.wait(), Error::Timeout { done: 4096, length: 8192, usable: false, .. });
    assert!(!far.connection.is_usable());
}

#[test]
fn a_receive_that_times_out_stays_posted() {
    let Wire { near, mut far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(3 << 20, 1), far.filled(3 << 20, 2));
    let (_other, elsewhere) = far.filled(3 << 20, 3);
    // By a timeout and by cancelling, waited for and polled.
    let receiving = far.connection.recv(&target).unwrap().timeout(SHORT);
    let ended = loop {
        match receiving.try_wait() {
            Ok(None) => sleep(SHORT / 4),
            ended => break ended,
        }
    };
    let message = assert_refused!(ended, Error::Timeout { done: 0, usable: true, .. });
    assert!(message.ends_with("the receive stays posted, and the connection is usable"), "{message}");
    assert_eq!(receiving.try_wait().unwrap(), None, "it can be waited for again");
    drop(receiving);
    let receiving = far.connection.recv(&target).unwrap();
    receiving.cancel();
    assert_refused!(receiving.wait(), Error::Cancelled { done: 0, usable: true, .. });
    drop(receiving);
    let ended = far.connection.recv(&target).unwrap().timeout(Duration::ZERO).wait();
    assert_refused!(ended, Error::Timeout { usable: true, .. });
    assert!(far.connection.is_usable(), "{:?}", far.connection.failure());

    // Other memory or another message size would need other receives.
    let message = assert_refused!(
        far.connection.recv(&elsewhere).and_then(|transfer| transfer.wait()),
        Error::ReceivePosted { length: 0x30_0000 }
    );
    assert!(message.contains("Call recv with the same memory"), "{message}");
    far.connection.set_message_size(4096);
    assert_refused!(
        far.connection.recv(&target).and_then(|transfer| transfer.wait()),
        Error::ReceivePosted { .. }
    );
    far.connection.set_message_size(1 << 20);

    // The other direction serves on, and the receive takes what comes, with nobody waiting for it.
    let (back, into) = near.filled(3 << 20, 4);
    far.connection.write(&elsewhere, into.remote()).unwrap().wait().unwrap();
    assert_same(&contents(&back), &pattern(3 << 20, 3), "written by the side that receives");
    near.connection.send(&source).unwrap().wait().unwrap();
    assert_eq!(far.connection.recv(&target).unwrap().wait().unwrap().bytes, 3 << 20);
    assert_same(&contents(&theirs), &contents(&ours), "received");

    // And of a half.
    let ended = far.connection.recv(&elsewhere).unwrap().timeout(SHORT).wait();
    assert_refused!(ended, Error::Timeout { usable: true, .. });
    near.connection.send(&source).unwrap().wait().unwrap();
    let (_sender, receiver) = far.connection.split();
    receiver.recv(&elsewhere).unwrap().wait().unwrap();
}

/// A connection with a posted receive ends like any other, and releases the memory.
#[test]
fn a_posted_receive_does_not_outlive_its_connection() {
    let Wire { near, far } = Wire::new();
    let region = near.register(&heap(1 << 20));
    let ended = near.connection.recv(&region).unwrap().timeout(Duration::ZERO).wait();
    assert_refused!(ended, Error::Timeout { usable: true, .. });
    let (sender, receiver) = near.connection.split();
    drop(receiver);
    assert!(sender.is_usable());
    drop(sender);
    region.deregister().expect("no other handle is left");
    let region = far.register(&heap(1 << 20));
    let ended = far.connection.recv(&region).unwrap().timeout(Duration::ZERO).wait();
    assert_refused!(ended, Error::Timeout { usable: true, .. });
    far.connection.disconnect();
    let message = assert_refused!(
        far.connection.recv(&region).and_then(|transfer| transfer.wait()),
        Error::Unusable { .. }
    );
    assert!(message.contains("it was disconnected"), "{message}");
}

/// The bytes had moved before anyone looked at the clock or the token.
#[test]
fn a_transfer_of_all_bytes_is_a_success() {
    let Wire { near, far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(4 << 20, 1), far.filled(4 << 20, 2));
    let remote = target.remote();
    for in_flight in [true, false] {
        // All four messages are posted at once.
        let write = near.connection.write(&source, &remote).unwrap().timeout(SHORT);
        if in_flight {
            write.cancel();
        }
        sleep(10 * SHORT);
        write.cancel();
        assert_eq!(write.wait().unwrap().bytes, 4 << 20);
        assert_same(&contents(&theirs), &contents(&ours), "written");
        assert!(near.connection.is_usable());
        theirs.map().unwrap().write(0, &pattern(4 << 20, 3)).unwrap();
    }
}

/// Connects two ends by IP address.
pub(super) fn connect_by_address(near: &mut End, far: &mut End) {
    let timeout = Duration::from_secs(30);
    let listener = Listener::bind(SocketAddr::new(FAR.parse().unwrap(), 0)).unwrap();
    let at = listener.local_addr();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let incoming = listener.accept_request(timeout).unwrap();
            incoming.accept(&mut far.connection, &[], timeout).unwrap();
        });
        let outgoing = Outgoing::resolve(at, None, timeout).unwrap();
        outgoing.connect(&mut near.connection, &[], timeout).unwrap();
    });
}

#[test]
fn the_last_message_is_delivered_before_the_disconnection() {
    let (mut near, mut far) = (End::new("rxe0", Default::default()), End::new("rxe1", Default::default()));
    assert_eq!((near.connection.is_usable(), far.connection.is_usable()), (false, false));
    connect_by_address(&mut near, &mut far);
    assert_eq!((near.connection.failure(), far.connection.failure()), (None, None));
    let ((ours, source), (theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
    // Nobody waits for the receive when the message comes.
    let ended = far.connection.recv(&target).unwrap().timeout(Duration::ZERO).wait();
    assert_refused!(ended, Error::Timeout { usable: true, .. });
    near.connection.send(&source).unwrap().wait().unwrap();
    near.connection.disconnect();
    let end = Instant::now() + AT_ONCE;
    while far.connection.is_usable() {
        assert!(Instant::now() < end, "the disconnection is not seen");
        sleep(SHORT / 4);
    }
    assert_eq!(far.connection.failure(), Some("the peer disconnected"));
    assert_eq!(far.connection.recv(&target).unwrap().wait().unwrap().bytes, 4096);
    assert_same(&contents(&theirs), &contents(&ours), "received");
    let message = assert_refused!(
        far.connection.recv(&target).and_then(|transfer| transfer.wait()),
        Error::PeerDisconnected { done: 0, length: 4096, .. }
    );
    assert!(message.contains("the peer disconnected"), "{message}");
}

#[test]
fn only_a_connected_connection_is_usable() {
    let (near, far) = (End::new("rxe0", Default::default()), End::new("rxe1", Default::default()));
    let ((_ours, source), (_theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
    assert!(!near.connection.is_usable());
    assert_eq!(near.connection.failure(), Some("it is not connected"));
    let message = assert_refused!(
        near.connection.write(&source, target.remote()).and_then(|transfer| transfer.wait()),
        Error::Unusable { .. }
    );
    assert_eq!(message, "the connection is not connected: connect it first");
    near.connection.connect(&far.connection.endpoint()).unwrap();
    far.connection.connect(&near.connection.endpoint()).unwrap();
    assert_eq!(near.connection.failure(), None);
    near.connection.write(&source, target.remote()).unwrap().wait().unwrap();
    // A refused request stops the peer's queue pair too, which no call of the peer has noticed yet.
    assert_wrong_key(near.connection.write(&source, wrong_key(&target)).and_then(|transfer| transfer.wait()));
    assert!(!near.connection.is_usable() && !far.connection.is_usable());
    assert_names_a_refused_request(far.connection.failure().unwrap());
}

/// An answer takes a second, twice as long as 7 timeouts of 67 ms.
#[test]
fn a_slow_peer_is_not_lost() {
    let Wire { near, far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(64 << 10, 1), far.filled(64 << 10, 2));
    let fault = Fault::new("delay 500ms");
    near.connection.write(&source, target.remote()).unwrap().wait().unwrap();
    drop(fault);
    assert_same(&contents(&theirs), &contents(&ours), "written");
}

#[test]
fn a_gather_survives_reordering_and_delay() {
    let Wire { near, far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(1 << 20, 1), far.filled(128 << 10, 2));
    // 64 rows of 2 KiB, of which 4 fit in a request.
    let rows = (0..64).map(|row| source.slice(row * 8192..row * 8192 + 2048).unwrap());
    let local = RegionSlice::concat(rows).unwrap();
    let fault = Fault::new("delay 100ms reorder 20%");
    near.connection.write(&local, target.remote()).unwrap().wait().unwrap();
    drop(fault);
    let expected: Vec<_> =
        contents(&ours).chunks(8192).take(64).flat_map(|row| row[..2048].to_vec()).collect();
    assert_same(&contents(&theirs), &expected, "gathered");
}

#[test]
fn a_dead_peer_is_named_with_the_timeouts() {
    let Wire { near, far } = Wire::new();
    let ((_ours, source), (_theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
    let remote = target.remote();
    drop(far.connection);
    let start = Instant::now();
    let ended = near.connection.write(&source, &remote).and_then(|transfer| transfer.wait());
    // 7 timeouts of 537 ms, with leave for an emulated machine.
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    let message = assert_refused!(ended, Error::Failed { status: CompletionStatus::RETRY_EXC_ERR, .. });
    assert!(message.contains("path is up): timeout 17 (537 ms), retry_count 6; 0 bytes"), "{message}");
}

/// Sixteen readers of one server with the default options, on a machine that computes besides. With timeouts of
/// 67 ms most of them lost the server.
#[test]
fn sixteen_readers_of_one_server() {
    const SIZE: u64 = 32 << 20;
    let (near, far) = (End::new("rxe0", Default::default()), End::new("rxe1", Default::default()));
    let (_theirs, target) = far.filled(SIZE, 2);
    let (remote, expected) = (target.remote(), pattern(SIZE as usize, 2));
    let reading = AtomicBool::new(true);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while reading.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let read = || {
            let ours = Connection::new(&near.domain, Default::default()).unwrap();
            let server = Connection::new(&far.domain, Default::default()).unwrap();
            ours.connect(&server.endpoint()).unwrap();
            server.connect(&ours.endpoint()).unwrap();
            let buffer = heap(SIZE);
            let region = near.register(&buffer);
            let ended = ours.read(&region, &remote).and_then(|transfer| transfer.wait());
            (ended, buffer)
        };
        let readers: Vec<_> = (0..16).map(|_| scope.spawn(read)).collect();
        let ended: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
        reading.store(false, Ordering::Relaxed);
        for (ended, buffer) in ended {
            ended.unwrap();
            assert_same(&contents(&buffer), &expected, "read");
        }
    });
}

#[test]
fn a_port_that_is_down_is_named() {
    let link = Link::new();
    {
        let one = End::new("going", Default::default());
        one.connection.connect(&one.connection.endpoint()).unwrap();
        let ((ours, source), (theirs, target)) = (one.filled(4096, 1), one.filled(4096, 2));
        // Before the first transfer: nothing is posted.
        run("ip", &["link", "set", "going0", "down"]);
        let refused = one.connection.write(&source, target.remote()).and_then(|transfer| transfer.wait());
        let message = assert_refused!(refused, Error::PortDown { port: 1, .. });
        assert!(message.starts_with("port 1 of going (network interface going0) is down"), "{message}");
        run("ip", &["link", "set", "going0", "up"]);
        assert!(one.connection.is_usable());
        one.connection.write(&source, target.remote()).unwrap().wait().unwrap();
        assert_same(&contents(&theirs), &contents(&ours), "written");
        // Later: after the failure.
        run("ip", &["link", "set", "going0", "down"]);
        let failed = one.connection.write(&source, target.remote()).and_then(|transfer| transfer.wait());
        let message = assert_refused!(failed, Error::Failed { done: 0, .. });
        assert!(message.contains("port 1 of going (network interface going0) is down; 0 bytes"), "{message}");
        assert!(one.connection.failure().unwrap().contains("going0) is down"));
    }
    link.deleted(link.delete());
}

/// Whatever the options are, nothing panics; what the device cannot do is refused.
#[test]
fn extreme_options_work_or_are_refused() {
    let extremes = ConnectionOptions::default()
        .message_size(0)
        .window(u32::MAX)
        .chain(u32::MAX)
        .stall_timeout(Duration::MAX);
    let pair =
        QueuePairOptions::default().max_sge(u32::MAX).send_depth(0).recv_depth(u32::MAX).rd_atomic(255);
    for options in [extremes, extremes.window(0).chain(0), extremes.queue_pair(pair)] {
        let (near, far) = (End::new("rxe0", options), End::new("rxe1", options));
        let (near, far) = (near, far);
        near.connection.connect(&far.connection.endpoint()).unwrap();
        far.connection.connect(&near.connection.endpoint()).unwrap();
        let ((ours, source), (theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
        // Messages of one byte.
        let (local, remote) = (source.slice(..100).unwrap(), target.remote().slice(..100).unwrap());
        let write = near.connection.write(&local, &remote).unwrap();
        assert_eq!(write.timeout(Duration::MAX).wait().unwrap().bytes, 100);
        assert_same(&contents(&theirs)[..100], &contents(&ours)[..100], "written");
    }
    let near = End::new("rxe0", Default::default());
    for pair in [
        QueuePairOptions::default().timeout(32),
        QueuePairOptions::default().retry_count(8),
        QueuePairOptions::default().rnr_retry(255),
    ] {
        let refused = Connection::new(&near.domain, ConnectionOptions::default().queue_pair(pair));
        assert_refused!(refused, Error::Verbs(verbs::Error::InvalidOption { .. }));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Misuse);
    }
}
