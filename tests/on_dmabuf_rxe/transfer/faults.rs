//! A wire that loses packets, and peers that go, or forbid, or are not ready.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dmabuf_rdma::Error;
use dmabuf_rdma::error::TransferError;
use dmabuf_rdma::mr::{Access, Rkey};
use dmabuf_rdma::transfer::{Connection, ConnectionOptions, RemoteRegion, RemoteRun, Request};
use dmabuf_rdma::verbs::CompletionStatus;

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::system::run;
use crate::common::wire::{End, Fault, Wire, counted};
use crate::common::{assert_same, contents, pattern};

/// Messages that are not many packets, since a READ that loses one is asked for again from there on.
fn patient() -> ConnectionOptions {
    let mut options = ConnectionOptions { message: 64 << 10, window: 8, ..Default::default() };
    options.queue_pair.timeout = 12; // 17 ms, so that what is lost at the end of a burst does not cost much
    options.stall = Duration::from_secs(60);
    options
}

const OUT_OF_ORDER: &str = "out_of_seq_request";

/// Writes, reads and sends over a wire with a fault; every byte must be right, and a device must have noticed
/// the fault: requests out of order behind a lost, corrupted or overtaken one, or for a second time. Returns
/// how many packets were dropped.
#[track_caller]
fn every_byte_under(fault: &str, size: u64, noticed: &str) -> u64 {
    let before = counted(noticed);
    let Wire { mut near, mut far } = Wire::with(patient());
    let ((ours, source), (theirs, target)) = (near.filled(size, 1), far.filled(size, 2));
    let remote = target.remote();
    let fault = Fault::new(fault);
    near.connection.write(&source, &remote).unwrap();
    assert_same(&contents(&theirs), &contents(&ours), "written");
    theirs.map().unwrap().write(0, &pattern(size as usize, 3)).unwrap();
    near.connection.read(&source, &remote).unwrap();
    assert_same(&contents(&ours), &pattern(size as usize, 3), "read");
    theirs.map().unwrap().write(0, &pattern(size as usize, 4)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| far.connection.send(&target).unwrap());
        near.connection.recv(&source).unwrap();
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
fn packets_come_twice() {
    every_byte_under("duplicate 10%", 4 << 20, "duplicate_request");
}

#[test]
fn packets_are_corrupted() {
    every_byte_under("corrupt 2%", 2 << 20, OUT_OF_ORDER);
}

/// Has no peer any more: the queue pair on the other end is destroyed while bytes move.
#[test]
fn a_peer_that_goes_ends_the_transfer() {
    let census = Census::take();
    {
        let Wire { mut near, far } =
            Wire::with(ConnectionOptions { message: 64 << 10, ..Default::default() });
        let ((_ours, source), (_theirs, target)) = (near.filled(32 << 20, 1), far.filled(32 << 20, 2));
        let remote = target.remote();
        let moving = AtomicBool::new(false);
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !moving.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                drop(far.connection);
            });
            let mut report = |_| moving.store(true, Ordering::Relaxed);
            let transfer = near.connection.start(Request::write(&source, &remote)).unwrap();
            transfer.limit(Duration::from_secs(20)).progress(&mut report).wait()
        });
        let message = assert_refused!(
            ended,
            Error::Transfer(TransferError::Failed { status: CompletionStatus::RETRY_EXC_ERR, .. })
        );
        for part in ["Write of bytes ", "of the peer with Rkey(0x", "RETRY_EXC_ERR (the peer did not answer"]
        {
            assert!(message.contains(part), "{message}");
        }
        assert!(!near.connection.is_usable());
        let again = near.connection.write(&source, &remote);
        let message = assert_refused!(again, Error::Transfer(TransferError::Unusable { .. }));
        assert!(message.contains("RETRY_EXC_ERR"), "{message}");
    }
    census.assert_unchanged();
}

/// The wire is cut: the time limit is over long before the device gives up.
#[test]
fn a_time_limit_ends_a_transfer_that_stands_still() {
    let census = Census::take();
    {
        let mut options = patient();
        options.queue_pair.timeout = 20; // 4 s
        let Wire { mut near, far } = Wire::with(options);
        let ((_ours, source), (theirs, target)) = (near.filled(4 << 20, 1), far.filled(4 << 20, 2));
        let remote = target.remote();
        let fault = Fault::new("loss 100%");
        let transfer = near.connection.start(Request::write(&source, &remote)).unwrap();
        let start = Instant::now();
        let ended = transfer.limit(Duration::from_millis(300)).wait();
        // Not a measurement: the next limit, of the device, is 32 seconds.
        assert!(start.elapsed() < Duration::from_secs(15));
        assert_refused!(ended, Error::Transfer(TransferError::TimeLimit { done: 0, length: 0x40_0000, .. }));
        assert!(!near.connection.is_usable());
        // Nothing that was called back arrives when the wire is whole again.
        drop(fault);
        std::thread::sleep(Duration::from_millis(200));
        assert_same(&contents(&theirs), &pattern(4 << 20, 2), "untouched");
    }
    census.assert_unchanged();
}

#[test]
fn a_region_that_goes_under_traffic_is_named() {
    let Wire { mut near, far } = Wire::with(ConnectionOptions { message: 64 << 10, ..Default::default() });
    let ((_ours, source), (_theirs, target)) = (near.filled(32 << 20, 1), far.filled(32 << 20, 2));
    let remote = target.remote();
    let rkey = target.rkey();
    let moving = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !moving.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            target.deregister().unwrap();
        });
        let mut report = |_| moving.store(true, Ordering::Relaxed);
        near.connection.start(Request::write(&source, &remote)).unwrap().progress(&mut report).wait()
    });
    let message = assert_refused!(
        ended,
        Error::Transfer(TransferError::Failed { status: CompletionStatus::REM_ACCESS_ERR, remote: Some((_, key)), .. })
            if *key == rkey
    );
    assert!(message.contains("REM_ACCESS_ERR (the remote key does not cover the bytes"), "{message}");
}

#[test]
fn a_wrong_key_is_named_with_its_bytes() {
    let Wire { mut near, far } = Wire::new();
    let ((_ours, source), (theirs, target)) = (near.filled(3 << 20, 1), far.filled(3 << 20, 2));
    let mut runs = target.remote().runs().to_vec();
    let RemoteRun { iova, rkey, .. } = runs[0];
    // The second of three runs has another key.
    let run =
        |part: u64, rkey| RemoteRun { iova: dmabuf_rdma::Iova(iova.0 + (part << 20)), length: 1 << 20, rkey };
    let wrong = Rkey(rkey.0 ^ 0x5a00);
    runs = vec![run(0, rkey), run(1, wrong), run(2, rkey)];
    let remote = RemoteRegion::new(runs, Access::REMOTE, theirs.id()).unwrap();
    match near.connection.write(&source, &remote) {
        Err(Error::Transfer(TransferError::Failed { offset, length, remote, status, done, .. })) => {
            assert_eq!((offset, length, done), (1 << 20, 1 << 20, 1 << 20));
            assert_eq!(remote, Some((dmabuf_rdma::Iova(iova.0 + (1 << 20)), wrong)));
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
    let Wire { mut near, far: _far } = Wire::with(options);
    let (_ours, source) = near.filled(4096, 1);
    assert_refused!(
        near.connection.send(&source),
        Error::Transfer(TransferError::Failed { status: CompletionStatus::RNR_RETRY_EXC_ERR, offset: 0, .. })
    );
}

#[test]
fn lengths_that_differ_are_found() {
    let Wire { mut near, mut far } = Wire::new();
    let ((_ours, source), (_theirs, target)) = (near.filled(8192, 1), far.filled(4096, 2));
    std::thread::scope(|scope| {
        // Its message is shorter than the receive.
        scope.spawn(|| far.connection.send(&target).unwrap());
        assert_refused!(
            near.connection.recv(&source),
            Error::Transfer(TransferError::UnexpectedMessage { offset: 0, expected: 8192, received: 4096 })
        );
    });
    assert!(!near.connection.is_usable());
}

/// A driver waits until the last user of its device is gone, so what moves goes on; afterwards the device
/// goes.
#[test]
fn a_device_deleted_under_traffic_goes_when_nobody_uses_it() {
    let census = Census::take();
    run("/usr/sbin/ip", &["link", "add", "going0", "mtu", "4200", "type", "dummy"]);
    run("ip", &["address", "add", "10.99.0.1/24", "dev", "going0"]);
    run("ip", &["link", "set", "going0", "up"]);
    run("rdma", &["link", "add", "going", "type", "rxe", "netdev", "going0"]);
    let mut one = End::new("going", ConnectionOptions::default());
    one.connection.connect(&one.connection.endpoint()).unwrap();
    let ((_from, source), (_to, target)) = (one.filled(8 << 20, 1), one.filled(8 << 20, 2));
    let remote = target.remote();
    let mut delete = None;
    for round in 0..3 {
        if round == 1 {
            let command = Command::new("rdma").args(["link", "delete", "going"]).stdin(Stdio::null()).spawn();
            delete = Some(command.unwrap());
        }
        match one.connection.write(&source, &remote) {
            Ok(moved) => assert_eq!(moved.bytes, source.len()),
            // Once the deletion is under way it may be taken away; then it is said, and nothing hangs.
            Err(error) => {
                assert!(round > 0 && matches!(error, Error::Transfer(_) | Error::Post { .. }), "{error}");
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
        let options = ConnectionOptions { message: 16 << 10, window: 4, ..Default::default() };
        let (near, far) = (End::new("rxe0", options), End::new("rxe1", options));
        let ((ours, source), (theirs, target)) = (near.filled(100 << 16, 1), far.filled(100 << 16, 2));
        let remote = target.remote();
        let mut pairs: Vec<_> = (0..100)
            .map(|_| {
                let ours = Connection::new(&near.domain, options).unwrap();
                let theirs = Connection::new(&far.domain, options).unwrap();
                ours.connect(&theirs.endpoint()).unwrap();
                theirs.connect(&ours.endpoint()).unwrap();
                (ours, theirs)
            })
            .collect();
        // All under way before any is waited for.
        let part = |number: usize| ((number as u64) << 16, 1 << 16);
        let mut transfers: Vec<_> = pairs
            .iter_mut()
            .enumerate()
            .map(|(number, (ours, _))| {
                let (offset, length) = part(number);
                let local = dmabuf_rdma::transfer::LocalRange::from(&source).range(offset, length).unwrap();
                let mut transfer =
                    ours.start(Request::write(local, remote.range(offset, length).unwrap())).unwrap();
                let _ = transfer.advance().unwrap();
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

/// Everything is dropped in every order with work under way; what comes later touches nothing.
#[test]
fn dropping_in_any_order_with_work_under_way() {
    let census = Census::take();
    for order in 0..6 {
        let options = ConnectionOptions { message: 64 << 10, ..Default::default() };
        let Wire { mut near, far } = Wire::with(options);
        let ((ours, source), (theirs, target)) = (near.filled(4 << 20, 1), far.filled(4 << 20, 2));
        let remote = target.remote();
        let mut transfer = near.connection.start(Request::write(&source, &remote)).unwrap();
        assert!(transfer.advance().unwrap().is_pending());
        if order % 2 == 0 {
            drop(transfer);
            assert!(!near.connection.is_usable());
            let seen = contents(&theirs);
            std::thread::sleep(Duration::from_millis(50));
            assert_same(&contents(&theirs), &seen, "nothing moves once the transfer was dropped");
        } else {
            // Forgotten: the next call finds it, and ends it.
            std::mem::forget(transfer);
        }
        match order / 2 {
            0 => drop((source, ours, near, target, theirs, far)),
            1 => drop((near, far, source, target, ours, theirs)),
            _ => drop((far, theirs, target, near, source, ours)),
        }
    }
    // A receive that nobody answers.
    {
        let Wire { mut near, far: _far } = Wire::new();
        let region = near.register(&heap(1 << 20));
        let receiving = near.connection.halves().1.start(&region).unwrap();
        drop(receiving);
        assert!(!near.connection.is_usable());
    }
    census.assert_unchanged();
}

#[test]
fn a_forgotten_transfer_is_found_by_the_next_call() {
    let Wire { mut near, far } = Wire::with(ConnectionOptions { message: 64 << 10, ..Default::default() });
    let ((_ours, source), (_theirs, target)) = (near.filled(4 << 20, 1), far.filled(4 << 20, 2));
    let remote = target.remote();
    let mut transfer = near.connection.start(Request::write(&source, &remote)).unwrap();
    assert!(transfer.advance().unwrap().is_pending());
    std::mem::forget(transfer);
    let message = assert_refused!(
        near.connection.write(&source, &remote),
        Error::Transfer(TransferError::Unusable { .. })
    );
    assert!(message.contains("forgotten"), "{message}");
}
