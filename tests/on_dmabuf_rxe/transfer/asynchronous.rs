//! Transfers, notifications and connections in a tokio runtime, which makes progress by itself.

use std::future::poll_fn;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::time::{Duration, Instant};

use dmabuf_rdma::cm::{self, Listener, Outgoing};
use dmabuf_rdma::transfer::{ConnectionOptions, Error, Notifications};
use dmabuf_rdma::verbs::Device;
use futures_core::Stream;
use nix::poll::{PollFd, PollFlags, poll};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

use super::connecting::{address, census};
use crate::assert_refused;
use crate::common::census::Census;
use crate::common::peers::TIMEOUT;
use crate::common::wire::{End, Fault, Wire};
use crate::common::{assert_same, contents};

const SHORT: Duration = Duration::from_millis(100);

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn notified() -> ConnectionOptions {
    ConnectionOptions::default().notifications(16)
}

async fn next(
    notifications: &mut Notifications,
) -> Option<Result<dmabuf_rdma::transfer::Notification, Error>> {
    let next = poll_fn(|context| Pin::new(&mut *notifications).poll_next(context));
    tokio::time::timeout(TIMEOUT, next).await.expect("a notification or the end")
}

/// Halves and transfers are spawned apart, in the thousands.
#[test]
fn transfers_are_spawned() {
    const PARTS: u64 = 1000;
    let census = Census::take();
    runtime().block_on(async {
        let Wire { near, far } = Wire::with(notified());
        let ((ours, source), (theirs, target)) = (near.filled(PARTS << 10, 1), far.filled(PARTS << 10, 2));
        let mut listening = far.connection.notifications();
        let remote = target.remote();
        let (sender, _receiver) = near.connection.split();
        let mut all = JoinSet::new();
        for at in 0..PARTS {
            let range = at << 10..(at + 1) << 10;
            let (local, remote) = (source.slice(range.clone()).unwrap(), remote.slice(range).unwrap());
            all.spawn(match at % 100 {
                99 => sender.write_notify(local, remote, at as u32).unwrap(),
                _ => sender.write(local, remote).unwrap(),
            });
        }
        let notified = tokio::spawn(async move {
            for at in (99..PARTS as u32).step_by(100) {
                assert_eq!(next(&mut listening).await.unwrap().unwrap().id, at);
            }
        });
        while let Some(done) = all.join_next().await {
            assert_eq!(done.unwrap().unwrap().bytes, 1 << 10);
        }
        notified.await.unwrap();
        assert_same(&contents(&theirs), &contents(&ours), "written");
    });
    census.assert_unchanged();
}

/// Tasks that wait for ids of their own hear of them, and one that is dropped takes nothing.
#[test]
fn tasks_wait_for_their_ids() {
    runtime().block_on(async {
        let Wire { near, far } = Wire::with(notified());
        let wait = |id: u32, count| {
            let notifications = far.connection.notifications();
            tokio::spawn(async move { notifications.arrived(id, count).await })
        };
        let dropped = wait(1, 3);
        let (first, second) = (wait(1, 2), wait(2, 1));
        tokio::task::yield_now().await;
        dropped.abort();
        near.connection.notify(1, &[]).unwrap().await.unwrap();
        near.connection.notify(2, &[]).unwrap().await.unwrap();
        second.await.unwrap().unwrap();
        assert!(!first.is_finished());
        near.connection.notify(1, &[]).unwrap().await.unwrap();
        first.await.unwrap().unwrap();
        near.connection.notify(3, b"x").unwrap().await.unwrap();
        assert_eq!(far.connection.notifications().recv().await.unwrap().payload, b"x");
        assert_eq!(far.connection.notifications().try_take().unwrap(), None);
    });
}

/// Without a tick of anybody: the timeout of a transfer, the stall timeout, and the peer's disconnect.
#[test]
fn whatever_ends_a_transfer_wakes_its_task() {
    let census = census();
    runtime().block_on(async {
        let Wire { near, far } = Wire::with(notified().stall_timeout(3 * SHORT));
        let ((_ours, source), (_theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
        let start = Instant::now();
        let ended = far.connection.recv(&target).unwrap().timeout(SHORT).await;
        assert_refused!(ended, Error::Timeout { usable: true, .. });
        assert!(start.elapsed() >= SHORT);
        let sending = near.connection.send(&source).unwrap();
        far.connection.recv(&target).unwrap().await.unwrap();
        sending.await.unwrap();
        let _lost = Fault::new("loss 100%");
        let start = Instant::now();
        let ended = near.connection.write(&source, target.remote()).unwrap().await;
        assert_refused!(ended, Error::Timeout { timeout, usable: false, .. } if *timeout == 3 * SHORT);
        assert!(start.elapsed() >= 3 * SHORT);
    });
    runtime().block_on(async {
        let (near, far) = connect().await;
        let (_theirs, target) = far.filled(4096, 2);
        let receiving = tokio::spawn(far.connection.recv(&target).unwrap());
        let mut listening = far.connection.notifications();
        let listening = tokio::spawn(async move {
            let end = next(&mut listening).await.unwrap().unwrap_err();
            assert!(next(&mut listening).await.is_none());
            end
        });
        tokio::time::sleep(SHORT).await;
        let start = Instant::now();
        near.connection.disconnect();
        assert_refused!(receiving.await.unwrap(), Error::PeerDisconnected { .. });
        let ended = listening.await.unwrap();
        assert!(matches!(ended, Error::NotificationsEnded { peer_gone: true, .. }), "{ended}");
        assert!(start.elapsed() < Duration::from_secs(10), "sooner than any timeout");
    });
    census.assert_unchanged();
}

/// Two ends that are connected by address, in tasks.
async fn connect() -> (End, End) {
    let (mut near, mut far) = (End::new("rxe0", notified()), End::new("rxe1", notified()));
    let listener = Listener::bind(address(0)).unwrap();
    let at = listener.local_addr();
    let server = tokio::spawn(async move {
        let incoming = listener.accept_request_async(TIMEOUT).await.unwrap();
        assert_eq!(incoming.private_data()[..5], *b"hello");
        incoming.accept_async(&mut far.connection, b"welcome", TIMEOUT).await.unwrap();
        far
    });
    let outgoing = Outgoing::resolve_async(at, None, TIMEOUT).await.unwrap();
    let reply = outgoing.connect_async(&mut near.connection, b"hello", TIMEOUT).await.unwrap();
    assert_eq!(reply[..7], *b"welcome");
    (near, server.await.unwrap())
}

#[test]
fn connecting_ends_with_its_timeout_or_its_future() {
    let census = census();
    runtime().block_on(async {
        let listener = Listener::bind(address(0)).unwrap();
        let ended = listener.accept_request_async(SHORT).await;
        assert_refused!(ended, cm::Error::Timeout { timeout, .. } if *timeout == SHORT);
        let at = listener.local_addr();
        let mut near = End::new("rxe0", notified());
        // Nobody accepts; two tasks wait for one request.
        let outgoing = Outgoing::resolve_async(at, None, TIMEOUT).await.unwrap();
        let ended = outgoing.connect_async(&mut near.connection, &[], SHORT).await;
        assert_refused!(ended, cm::Error::Timeout { .. });
        let mut near = End::new("rxe0", notified());
        let outgoing = Outgoing::resolve_async(at, None, TIMEOUT).await.unwrap();
        let connecting = outgoing.connect_async(&mut near.connection, &[], TIMEOUT);
        assert!(tokio::time::timeout(SHORT, connecting).await.is_err());
        // The peer asks, and does not reply.
        let listener = Listener::bind(address(0)).unwrap();
        let outgoing = Outgoing::resolve_async(listener.local_addr(), None, TIMEOUT).await.unwrap();
        let mut near = End::new("rxe0", notified());
        let mut connecting = pin!(outgoing.connect_async(&mut near.connection, &[], TIMEOUT));
        poll_fn(|context| Poll::Ready(connecting.as_mut().poll(context).is_pending())).await;
        let mut far = End::new("rxe1", notified());
        let mut arrivals = far.connection.notifications();
        let waiting = tokio::spawn(async move { next(&mut arrivals).await });
        tokio::task::yield_now().await;
        let incoming = listener.accept_request_async(TIMEOUT).await.unwrap();
        let ended = incoming.accept_async(&mut far.connection, &[], SHORT).await;
        assert_refused!(ended, cm::Error::Timeout { .. });
        assert_eq!(far.connection.failure(), Some("its connection was not established"));
        assert_refused!(waiting.await.unwrap().unwrap(), Error::NotificationsEnded { .. });
        let nobody = Outgoing::resolve_async("203.0.113.7:9".parse().unwrap(), None, TIMEOUT).await;
        assert_refused!(nobody, cm::Error::Address { .. });
    });
    census.assert_unchanged();
}

/// A future that is dropped at any await leaves its transfer to go on.
#[test]
fn futures_dropped_at_every_await_point() {
    let census = Census::take();
    runtime().block_on(async {
        let Wire { near, far } = Wire::with(notified().message_size(4096));
        let ((ours, source), (theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
        for polls in 0..40 {
            let mut writing = near.connection.write_notify(&source, target.remote(), polls).unwrap();
            for _ in 0..polls {
                let polled = poll_fn(|context| Poll::Ready(Future::poll(Pin::new(&mut writing), context)));
                if polled.await.is_ready() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            drop(writing);
            let mut arrivals = far.connection.notifications();
            // A wait that is dropped takes nothing.
            let arrived = match tokio::time::timeout(Duration::ZERO, next(&mut arrivals)).await {
                Ok(arrived) => arrived,
                Err(_) => next(&mut arrivals).await,
            };
            assert_eq!(arrived.unwrap().unwrap().id, polls);
        }
        assert_same(&contents(&theirs), &contents(&ours), "written");
    });
    census.assert_unchanged();
}

/// A task depends on no other runtime's threads, and a wait that is dropped leaves nothing behind.
#[test]
fn a_runtime_that_is_not_run_holds_up_no_other() {
    let census = census();
    {
        let Wire { near, far } = Wire::with(notified());
        let ((_ours, source), (_theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
        let first = Builder::new_current_thread().enable_all().build().unwrap();
        // Its task is started here, and runs no more.
        first.block_on(async {
            near.connection.write(&source, target.remote()).unwrap().await.unwrap();
        });
        let second = runtime();
        let receiving = near.connection.recv(&source).unwrap().timeout(SHORT);
        assert_refused!(second.block_on(receiving), Error::Timeout { .. });
        second.block_on(async {
            near.connection.write(&source, target.remote()).unwrap().await.unwrap();
        });

        // An event loop without a runtime.
        let write = near.connection.write(&source, target.remote()).unwrap();
        while write.try_wait().unwrap().is_none() {
            let mut fds = [PollFd::new(write.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, 20_000_u16), Ok(1), "the descriptor tells of the end");
        }
        // A runtime that cannot have a task leaves the work to others.
        let bare = Builder::new_current_thread().build().unwrap();
        bare.block_on(async { near.connection.write(&source, target.remote()).unwrap().await.unwrap() });
        bare.block_on(tokio::task::yield_now());
        assert!(near.connection.is_usable());

        let notifications = far.connection.notifications();
        let waker = Arc::new(Nobody);
        for _ in 0..3 {
            let mut waiting = pin!(notifications.recv());
            let wakes = waker.clone().into();
            assert!(waiting.as_mut().poll(&mut Context::from_waker(&wakes)).is_pending());
        }
        assert_eq!(Arc::strong_count(&waker), 1, "a wait that was dropped is known");
        drop((first, second));
    }
    census.assert_unchanged();
}

struct Nobody;

impl Wake for Nobody {
    fn wake(self: Arc<Self>) {}
}

/// A runtime that goes leaves its connections to the next one, and to threads.
#[test]
fn a_runtime_may_end() {
    let Wire { near, far } = Wire::with(notified());
    let ((_ours, source), (_theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
    for _ in 0..3 {
        let runtime = runtime();
        runtime.block_on(async { near.connection.write(&source, target.remote()).unwrap().await.unwrap() });
        drop(runtime);
        near.connection.write(&source, target.remote()).unwrap().wait().unwrap();
    }
    // One without an I/O driver cannot make progress, and says so.
    let bare = Builder::new_current_thread().build().unwrap();
    let ended = bare.block_on(async { far.connection.recv(&target).unwrap().await });
    let message = assert_refused!(ended, Error::Unusable { .. });
    assert!(message.contains("enable_all"), "{message}");
    assert!(Device::by_name("rxe0").is_ok());
}
