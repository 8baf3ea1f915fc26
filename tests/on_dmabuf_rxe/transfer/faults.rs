//! A wire with faults, and peers that go, forbid, or are not ready.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dmabuf_rdma::mr::{Access, RemoteRun};
use dmabuf_rdma::transfer::{ConnectionOptions, Error, Transferred, Worker, WorkerOptions};
use dmabuf_rdma::verbs::{self, CompletionStatus, Rkey};
use dmabuf_rdma::{Iova, RemoteRegion, Transfer};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::{Census, regions};
use crate::common::system::run;
use crate::common::wire::{End, Fault, Wire, counted};
use crate::common::{assert_same, contents, pattern};

/// Short messages, since a READ that loses a packet asks again for the rest of its message.
fn patient() -> ConnectionOptions {
    let mut options = ConnectionOptions::default().message_size(64 << 10).window(8);
    options.queue_pair.timeout = 12; // 17 ms, since the loss of a burst's last packet costs a timeout
    options.stall_timeout(Duration::from_secs(60))
}

const OUT_OF_ORDER: &str = "out_of_seq_request";

/// Writes, reads and sends over a wire with a fault. Every byte must be right, and a device must have counted
/// the fault: requests out of order, after one that was lost, corrupted or overtaken, or duplicate ones.
/// Returns the number of dropped packets.
#[track_caller]
fn every_byte_under(fault: &str, size: u64, noticed: &str) -> u64 {
    let before = counted(noticed);
    let Wire { near, far } = Wire::with(patient());
    let ((ours, source), (theirs, target)) = (near.filled(size, 1), far.filled(size, 2));
    let remote = target.remote();
    let fault = Fault::new(fault);
    near.connection.write(&source, &remote).unwrap().wait().unwrap();
    assert_same(&contents(&theirs), &contents(&ours), "written");
    theirs.map().unwrap().write(0, &pattern(size as usize, 3)).unwrap();
    near.connection.read(&source, &remote).unwrap().wait().unwrap();
    assert_same(&contents(&ours), &pattern(size as usize, 3), "read");
    theirs.map().unwrap().write(0, &pattern(size as usize, 4)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| far.connection.send(&target).unwrap().wait().unwrap());
        near.connection.recv(&source).unwrap().wait().unwrap();
    });
    assert_same(&contents(&ours), &pattern(size as usize, 4), "received");
    assert!(counted(noticed) > before, "{noticed} stayed {before}");
    fault.dropped()
}

#[test]
fn one_packet_in_a_hundred_is_lost() {
    assert!(every_byte_under("loss 1%", 4 << 20, OUT_OF_ORDER) > 0);
}

#[test]
fn one_packet_in_twenty_is_lost() {
    assert!(every_byte_under("loss 5%", 1 << 20, OUT_OF_ORDER) > 0);
}

#[test]
fn packets_are_reordered() {
    every_byte_under("delay 1ms reorder 75% 50%", 2 << 20, OUT_OF_ORDER);
}

#[test]
fn packets_are_duplicated() {
    every_byte_under("duplicate 10%", 4 << 20, "duplicate_request");
}

#[test]
fn packets_are_corrupted() {
    every_byte_under("corrupt 2%", 2 << 20, OUT_OF_ORDER);
}

/// Runs `action` on a thread once bytes of a write have moved, and returns how the write ended.
#[track_caller]
fn write_while(
    write: Transfer,
    timeout: Duration,
    action: impl FnOnce() + Send,
) -> Result<Transferred, Error> {
    let moving = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !moving.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            action();
        });
        write.timeout(timeout).wait_with_progress(|_| moving.store(true, Ordering::Relaxed))
    })
}

/// The peer's queue pair is destroyed while bytes move.
#[test]
fn a_peer_that_goes_ends_the_transfer() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::with(ConnectionOptions::default().message_size(64 << 10));
        let ((_ours, source), (_theirs, target)) = (near.filled(32 << 20, 1), far.filled(32 << 20, 2));
        let remote = target.remote();
        let write = near.connection.write(&source, &remote).unwrap();
        let ended = write_while(write, Duration::from_secs(20), || drop(far.connection));
        let message = assert_refused!(ended, Error::Failed { status: CompletionStatus::RETRY_EXC_ERR, .. });
        for part in ["Write of bytes ", "of the peer, Rkey(0x", "RETRY_EXC_ERR (the peer did not answer"] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!near.connection.is_usable());
        let message = assert_refused!(
            near.connection.write(&source, &remote).and_then(|transfer| transfer.wait()),
            Error::Unusable { .. }
        );
        assert!(message.contains("RETRY_EXC_ERR"), "{message}");
        assert!(near.connection.failure().unwrap().contains("RETRY_EXC_ERR"));
    }
    census.assert_unchanged();
}

/// The wire is cut. The transfer's timeout expires long before the device's retries do.
#[test]
fn a_timeout_ends_a_transfer_that_stands_still() {
    let census = Census::take();
    {
        let mut options = patient();
        options.queue_pair.timeout = 20; // 4 s
        let Wire { near, far } = Wire::with(options);
        let ((_ours, source), (theirs, target)) = (near.filled(4 << 20, 1), far.filled(4 << 20, 2));
        let fault = Fault::new("loss 100%");
        let timeout = Duration::from_millis(300);
        let transfer = near.connection.write(&source, target.remote()).unwrap();
        let start = Instant::now();
        let ended = transfer.timeout(timeout).wait();
        // Not a measurement: the device would retry for 32 seconds.
        assert!(start.elapsed() < Duration::from_secs(15));
        assert_refused!(
            ended,
            Error::Timeout { done: 0, length: 0x40_0000, timeout: expired, .. } if *expired == timeout
        );
        assert!(!near.connection.is_usable());
        // No flushed work request arrives when the wire is whole again.
        drop(fault);
        std::thread::sleep(Duration::from_millis(200));
        assert_same(&contents(&theirs), &pattern(4 << 20, 2), "untouched");
    }
    census.assert_unchanged();
}

#[test]
fn a_region_that_is_deregistered_under_traffic_is_named() {
    let Wire { near, far } = Wire::with(ConnectionOptions::default().message_size(64 << 10));
    let ((_ours, source), (_theirs, target)) = (near.filled(32 << 20, 1), far.filled(32 << 20, 2));
    let (write, rkey) = (near.connection.write(&source, target.remote()).unwrap(), target.rkey());
    let ended = write_while(write, Duration::MAX, || target.deregister().unwrap());
    let message = assert_refused!(
        ended,
        Error::Failed { status: CompletionStatus::REM_ACCESS_ERR, remote: Some((_, key)), .. }
            if *key == rkey
    );
    assert!(message.contains("REM_ACCESS_ERR (the remote key does not cover the bytes"), "{message}");
}

#[test]
fn a_wrong_key_is_named_with_its_bytes() {
    let Wire { near, far } = Wire::new();
    let ((_ours, source), (theirs, target)) = (near.filled(3 << 20, 1), far.filled(3 << 20, 2));
    let RemoteRun { iova, rkey, .. } = target.remote().runs()[0];
    // The second of three runs has another key.
    let wrong = Rkey(rkey.0 ^ 0x5a00);
    let run = |part: u64, rkey| RemoteRun { iova: Iova(iova.0 + (part << 20)), length: 1 << 20, rkey };
    let runs = [run(0, rkey), run(1, wrong), run(2, rkey)];
    let remote = RemoteRegion::new(runs, Access::REMOTE, theirs.id()).unwrap();
    match near.connection.write(&source, &remote).and_then(|transfer| transfer.wait()) {
        Err(Error::Failed { offset, length, remote, status, done, .. }) => {
            assert_eq!((offset, length, done), (1 << 20, 1 << 20, 1 << 20));
            assert_eq!(remote, Some((Iova(iova.0 + (1 << 20)), wrong)));
            assert_eq!(status, CompletionStatus::REM_ACCESS_ERR);
        }
        other => panic!("{other:?}"),
    }
    assert_same(&contents(&theirs)[2 << 20..], &pattern(3 << 20, 2)[2 << 20..], "after the failure");
}

#[test]
fn a_receiver_that_is_not_ready_is_named() {
    let mut options = ConnectionOptions::default();
    options.queue_pair.rnr_retry = 1;
    let Wire { near, far: _far } = Wire::with(options);
    let (_ours, source) = near.filled(4096, 1);
    assert_refused!(
        near.connection.send(&source).and_then(|transfer| transfer.wait()),
        Error::Failed { status: CompletionStatus::RNR_RETRY_EXC_ERR, offset: 0, .. }
    );
}

#[test]
fn a_shorter_message_than_the_receive_is_found() {
    let Wire { near, far } = Wire::new();
    let ((_ours, source), (_theirs, target)) = (near.filled(8192, 1), far.filled(4096, 2));
    std::thread::scope(|scope| {
        scope.spawn(|| far.connection.send(&target).unwrap().wait().unwrap());
        assert_refused!(
            near.connection.recv(&source).and_then(|transfer| transfer.wait()),
            Error::UnexpectedMessage { offset: 0, expected: 8192, received: 4096 }
        );
    });
    assert!(!near.connection.is_usable());
}

/// The driver deletes a device when its last user is gone. Until then transfers complete, or fail with an
/// error.
#[test]
fn a_device_deleted_under_traffic_goes_when_its_last_user_does() {
    let census = Census::take();
    run("/usr/sbin/ip", &["link", "add", "going0", "mtu", "4200", "type", "dummy"]);
    run("ip", &["address", "add", "10.99.0.1/24", "dev", "going0"]);
    run("ip", &["link", "set", "going0", "up"]);
    run("rdma", &["link", "add", "going", "type", "rxe", "netdev", "going0"]);
    let one = End::new("going", ConnectionOptions::default());
    one.connection.connect(&one.connection.endpoint()).unwrap();
    let ((_from, source), (_to, target)) = (one.filled(8 << 20, 1), one.filled(8 << 20, 2));
    let mut delete = None;
    for round in 0..3 {
        if round == 1 {
            let command = Command::new("rdma").args(["link", "delete", "going"]).stdin(Stdio::null()).spawn();
            delete = Some(command.unwrap());
        }
        match one.connection.write(&source, target.remote()).and_then(|transfer| transfer.wait()) {
            Ok(transferred) => assert_eq!(transferred.bytes, source.len()),
            // The deletion may take the device away during a transfer, which must not hang then.
            Err(error) => {
                let expected = match &error {
                    Error::Verbs(error) => matches!(error, verbs::Error::Post { .. }),
                    _ => true,
                };
                assert!(round > 0 && expected, "{error}");
                assert!(!one.connection.is_usable(), "{error}");
            }
        }
    }
    drop((source, target, one));
    assert!(delete.unwrap().wait().unwrap().success());
    run("ip", &["link", "delete", "going0"]);
    drop((_from, _to));
    census.assert_unchanged();
}

#[test]
fn a_hundred_connections_at_once() {
    let census = Census::take();
    {
        let options = ConnectionOptions::default().message_size(16 << 10).window(4);
        let (near, far) = (End::new("rxe0", options), End::new("rxe1", options));
        let ((ours, source), (theirs, target)) = (near.filled(100 << 16, 1), far.filled(100 << 16, 2));
        let remote = target.remote();
        // With a worker for each connection, these would need a thousand descriptors.
        let worker = |end: &End| Worker::new(&end.domain, WorkerOptions::default()).unwrap();
        let (near_worker, far_worker) = (worker(&near), worker(&far));
        let mut pairs: Vec<_> = (0..100)
            .map(|_| {
                let ours = near_worker.connection(options).unwrap();
                let theirs = far_worker.connection(options).unwrap();
                ours.connect(&theirs.endpoint()).unwrap();
                theirs.connect(&ours.endpoint()).unwrap();
                (ours, theirs)
            })
            .collect();
        // All are in flight before any is waited for.
        let mut transfers: Vec<_> = pairs
            .iter_mut()
            .zip(0..)
            .map(|((ours, _), number)| {
                let part = number << 16..(number + 1) << 16;
                let (local, remote) = (source.slice(part.clone()).unwrap(), remote.slice(part).unwrap());
                let transfer = ours.write(local, remote).unwrap();
                let _ = transfer.try_wait().unwrap();
                transfer
            })
            .collect();
        for transfer in transfers.drain(..) {
            transfer.wait().unwrap();
        }
        drop(transfers);
        assert_same(&contents(&theirs), &contents(&ours), "a hundred parts");
    }
    census.assert_unchanged();
}

/// A write in flight, dropped first or last, and everything else in several orders. Nothing moves once the connection
/// is gone, and nothing stays registered.
#[test]
fn dropping_in_any_order_with_a_transfer_in_flight() {
    let census = Census::take();
    for order in 0..6 {
        let Wire { near, far } = Wire::with(ConnectionOptions::default().message_size(64 << 10));
        let ((ours, source), (theirs, target)) = (near.filled(16 << 20, 1), far.filled(16 << 20, 2));
        let transfer = near.connection.write(&source, target.remote()).unwrap();
        assert_eq!(transfer.try_wait().unwrap(), None);
        let last = match order % 2 {
            0 => Some(transfer),
            _ => {
                drop(transfer);
                None
            }
        };
        match order / 2 {
            0 => drop((source, near, ours)),
            1 => drop((near, ours, source)),
            _ => drop((ours, source, near)),
        }
        drop(last);
        let seen = contents(&theirs);
        std::thread::sleep(Duration::from_millis(50));
        assert_same(&contents(&theirs), &seen, "nothing moves once the connection is gone");
        assert_ne!(seen[15 << 20..], pattern(16 << 20, 1)[15 << 20..], "it was in flight");
        match order / 2 {
            0 => drop((target, theirs, far)),
            1 => drop((far, target, theirs)),
            _ => drop((theirs, far, target)),
        }
    }
    // A receive that the peer never answers.
    {
        let Wire { near, far: _far } = Wire::new();
        let region = near.register(&heap(1 << 20));
        drop(near.connection.recv(&region).unwrap());
        assert!(near.connection.is_usable());
    }
    census.assert_unchanged();
}

/// The transfer goes on without an owner, and the memory stays registered until the device is done.
#[test]
fn a_dropped_transfer_goes_on() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::with(ConnectionOptions::default().message_size(64 << 10));
        let ((ours, source), (theirs, target)) = (near.filled(16 << 20, 1), far.filled(16 << 20, 2));
        let remote = target.remote();
        let (_small, number) = near.filled(4096, 3);
        let bytes = contents(&ours);
        let transfer = near.connection.write(&source, &remote).unwrap();
        assert_eq!(transfer.try_wait().unwrap(), None);
        let before = regions();
        drop((transfer, source, ours));
        assert_eq!(regions(), before, "the device still reads it");
        // The next one queues behind it.
        let next = near.connection.write(number.slice(..8).unwrap(), remote.slice(..8).unwrap()).unwrap();
        next.wait().unwrap();
        assert_eq!(regions(), before - 1, "the device is done with it");
        assert_same(&contents(&theirs)[8..], &bytes[8..], "written");
        assert_same(&contents(&theirs)[..8], &pattern(4096, 3)[..8], "overwritten");
    }
    census.assert_unchanged();
}
