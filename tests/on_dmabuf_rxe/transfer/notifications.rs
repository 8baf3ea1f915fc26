//! Notifications: after the bytes, once each, beside messages, and many connections on one pool of receives.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use dmabuf_rdma::ErrorKind;
use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::transfer::{
    Connection, ConnectionOptions, Error, Notifications, RequestError, Worker, WorkerOptions,
};
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use futures_core::Stream;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::{Census, fds};
use crate::common::peers::TIMEOUT;
use crate::common::wire::{End, FAR, Wire, counted};
use crate::common::{assert_same, contents};

const SHORT: Duration = Duration::from_millis(50);

fn notified(depth: u32) -> ConnectionOptions {
    ConnectionOptions::default().notifications(depth)
}

#[test]
fn a_notification_comes_after_all_bytes() {
    const SIZE: u64 = 3 << 20;
    let Wire { near, far } = Wire::with(notified(4).message_size(64 << 10));
    let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            far.connection.notifications().wait(0xdead_beef, 1, TIMEOUT).unwrap();
            contents(&theirs)
        });
        near.connection.write_notify(&source, target.remote(), 0xdead_beef).unwrap().wait().unwrap();
        assert_same(&receiver.join().unwrap(), &contents(&ours), "written before the notification");
    });
    // Nor does a notification alone overtake a write.
    let (back, into) = near.filled(SIZE, 3);
    let writing = far.connection.write(&target, into.remote()).unwrap();
    let notifying = far.connection.notify(7, &[]).unwrap();
    near.connection.notifications().wait(7, 1, TIMEOUT).unwrap();
    assert_same(&contents(&back), &contents(&ours), "written back");
    assert_eq!(notifying.wait().unwrap().bytes, 0);
    assert_eq!(writing.wait().unwrap().bytes, SIZE);
}

/// The pool is filled again as fast as the notifications are looked at, so none meets an empty queue.
#[test]
fn five_hundred_back_to_back() {
    const COUNT: u32 = 500;
    let Wire { near, far } = Wire::with(notified(COUNT));
    let refused = counted("rcvd_rnr_err") + counted("send_rnr_err");
    for _ in 0..4 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let send = |id| near.connection.notify(id % 5, &[]).unwrap();
                let sent: Vec<_> = (0..COUNT).map(send).collect();
                sent.iter().for_each(|transfer| assert!(transfer.wait().is_ok()));
            });
            let notifications = far.connection.notifications();
            for id in [3, 0, 4, 1] {
                notifications.wait(id, u64::from(COUNT / 5), TIMEOUT).unwrap();
            }
            for _ in 0..COUNT / 5 {
                assert_eq!(notifications.take_timeout(TIMEOUT).unwrap().id, 2);
            }
            assert_eq!(notifications.try_take().unwrap(), None);
        });
    }
    assert_eq!(counted("rcvd_rnr_err") + counted("send_rnr_err"), refused, "receiver-not-ready NAKs");
}

/// A peer that is further ahead than the pool is deep waits, and nothing is lost.
#[test]
fn a_pool_of_one_receive_loses_nothing() {
    let Wire { near, far } = Wire::with(notified(1).message_size(4096));
    let sent: Vec<_> = (0..50_u8).map(|at| near.connection.notify(9, &[at]).unwrap()).collect();
    for at in 0..50 {
        assert_eq!(far.connection.notifications().take_timeout(TIMEOUT).unwrap().payload, [at]);
    }
    sent.iter().for_each(|transfer| assert!(transfer.wait().is_ok()));
}

#[test]
fn payloads_up_to_the_limit() {
    let Wire { near, far } = Wire::with(notified(16));
    let full: Vec<u8> = (0..64).collect();
    for payload in [&[][..], &[7], &full[..63], &full] {
        near.connection.notify(5, payload).unwrap().wait().unwrap();
        let notification = far.connection.notifications().take_timeout(TIMEOUT).unwrap();
        assert_eq!((notification.id, &notification.payload[..]), (5, payload));
        assert_eq!(notification.qp_num, far.connection.endpoint().qp_num);
    }
    let refused = near.connection.notify(5, &[0; 65]);
    assert_refused!(refused, Error::Request(RequestError::PayloadTooLong { length: 65, limit: 64 }));
    assert!(near.connection.is_usable());
}

#[test]
fn messages_go_on_beside_notifications() {
    let Wire { near, far } = Wire::with(notified(8).message_size(4096));
    let ((ours, source), (theirs, target)) = (near.filled(64 << 10, 1), far.filled(64 << 10, 2));
    for at in 0..10 {
        let receiving = far.connection.recv(&target).unwrap();
        let early = near.connection.notify(at, &[]).unwrap();
        let sending = near.connection.send(&source).unwrap();
        let late = near.connection.notify(at, b"late").unwrap();
        far.connection.notifications().wait(at, 2, TIMEOUT).unwrap();
        receiving.wait().unwrap();
        assert_same(&contents(&theirs), &contents(&ours), "received");
        for transfer in [early, sending, late] {
            transfer.wait().unwrap();
        }
    }
    // And where the peer sends first.
    let sending = far.connection.send(target.slice(..100).unwrap()).unwrap();
    far.connection.notify(1, &[]).unwrap().wait().unwrap();
    near.connection.recv(source.slice(..100).unwrap()).unwrap().wait().unwrap();
    sending.wait().unwrap();
}

/// One side is notified, and the other is not: writes and notifications go where they can, and messages nowhere.
#[test]
fn sides_that_differ_say_so() {
    let (near, far) = (End::new("rxe0", ConnectionOptions::default()), End::new("rxe1", notified(4)));
    near.connection.connect(&far.connection.endpoint()).unwrap();
    far.connection.connect(&near.connection.endpoint()).unwrap();
    let ((_ours, source), (_theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
    near.connection.write_notify(&source, target.remote(), 1).unwrap().wait().unwrap();
    far.connection.notifications().wait(1, 1, TIMEOUT).unwrap();
    let none = |side| {
        move |error: &Error| match error {
            Error::Request(RequestError::NoNotifications { side: actual }) => *actual == side,
            _ => false,
        }
    };
    let refused = far.connection.write_notify(&target, source.remote(), 1).unwrap_err();
    assert!(none("the peer")(&refused), "{refused}");
    let refused = far.connection.notify(1, &[]).unwrap_err();
    assert!(none("the peer")(&refused) && refused.kind() == ErrorKind::Misuse, "{refused}");
    let refused = near.connection.notifications().try_take().unwrap_err();
    assert!(none("this side")(&refused), "{refused}");
    let refused = near.connection.notifications().wait(1, 1, SHORT).unwrap_err();
    assert!(none("this side")(&refused), "{refused}");
    for end in [&near, &far] {
        let region = if end.connection.endpoint().qp_num == near.connection.endpoint().qp_num {
            &source
        } else {
            &target
        };
        assert_refused!(end.connection.send(region), Error::Request(RequestError::NoMessages));
        assert_refused!(end.connection.recv(region), Error::Request(RequestError::NoMessages));
        assert!(end.connection.is_usable());
    }
}

#[test]
fn a_wait_that_times_out_takes_nothing() {
    let Wire { near, far } = Wire::with(notified(4));
    let notifications = far.connection.notifications();
    near.connection.notify(3, &[]).unwrap().wait().unwrap();
    let refused = notifications.wait(3, 2, SHORT);
    let message = assert_refused!(refused, Error::NotificationTimeout { id: Some(3), count: 2, came: 1, .. });
    assert!(message.starts_with("1 of 2 notifications of id 3 came within"), "{message}");
    let refused = notifications.wait(4, 1, Duration::ZERO);
    let message = assert_refused!(refused, Error::NotificationTimeout { came: 0, others: 1, .. });
    assert!(message.ends_with("and 1 of other ids wait to be taken"), "{message}");
    near.connection.notify(3, &[]).unwrap().wait().unwrap();
    notifications.wait(3, 2, TIMEOUT).unwrap();
    assert_refused!(notifications.take_timeout(SHORT), Error::NotificationTimeout { id: None, came: 0, .. });
    notifications.wait(99, 0, Duration::ZERO).unwrap();
    assert!(far.connection.is_usable());
}

/// A cancelled write does not notify, and neither does one that fails.
#[test]
fn no_notification_of_bytes_that_did_not_come() {
    let Wire { near, far } = Wire::with(notified(4).message_size(4096).window(4));
    let ((_ours, source), (_theirs, target)) = (near.filled(4 << 20, 1), far.filled(4 << 20, 2));
    let writing = near.connection.write_notify(&source, target.remote(), 1).unwrap();
    writing.cancel();
    assert_refused!(writing.wait(), Error::Cancelled { usable: true, .. });
    assert_refused!(
        far.connection.notifications().wait(1, 1, SHORT),
        Error::NotificationTimeout { came: 0, .. }
    );
    near.connection.notify(2, &[]).unwrap().wait().unwrap();
    let gone = target.remote();
    drop(target);
    near.connection.write_notify(&source, &gone, 3).unwrap().wait().unwrap_err();
    let notifications = far.connection.notifications();
    // What came before the failure is there, and then its reason.
    notifications.wait(2, 1, TIMEOUT).unwrap();
    assert_refused!(near.connection.notifications().take_timeout(TIMEOUT), Error::NotificationsEnded { .. });
}

/// By IP address the second queue pair is agreed in the private data. The peer's disconnect wakes whoever waits.
#[test]
fn by_address_until_the_peer_disconnects() {
    let census = super::connecting::census();
    for busy_poll in [false, true] {
        let far_options = notified(4).busy_poll(busy_poll);
        let (mut near, mut far) = (End::new("rxe0", notified(4)), End::new("rxe1", far_options));
        let listener = Listener::bind(format!("{FAR}:0").parse().unwrap()).unwrap();
        let at = listener.local_addr();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let incoming = listener.accept_request(TIMEOUT).unwrap();
                assert_eq!(&incoming.private_data()[..48], &[7; 48]);
                incoming.accept(&mut far.connection, &[8; 188], TIMEOUT).unwrap();
            });
            let outgoing = Outgoing::resolve(at, None, TIMEOUT).unwrap();
            let reply = outgoing.connect(&mut near.connection, &[7; 48], TIMEOUT).unwrap();
            assert_eq!(reply[..], [8; 188]);
            server.join().unwrap();
        });
        let ((ours, source), (theirs, target)) = (near.filled(8192, 1), far.filled(8192, 2));
        let receiving = far.connection.recv(&target).unwrap();
        near.connection.send(&source).unwrap().wait().unwrap();
        near.connection.notify(1, b"x").unwrap().wait().unwrap();
        receiving.wait().unwrap();
        assert_same(&contents(&theirs), &contents(&ours), "received");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| far.connection.notifications().wait(1, 2, TIMEOUT));
            std::thread::sleep(SHORT);
            near.connection.disconnect();
            let ended = waiting.join().unwrap();
            assert_refused!(ended, Error::NotificationsEnded { came: 1, count: 2, peer_gone: true, .. });
        });
        far.connection.notifications().wait(1, 1, SHORT).unwrap();
        let ended = far.connection.notifications().try_take().unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::PeerGone, "{ended}");
        assert_refused!(far.connection.recv(&target), Error::PeerDisconnected { .. });
    }
    census.assert_unchanged();
}

/// A server with a hundred clients has one pool, one completion queue and one descriptor for all.
#[test]
fn a_hundred_connections_share_a_pool() {
    const CLIENTS: u32 = 100;
    const EACH: u32 = 20;
    let census = Census::take();
    {
        let domain = |name| ProtectionDomain::new(&Device::by_name(name).unwrap().open().unwrap()).unwrap();
        let (ours, theirs) = (domain("rxe0"), domain("rxe1"));
        let options = ConnectionOptions::default().window(16);
        let server = Worker::new(&theirs, WorkerOptions::default().notifications(256)).unwrap();
        let clients = Worker::new(&ours, WorkerOptions::default()).unwrap();
        let before = fds();
        let pairs: Vec<(Connection, Connection)> = (0..CLIENTS)
            .map(|_| {
                let (client, served) =
                    (clients.connection(options).unwrap(), server.connection(options).unwrap());
                client.connect(&served.endpoint()).unwrap();
                served.connect(&client.endpoint()).unwrap();
                (client, served)
            })
            .collect();
        assert_eq!(fds(), before, "connections of a worker need no descriptors");
        let register =
            |domain| MemoryRegion::builder(domain, &heap(4096)).access(Access::REMOTE).register().unwrap();
        let (source, target) = (register(&ours), register(&theirs));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..EACH {
                    let sent: Vec<_> = pairs
                        .iter()
                        .map(|(client, _)| client.write_notify(&source, target.remote(), round).unwrap())
                        .collect();
                    sent.iter().for_each(|transfer| assert!(transfer.wait().is_ok()));
                }
            });
            // Half of them by one who takes whatever comes.
            let (mut seen, notifications) = (HashMap::new(), server.notifications());
            for _ in 0..CLIENTS * EACH / 2 {
                let notification = notifications.take_timeout(TIMEOUT).unwrap();
                *seen.entry(notification.qp_num).or_insert(0) += 1;
            }
            // The others by their connections.
            for (_, served) in &pairs {
                let left = EACH - seen.get(&served.endpoint().qp_num).copied().unwrap_or(0);
                for _ in 0..left {
                    served.notifications().take_timeout(TIMEOUT).unwrap();
                }
            }
            assert_eq!(notifications.try_take().unwrap(), None);
        });
        // One that fails leaves the others as they are.
        let (client, served) = &pairs[3];
        client.disconnect();
        assert!(!client.is_usable() && served.is_usable());
        let (client, served) = &pairs[4];
        client.notify(77, &[]).unwrap().wait().unwrap();
        served.notifications().wait(77, 1, TIMEOUT).unwrap();
        // Those that go make room for others.
        let mut pairs = pairs;
        pairs.truncate(90);
        let more: Vec<_> = (0..10).map(|_| server.connection(options).unwrap()).collect();
        drop(more);
    }
    census.assert_unchanged();
}

#[test]
fn a_full_worker_says_what_it_needs() {
    let domain = ProtectionDomain::new(&Device::by_name("rxe0").unwrap().open().unwrap()).unwrap();
    let worker = Worker::new(&domain, WorkerOptions::default().completions(600)).unwrap();
    let first = worker.connection(ConnectionOptions::default()).unwrap();
    let _second = worker.connection(ConnectionOptions::default()).unwrap();
    let refused = worker.connection(ConnectionOptions::default());
    let message = assert_refused!(refused, Error::Verbs(_));
    for part in ["room for 256 completions and 88 are left", "completions", "window"] {
        assert!(message.contains(part), "{message}");
    }
    drop(first);
    worker.connection(ConnectionOptions::default()).unwrap();
}

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A stream is woken once by each arrival, hears of the end, and then ends.
#[test]
fn a_stream_of_notifications() {
    let Wire { near, far } = Wire::with(notified(8));
    let count = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(count.clone());
    let mut stream: Notifications = far.connection.notifications();
    let mut next = || Pin::new(&mut stream).poll_next(&mut Context::from_waker(&waker));
    let readable = |timeout: u16| {
        let mut fds = [PollFd::new(far.connection.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(timeout)).unwrap() == 1
    };
    for round in 0..20 {
        assert!(next().is_pending() && next().is_pending());
        assert!(!readable(0), "nothing has come");
        let sending = near.connection.notify(round, &[1]).unwrap();
        assert!(readable(20_000), "the descriptor tells the event loop");
        far.connection.process_events().unwrap();
        assert_eq!(count.0.swap(0, Ordering::Relaxed), 1);
        match next() {
            Poll::Ready(Some(Ok(notification))) => assert_eq!(notification.id, round),
            other => panic!("{other:?}"),
        }
        sending.wait().unwrap();
    }
    assert!(next().is_pending());
    far.connection.disconnect();
    assert_eq!(count.0.load(Ordering::Relaxed), 1);
    assert!(matches!(next(), Poll::Ready(Some(Err(Error::NotificationsEnded { .. })))));
    assert!(matches!(next(), Poll::Ready(None)));
}
