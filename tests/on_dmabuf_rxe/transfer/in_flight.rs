//! Many transfers in flight: order, waiting in any order and from any thread, cancelling, futures.

use std::future::Future;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use dmabuf_rdma::transfer::{Connection, ConnectionOptions, Error, Transfer};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::assert_refused;
use crate::common::census::{Census, regions};
use crate::common::wire::{Fault, Wire};
use crate::common::{assert_same, contents, pattern};

const PART: u64 = 64 << 10;
const PARTS: u64 = 100;

fn small() -> ConnectionOptions {
    ConnectionOptions::default().message_size(16 << 10).window(16)
}

/// Writes each part of a buffer with a transfer of its own.
fn write_parts(wire: &Wire, parts: u64) -> (Vec<Transfer>, impl FnOnce()) {
    let ((ours, source), (theirs, target)) =
        (wire.near.filled(parts * PART, 1), wire.far.filled(parts * PART, 2));
    let remote = target.remote();
    let write = |part: u64| {
        let range = part * PART..(part + 1) * PART;
        let (local, remote) = (source.slice(range.clone()).unwrap(), remote.slice(range).unwrap());
        wire.near.connection.write(local, remote).unwrap()
    };
    let transfers = (0..parts).map(write).collect();
    (transfers, move || {
        assert_same(&contents(&theirs), &contents(&ours), "all parts");
        drop((source, target));
    })
}

#[test]
fn waited_for_in_any_order() {
    let census = Census::take();
    {
        let wire = Wire::with(small());
        let (transfers, check) = write_parts(&wire, PARTS);
        for transfer in transfers.into_iter().rev() {
            assert_eq!(transfer.wait().unwrap().bytes, PART);
            assert_eq!(transfer.wait().unwrap().bytes, PART, "once more");
            assert_eq!(transfer.progress(), PART);
        }
        check();
    }
    census.assert_unchanged();
}

#[test]
fn waited_for_by_many_threads() {
    for busy_poll in [false, true] {
        let wire = Wire::with(small().busy_poll(busy_poll));
        let (transfers, check) = write_parts(&wire, PARTS);
        std::thread::scope(|scope| {
            for transfer in &transfers {
                // Two threads wait for each.
                scope.spawn(|| assert_eq!(transfer.wait().unwrap().bytes, PART));
                scope.spawn(|| assert_eq!(transfer.wait().unwrap().bytes, PART));
            }
        });
        check();
    }
}

/// Threads start and wait at once on one connection.
#[test]
fn threads_share_a_connection() {
    let wire = Wire::with(small());
    let ((ours, source), (theirs, target)) = (wire.near.filled(8 * PART, 1), wire.far.filled(8 * PART, 2));
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (source, remote, connection) = (&source, target.remote(), &wire.near.connection);
            scope.spawn(move || {
                let range = thread * PART..(thread + 1) * PART;
                for _ in 0..20 {
                    let local = source.slice(range.clone()).unwrap();
                    connection.write(local, remote.slice(range.clone()).unwrap()).unwrap().wait().unwrap();
                }
            });
        }
    });
    assert_same(&contents(&theirs), &contents(&ours), "written");
}

#[test]
fn transfers_are_carried_out_in_order() {
    let wire = Wire::with(small());
    let ((ours, source), (theirs, target)) = (wire.near.filled(4 * PART, 1), wire.far.filled(PART, 2));
    let transfers: Vec<_> = (0..4)
        .map(|part| {
            let local = source.slice(part * PART..(part + 1) * PART).unwrap();
            wire.near.connection.write(local, target.remote()).unwrap()
        })
        .collect();
    transfers[3].wait().unwrap();
    assert_same(&contents(&theirs), &contents(&ours)[3 * PART as usize..], "the last one wins");
    assert!(transfers[..3].iter().all(|transfer| transfer.try_wait().unwrap().is_some()));
}

/// Receives are posted ahead and filled in order.
#[test]
fn many_receives_are_posted_ahead() {
    let wire = Wire::with(small());
    let ((ours, source), (theirs, target)) = (wire.near.filled(8 * PART, 1), wire.far.filled(8 * PART, 2));
    let part = |number: u64| number * PART..(number + 1) * PART;
    let receives: Vec<_> =
        (0..8).map(|at| wire.far.connection.recv(target.slice(part(at)).unwrap()).unwrap()).collect();
    let sends: Vec<_> =
        (0..8).map(|at| wire.near.connection.send(source.slice(part(at)).unwrap()).unwrap()).collect();
    std::thread::scope(|scope| {
        // Each side has more messages than its window, so somebody waits on each.
        scope.spawn(|| sends.iter().for_each(|send| assert_eq!(send.wait().unwrap().bytes, PART)));
        for receive in receives.iter().rev() {
            assert_eq!(receive.wait().unwrap().bytes, PART);
        }
    });
    assert_same(&contents(&theirs), &contents(&ours), "received");
}

/// A transfer that waits for room is withdrawn; what was started before and after goes on.
#[test]
fn queued_transfers_are_cancelled_and_time_out() {
    let wire = Wire::with(small());
    let ((ours, source), (theirs, target)) = (wire.near.filled(8 << 20, 1), wire.far.filled(8 << 20, 2));
    let ((_other, other), remote) = (wire.near.filled(PART, 3), target.remote());
    let connection = &wire.near.connection;
    let first = connection.write(&source, &remote).unwrap();
    let queued = |at: u64| connection.write(&other, remote.slice(at..at + PART).unwrap()).unwrap();
    let (cancelled, late, kept) = (queued(0), queued(PART).timeout(Duration::ZERO), queued(2 * PART));
    let canceller = cancelled.canceller();
    canceller();
    assert_refused!(cancelled.wait(), Error::Cancelled { done: 0, length: PART, usable: true, .. });
    assert_refused!(cancelled.wait(), Error::Cancelled { done: 0, length: PART, usable: true, .. });
    assert_refused!(late.wait(), Error::Timeout { done: 0, usable: true, .. });
    canceller();
    assert_eq!(first.wait().unwrap().bytes, 8 << 20);
    kept.wait().unwrap();
    let mut expected = contents(&ours);
    expected[2 * PART as usize..3 * PART as usize].copy_from_slice(&pattern(PART as usize, 3));
    assert_same(&contents(&theirs), &expected, "without the withdrawn ones");
}

/// All of them end, each with what it moved, and none hangs.
#[test]
fn a_failure_ends_every_transfer() {
    let census = Census::take();
    {
        let mut options = small();
        options.queue_pair.timeout = 12;
        let wire = Wire::with(options);
        let ((_ours, source), (_theirs, target)) = (wire.near.filled(PART, 1), wire.far.filled(PART, 2));
        let fault = Fault::new("loss 100%");
        let remote = target.remote();
        let transfers: Vec<_> =
            (0..50).map(|_| wire.near.connection.write(&source, &remote).unwrap()).collect();
        let before = regions();
        std::thread::scope(|scope| {
            for (number, transfer) in transfers.iter().enumerate() {
                scope.spawn(move || match (number, transfer.wait()) {
                    (0, Err(Error::Failed { done: 0, .. })) => {}
                    (1.., Err(Error::Unusable { done: 0, .. })) => {}
                    other => panic!("{other:?}"),
                });
            }
        });
        drop((fault, source));
        assert_eq!(regions(), before - 1, "ended transfers hold no memory");
        assert_refused!(transfers[7].wait(), Error::Unusable { done: 0, .. });
    }
    census.assert_unchanged();
}

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Polls a future as an event loop does: again only once it was woken.
fn drive<F: Future>(connection: &Connection, future: F) -> F::Output {
    let mut future = pin!(future);
    let woken = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(woken.clone());
    let mut seen = usize::MAX;
    loop {
        let count = woken.0.load(Ordering::Relaxed);
        if count != seen {
            seen = count;
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return output;
            }
            continue;
        }
        let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(Duration::from_secs(20)).unwrap();
        assert_eq!(poll(&mut fds, timeout).unwrap(), 1, "an event, not the timeout");
        connection.process_events().unwrap();
    }
}

#[test]
fn transfers_are_futures() {
    let wire = Wire::with(small());
    let (transfers, check) = write_parts(&wire, 20);
    drive(&wire.near.connection, async {
        for transfer in transfers {
            assert_eq!(transfer.await.unwrap().bytes, PART);
        }
    });
    check();
}

/// A pending future is woken by progress only, however often it is polled.
#[test]
fn a_pending_future_does_not_wake_itself() {
    let wire = Wire::with(small());
    let region = wire.near.filled(PART, 1).1;
    let mut receive = wire.near.connection.recv(&region).unwrap();
    let woken = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(woken.clone());
    for _ in 0..3 {
        let polled = std::pin::Pin::new(&mut receive).poll(&mut Context::from_waker(&waker));
        assert!(polled.is_pending());
    }
    assert_eq!(woken.0.load(Ordering::Relaxed), 0);
    // Cancelling from elsewhere wakes it, once.
    receive.canceller()();
    assert_eq!(woken.0.load(Ordering::Relaxed), 1);
    let ended = drive(&wire.near.connection, receive);
    assert_refused!(ended, Error::Cancelled { usable: true, .. });
}

/// A thread waits for a receive before the connection manager connects, and hears of the disconnect.
#[test]
fn a_thread_that_waits_early_hears_of_the_disconnect() {
    use super::endings::connect_by_address;
    use crate::common::wire::End;
    let (mut near, mut far) = (End::new("rxe0", small()), End::new("rxe1", small()));
    let region = far.filled(PART, 1).1;
    let receive = far.connection.recv(&region).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| receive.wait());
        // It sleeps by then.
        std::thread::sleep(Duration::from_millis(200));
        connect_by_address(&mut near, &mut far);
        near.connection.disconnect();
        assert_refused!(waiting.join().unwrap(), Error::PeerDisconnected { done: 0, .. });
    });
}

/// A future that is dropped at any of its polls detaches its transfer.
#[test]
fn dropped_futures_leave_the_connection_usable() {
    let census = Census::take();
    {
        let wire = Wire::with(small());
        let ((ours, source), (theirs, target)) = (wire.near.filled(PART, 1), wire.far.filled(PART, 2));
        let waker = Waker::noop();
        for polls in 0..5 {
            let mut transfer = wire.near.connection.write(&source, target.remote()).unwrap();
            for _ in 0..polls {
                if std::pin::Pin::new(&mut transfer).poll(&mut Context::from_waker(waker)).is_ready() {
                    break;
                }
            }
        }
        wire.near.connection.write(&source, target.remote()).unwrap().wait().unwrap();
        assert_same(&contents(&theirs), &contents(&ours), "written");
        assert!(wire.near.connection.is_usable());
    }
    census.assert_unchanged();
}
