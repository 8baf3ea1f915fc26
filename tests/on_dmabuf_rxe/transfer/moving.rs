//! Every byte at the far end, over boundaries of regions, messages and elements.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use dmabuf_rdma::error::TransferError;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::sg::DmaSgList;
use dmabuf_rdma::transfer::{ConnectionOptions, LocalRange, RemoteRegion, Request, Wait};
use dmabuf_rdma::{DmaSg, Error, Iova};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::wire::{Wire, packets};
use crate::common::{assert_same, contents, pattern};

const SIZE: u64 = 5 << 20;

/// Small messages, so that a few megabytes have what gigabytes have of ordinary ones.
fn small() -> ConnectionOptions {
    ConnectionOptions { message: 64 << 10, window: 8, batch: 3, ..Default::default() }
}

#[test]
fn write_and_read_cross_the_wire() {
    let before = Census::take();
    {
        let Wire { mut near, far } = Wire::with(small());
        let (ours, source) = near.filled(SIZE, 1);
        let (theirs, target) = far.filled(SIZE, 2);
        let packets_before = packets();
        assert_eq!(near.connection.write(&source, &target.remote()).unwrap().bytes, SIZE);
        assert!(packets() - packets_before > SIZE / 4096, "every byte has crossed the wire");
        assert_same(&contents(&theirs), &contents(&ours), "written");
        theirs.map().unwrap().write(0, &pattern(SIZE as usize, 3)).unwrap();
        near.connection.read(&source, &target.remote()).unwrap();
        assert_same(&contents(&ours), &pattern(SIZE as usize, 3), "read");
        assert!(near.connection.is_usable());
    }
    before.assert_unchanged();
}

#[test]
fn odd_ranges_leave_their_neighbours_alone() {
    let Wire { mut near, far } = Wire::with(small());
    let (ours, source) = near.filled(1 << 20, 1);
    let from = contents(&ours);
    let ranges = [(0, 0, 1), (1, 3, 65_535), (4095, 1, 65_536), (4097, 4095, 65_537), (77, 12_345, 700_001)];
    for (seed, (from_at, to_at, length)) in ranges.into_iter().enumerate() {
        let (theirs, target) = far.filled(1 << 20, 50 + seed as u64);
        let mut expected = contents(&theirs);
        let (start, end) = (to_at as usize, (to_at + length) as usize);
        expected[start..end].copy_from_slice(&from[from_at as usize..(from_at + length) as usize]);
        let remote = target.remote();
        let local = LocalRange::from(&source).range(from_at, length).unwrap();
        near.connection.write(local, remote.range(to_at, length).unwrap()).unwrap();
        assert_same(&contents(&theirs), &expected, "written");
    }
}

/// Both sides' buffers are registered in parts that end at different bytes.
#[test]
fn regions_of_both_sides_end_where_they_like() {
    let Wire { mut near, mut far } = Wire::with(small());
    let (ours, theirs) = (heap(SIZE), heap(SIZE));
    let parts = |buffer, domain, ends: &[u64]| -> Vec<MemoryRegion> {
        let starts = [0].into_iter().chain(ends.iter().copied());
        starts
            .zip(ends.iter().copied().chain([SIZE]))
            .enumerate()
            .map(|(number, (start, end))| {
                MemoryRegion::builder(domain, buffer)
                    .range(start, end - start)
                    // Each elsewhere, so that nothing can follow on from the region before.
                    .iova(Iova((number as u64 + 1) << 40 | start))
                    .access(Access::REMOTE)
                    .register()
                    .unwrap()
            })
            .collect()
    };
    let sources = parts(&ours, &near.domain, &[1, 4096, 70_001, 1_000_000, 1_000_003]);
    let targets = parts(&theirs, &far.domain, &[5, 99_999, 2_000_000, 4_194_305]);
    let runs = targets.iter().flat_map(|region| region.remote().runs().to_vec());
    let remote = RemoteRegion::new(runs, Access::REMOTE, theirs.id()).unwrap();
    let remote = RemoteRegion::from_bytes(&remote.to_bytes()).unwrap();

    ours.map().unwrap().write(0, &pattern(SIZE as usize, 5)).unwrap();
    near.connection.write(LocalRange::of(&sources).unwrap(), &remote).unwrap();
    assert_same(&contents(&theirs), &pattern(SIZE as usize, 5), "written");
    theirs.map().unwrap().write(0, &pattern(SIZE as usize, 6)).unwrap();
    near.connection.read(LocalRange::of(&sources).unwrap(), &remote).unwrap();
    assert_same(&contents(&ours), &pattern(SIZE as usize, 6), "read");

    // Messages have up to four pieces on either side here, and the cuts are the same on both.
    theirs.map().unwrap().write(0, &pattern(SIZE as usize, 7)).unwrap();
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| far.connection.send(LocalRange::of(&targets).unwrap()).unwrap());
        assert_eq!(near.connection.recv(LocalRange::of(&sources).unwrap()).unwrap().bytes, SIZE);
        assert_eq!(sent.join().unwrap().bytes, SIZE);
    });
    assert_same(&contents(&ours), &pattern(SIZE as usize, 7), "received");
}

/// Rows of an image: many small pieces go into few requests.
#[test]
fn pieces_are_gathered() {
    const ROW: u64 = 1000;
    let mut options = small();
    options.queue_pair.max_sge = 16;
    let Wire { mut near, far } = Wire::with(options);
    let (ours, source) = near.filled(1 << 20, 1);
    let (theirs, target) = far.filled(1 << 20, 2);
    let rows: Vec<_> = (0..200).map(|row| DmaSg { addr: 4096 * row + 17, len: ROW }).collect();
    let from = contents(&ours);
    let mut expected = contents(&theirs);
    for (row, place) in rows.iter().zip(expected.chunks_mut(ROW as usize)) {
        place.copy_from_slice(&from[row.addr as usize..(row.addr + ROW) as usize]);
    }
    let list = DmaSgList::from_runs(rows).unwrap();
    let local = LocalRange::gather(&source, &list).unwrap();
    // The bytes are of several messages, then of one, which has more pieces than a request.
    for message in [options.message, 1 << 20] {
        theirs.map().unwrap().write(0, &pattern(1 << 20, 2)).unwrap();
        near.connection.set_message(message);
        let (remote, before) = (target.remote(), packets());
        near.connection.write(local.clone(), remote.range(0, 200 * ROW).unwrap()).unwrap();
        assert_same(&contents(&theirs), &expected, "gathered");
        // 16 rows to a request are 4 packets; a request a row would be 200 at least.
        assert!(packets() - before < 120, "{} packets", packets() - before);
    }
}

#[test]
fn numbers_come_behind_all_bytes() {
    let Wire { mut near, mut far } = Wire::with(small());
    let (ours, source) = near.filled(SIZE, 1);
    let (theirs, target) = far.filled(SIZE, 2);
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            let moved = far.connection.recv_imm().unwrap();
            // The number says that all is there.
            (moved.imm, contents(&theirs))
        });
        near.connection.write_with_imm(&source, &target.remote(), 0xdead_beef).unwrap();
        let (imm, seen) = told.join().unwrap();
        assert_eq!(imm, Some(0xdead_beef));
        assert_same(&seen, &contents(&ours), "written before the number");
    });
}

#[test]
fn both_ways_at_once() {
    let Wire { mut near, mut far } = Wire::with(small());
    let (from, source) = near.filled(SIZE, 1);
    let (to, target) = far.filled(SIZE, 2);
    let (back, into) = near.filled(SIZE, 3);
    let expected = contents(&to);
    std::thread::scope(|scope| {
        let (send, receive) = near.connection.halves();
        let receiving = scope.spawn(|| receive.start(&into).unwrap().wait().unwrap());
        let far = scope.spawn(|| {
            far.connection.send(&target).unwrap();
            far.connection.recv(&target).unwrap();
        });
        send.start(Request::send(&source)).unwrap().wait().unwrap();
        receiving.join().unwrap();
        far.join().unwrap();
    });
    assert_same(&contents(&back), &expected, "received");
    assert_same(&contents(&to), &contents(&from), "sent");
}

#[test]
fn atomics_return_what_was_there() {
    let Wire { mut near, far } = Wire::new();
    let (ours, result) = near.filled(4096, 1);
    let (theirs, counter) = far.filled(4096, 2);
    theirs.map().unwrap().write(16, &40_u64.to_le_bytes()).unwrap();
    let remote = counter.remote();
    let place = || remote.range(16, 8).unwrap();
    let old = || u64::from_le_bytes(contents(&ours)[64..72].try_into().unwrap());
    let now = || u64::from_le_bytes(contents(&theirs)[16..24].try_into().unwrap());
    let eight = || LocalRange::from(&result).range(64, 8).unwrap();
    near.connection.fetch_add(eight(), place(), 2).unwrap();
    assert_eq!((old(), now()), (40, 42));
    near.connection.compare_swap(eight(), place(), 41, 1).unwrap();
    assert_eq!((old(), now()), (42, 42));
    near.connection.compare_swap(eight(), place(), 42, 1 << 40).unwrap();
    assert_eq!((old(), now()), (42, 1 << 40));
}

#[test]
fn progress_is_told_and_only_grows() {
    let Wire { mut near, far } = Wire::with(ConnectionOptions { wait: Wait::Busy, ..small() });
    let ((_, source), (_, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let remote = target.remote();
    let mut seen = Vec::new();
    let mut report = |done| seen.push(done);
    near.connection.start(Request::write(&source, &remote)).unwrap().progress(&mut report).wait().unwrap();
    assert!(seen.is_sorted() && seen.len() > 5, "{seen:?}");
    assert_eq!(seen.last(), Some(&SIZE));
}

/// However many large messages a list might have, it is answered after 64 MiB.
#[test]
fn large_messages_are_told_in_time() {
    const SIZE: u64 = 128 << 20;
    let options = ConnectionOptions { message: 32 << 20, window: 8, batch: 4, ..Default::default() };
    let Wire { mut near, far } = Wire::with(options);
    let (ours, theirs) = (heap(SIZE), heap(SIZE));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    let mut told = Vec::new();
    let mut report = |done| told.push(done);
    let remote = target.remote();
    near.connection.start(Request::write(&source, &remote)).unwrap().progress(&mut report).wait().unwrap();
    assert_eq!(told, [64 << 20, SIZE]);
}

/// What was posted is waited for, and the connection serves on.
#[test]
fn a_cancelled_transfer_leaves_a_usable_connection() {
    let Wire { mut near, far } = Wire::with(small());
    let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let (remote, token) = (target.remote(), AtomicBool::new(false));
    let mut stop = |done| {
        if done > SIZE / 4 {
            token.store(true, Ordering::Relaxed);
        }
    };
    let transfer = near.connection.start(Request::write(&source, &remote)).unwrap();
    let ended = transfer.cancel(&token).progress(&mut stop).wait();
    let done = match ended {
        Err(Error::Transfer(TransferError::Cancelled { done, length: SIZE, usable: true, .. })) => done,
        other => panic!("{other:?}"),
    };
    assert!(done > SIZE / 4 && done < SIZE, "{done}");
    let moved = done as usize;
    assert_same(&contents(&theirs)[..moved], &contents(&ours)[..moved], "before the end");
    assert_same(&contents(&theirs)[moved..], &pattern(SIZE as usize, 2)[moved..], "after it");
    near.connection.write(&source, &remote).unwrap();
    assert_same(&contents(&theirs), &contents(&ours), "all of it");
}

/// As an event loop does it: nothing blocks but poll(2).
#[test]
fn an_event_loop_drives_a_transfer() {
    let Wire { mut near, far } = Wire::with(small());
    let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let remote = target.remote();
    let mut transfer = near.connection.start(Request::write(&source, &remote)).unwrap();
    let mut sleeps = 0;
    let moved = loop {
        match transfer.advance().unwrap() {
            Poll::Ready(moved) => break moved,
            Poll::Pending => {
                let mut fds = [PollFd::new(transfer.as_fd(), PollFlags::POLLIN)];
                let timeout = PollTimeout::try_from(Duration::from_secs(20)).unwrap();
                assert_eq!(poll(&mut fds, timeout).unwrap(), 1, "an event, not the time-out");
                sleeps += 1;
            }
        }
    };
    drop(transfer);
    assert_eq!(moved.bytes, SIZE);
    assert!(sleeps > 2, "{sleeps}");
    assert_same(&contents(&theirs), &contents(&ours), "written");
}
