//! Every byte at the far end, across the boundaries of regions, messages and elements.

use std::os::fd::AsFd;
use std::time::Duration;

use dmabuf_rdma::mr::{Access, DeregisterError, MemoryRegion};
use dmabuf_rdma::transfer::{ConnectionOptions, Error};
use dmabuf_rdma::{Iova, RegionSlice, RemoteRegion};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::common::buffers::heap;
use crate::common::census::{self, Census};
use crate::common::wire::{Wire, packets};
use crate::common::{assert_same, contents, pattern};

const SIZE: u64 = 5 << 20;

/// Small messages, so that a few megabytes are cut as often as gigabytes usually are.
fn small() -> ConnectionOptions {
    ConnectionOptions::default().message_size(64 << 10).window(8).chain(3)
}

#[test]
fn write_and_read_cross_the_wire() {
    let before = Census::take();
    {
        let Wire { near, far } = Wire::with(small());
        let (ours, source) = near.filled(SIZE, 1);
        let (theirs, target) = far.filled(SIZE, 2);
        let packets_before = packets();
        assert_eq!(near.connection.write(&source, target.remote()).unwrap().wait().unwrap().bytes, SIZE);
        assert!(packets() - packets_before > SIZE / 4096, "every byte has crossed the wire");
        assert_same(&contents(&theirs), &contents(&ours), "written");
        theirs.map().unwrap().write(0, &pattern(SIZE as usize, 3)).unwrap();
        near.connection.read(&source, target.remote()).unwrap().wait().unwrap();
        assert_same(&contents(&ours), &pattern(SIZE as usize, 3), "read");
        assert!(near.connection.is_usable());
    }
    before.assert_unchanged();
}

#[test]
fn odd_ranges_leave_their_neighbours_alone() {
    let Wire { near, far } = Wire::with(small());
    let (ours, source) = near.filled(1 << 20, 1);
    let from = contents(&ours);
    let ranges = [(0, 0, 1), (1, 3, 65_535), (4095, 1, 65_536), (4097, 4095, 65_537), (77, 12_345, 700_001)];
    for (seed, (from_at, to_at, length)) in ranges.into_iter().enumerate() {
        let (theirs, target) = far.filled(1 << 20, 50 + seed as u64);
        let mut expected = contents(&theirs);
        let (start, end) = (to_at as usize, (to_at + length) as usize);
        expected[start..end].copy_from_slice(&from[from_at as usize..(from_at + length) as usize]);
        let local = source.slice(from_at..from_at + length).unwrap();
        near.connection
            .write(local, target.remote().slice(to_at..to_at + length).unwrap())
            .unwrap()
            .wait()
            .unwrap();
        assert_same(&contents(&theirs), &expected, "written");
    }
}

/// Both sides register their buffers in parts, which end at different bytes.
#[test]
fn regions_of_both_sides_end_at_different_bytes() {
    let Wire { near, far } = Wire::with(small());
    let (ours, theirs) = (heap(SIZE), heap(SIZE));
    let parts = |buffer, domain, ends: &[u64]| -> Vec<MemoryRegion> {
        let starts = [0].into_iter().chain(ends.iter().copied());
        starts
            .zip(ends.iter().copied().chain([SIZE]))
            .enumerate()
            .map(|(number, (start, end))| {
                MemoryRegion::builder(domain, buffer)
                    .range(start..end)
                    // Far from the region before, so that no address is in two regions.
                    .iova(Iova((number as u64 + 1) << 40 | start))
                    .access(Access::REMOTE)
                    .register()
                    .unwrap()
            })
            .collect()
    };
    let sources = parts(&ours, &near.domain, &[1, 4096, 70_001, 1_000_000, 1_000_003]);
    let targets = parts(&theirs, &far.domain, &[5, 99_999, 2_000_000, 4_194_305]);
    let source = RegionSlice::concat(&sources).unwrap();
    let target = RegionSlice::concat(&targets).unwrap();
    let remote = RemoteRegion::from_bytes(&target.remote().to_bytes()).unwrap();
    assert_eq!((remote.runs().len(), remote.buffer()), (5, theirs.id()));

    ours.map().unwrap().write(0, &pattern(SIZE as usize, 5)).unwrap();
    near.connection.write(&source, &remote).unwrap().wait().unwrap();
    assert_same(&contents(&theirs), &pattern(SIZE as usize, 5), "written");
    theirs.map().unwrap().write(0, &pattern(SIZE as usize, 6)).unwrap();
    near.connection.read(&source, &remote).unwrap().wait().unwrap();
    assert_same(&contents(&ours), &pattern(SIZE as usize, 6), "read");

    // A message has up to four pieces on either side, and both sides cut messages alike.
    theirs.map().unwrap().write(0, &pattern(SIZE as usize, 7)).unwrap();
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| far.connection.send(&target).unwrap().wait().unwrap());
        assert_eq!(near.connection.recv(&source).unwrap().wait().unwrap().bytes, SIZE);
        assert_eq!(sent.join().unwrap().bytes, SIZE);
    });
    assert_same(&contents(&ours), &pattern(SIZE as usize, 7), "received");
}

/// Rows of an image: many small pieces go into few work requests.
#[test]
fn pieces_are_gathered() {
    const ROW: u64 = 1000;
    let mut options = small();
    options.queue_pair.max_sge = 16;
    let Wire { mut near, far } = Wire::with(options);
    let (ours, source) = near.filled(1 << 20, 1);
    let (theirs, target) = far.filled(1 << 20, 2);
    let starts: Vec<u64> = (0..200).map(|row| 4096 * row + 17).collect();
    let from = contents(&ours);
    let mut expected = contents(&theirs);
    for (start, place) in starts.iter().zip(expected.chunks_mut(ROW as usize)) {
        place.copy_from_slice(&from[*start as usize..(start + ROW) as usize]);
    }
    let rows = starts.iter().map(|&start| source.slice(start..start + ROW).unwrap());
    let rows = RegionSlice::concat(rows).unwrap();
    // First several messages, then one with more pieces than a work request takes.
    for message_size in [options.message_size, 1 << 20] {
        theirs.map().unwrap().write(0, &pattern(1 << 20, 2)).unwrap();
        near.connection.set_message_size(message_size);
        let (remote, before) = (target.remote(), packets());
        near.connection.write(&rows, remote.slice(..200 * ROW).unwrap()).unwrap().wait().unwrap();
        assert_same(&contents(&theirs), &expected, "gathered");
        // A work request of 16 rows is 4 packets; a work request for each row would be 200 at least.
        assert!(packets() - before < 120, "{} packets", packets() - before);
    }
}

/// The halves of both connections are moved into four threads, which borrow nothing.
#[test]
fn both_directions_at_once() {
    let before = Census::take();
    {
        let Wire { near, far } = Wire::with(small());
        let (from, source) = near.filled(SIZE, 1);
        let (to, target) = far.filled(SIZE, 2);
        let (back, into) = near.filled(SIZE, 3);
        let (answer, reply) = far.filled(SIZE, 4);
        let (sender, receiver) = near.connection.split();
        let (far_sender, far_receiver) = far.connection.split();
        let threads = [
            std::thread::spawn(move || sender.send(source).unwrap().wait().unwrap()),
            std::thread::spawn(move || receiver.recv(into).unwrap().wait().unwrap()),
            std::thread::spawn(move || far_sender.send(reply).unwrap().wait().unwrap()),
            std::thread::spawn(move || far_receiver.recv(target).unwrap().wait().unwrap()),
        ];
        for thread in threads {
            assert_eq!(thread.join().unwrap().bytes, SIZE);
        }
        assert_same(&contents(&to), &contents(&from), "sent");
        assert_same(&contents(&back), &contents(&answer), "received");
    }
    before.assert_unchanged();
}

/// A half holds the connection. It ends when the other half is dropped too.
#[test]
fn a_half_is_usable_without_the_other() {
    let before = Census::take();
    {
        let Wire { near, far } = Wire::with(small());
        let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
        let (sender, receiver) = near.connection.split();
        let (far_sender, far_receiver) = far.connection.split();
        drop((receiver, far_sender));
        std::thread::scope(|scope| {
            scope.spawn(|| far_receiver.recv(&target).unwrap().wait().unwrap());
            sender.send(&source).unwrap().wait().unwrap();
        });
        assert_same(&contents(&theirs), &contents(&ours), "sent");
        theirs.map().unwrap().write(0, &pattern(SIZE as usize, 3)).unwrap();
        sender.read(&source, target.remote()).unwrap().wait().unwrap();
        assert_same(&contents(&ours), &pattern(SIZE as usize, 3), "read");
        assert!(sender.is_usable() && far_receiver.is_usable());
        sender.disconnect();
        assert!(!sender.is_usable());
    }
    before.assert_unchanged();
}

/// All of the caller's handles go while bytes move; the transfer has its own.
#[test]
fn a_transfer_keeps_its_memory_registered() {
    let Wire { near, far } = Wire::with(small());
    let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let bytes = contents(&ours);
    let (regions, buffers) = (census::regions(), census::dma_bufs());
    let transfer = near.connection.write(&source, target.remote()).unwrap();
    assert_eq!(transfer.try_wait().unwrap(), None);
    match source.deregister() {
        Err(DeregisterError::InUse { region, handles: 1 }) => drop((region, ours)),
        other => panic!("{other:?}"),
    }
    assert_eq!((census::regions(), census::dma_bufs()), (regions, buffers), "the transfer holds both");
    assert_eq!(transfer.wait().unwrap().bytes, SIZE);
    assert_same(&contents(&theirs), &bytes, "written");
    assert_eq!((census::regions(), census::dma_bufs()), (regions - 1, buffers - 1), "both are gone with it");
    assert!(near.connection.is_usable());
}

#[test]
fn atomics_return_the_previous_value() {
    let Wire { near, far } = Wire::new();
    let (ours, result) = near.filled(4096, 1);
    let (theirs, counter) = far.filled(4096, 2);
    theirs.map().unwrap().write(16, &40_u64.to_le_bytes()).unwrap();
    let (previous, place) = (result.slice(64..72).unwrap(), counter.remote().slice(16..24).unwrap());
    let old = || u64::from_le_bytes(contents(&ours)[64..72].try_into().unwrap());
    let now = || u64::from_le_bytes(contents(&theirs)[16..24].try_into().unwrap());
    near.connection.fetch_add(&previous, &place, 2).unwrap().wait().unwrap();
    assert_eq!((old(), now()), (40, 42));
    near.connection.compare_swap(&previous, &place, 41, 1).unwrap().wait().unwrap();
    assert_eq!((old(), now()), (42, 42));
    near.connection.compare_swap(&previous, &place, 42, 1 << 40).unwrap().wait().unwrap();
    assert_eq!((old(), now()), (42, 1 << 40));
}

#[test]
fn progress_only_grows() {
    let Wire { near, far } = Wire::with(small().busy_poll(true));
    let ((_, source), (_, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let mut seen = Vec::new();
    let write = near.connection.write(&source, target.remote()).unwrap();
    write.wait_with_progress(|done| seen.push(done)).unwrap();
    assert_eq!(write.progress(), SIZE);
    assert!(seen.is_sorted() && seen.len() > 5, "{seen:?}");
    assert_eq!(seen.last(), Some(&SIZE));
}

/// A chain ends after 4 MiB, and is signaled there, however many messages it might have.
#[test]
fn large_messages_are_reported_in_time() {
    const SIZE: u64 = 128 << 20;
    let options = ConnectionOptions::default().message_size(32 << 20).window(8).chain(4);
    let Wire { near, far } = Wire::with(options);
    let (ours, theirs) = (heap(SIZE), heap(SIZE));
    let (source, target) = (near.register(&ours), far.register(&theirs));
    let mut reported = Vec::new();
    let write = near.connection.write(&source, target.remote()).unwrap();
    write.wait_with_progress(|done| reported.push(done)).unwrap();
    assert_eq!(reported, [32 << 20, 64 << 20, 96 << 20, SIZE]);
}

/// The posted messages complete, and the connection stays usable.
#[test]
fn a_cancelled_transfer_leaves_a_usable_connection() {
    let Wire { near, far } = Wire::with(small());
    let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let remote = target.remote();
    let transfer = near.connection.write(&source, &remote).unwrap();
    let stop = |done| {
        if done > SIZE / 4 {
            transfer.cancel();
        }
    };
    let done = match transfer.wait_with_progress(stop) {
        Err(Error::Cancelled { done, length: SIZE, usable: true, .. }) => done,
        other => panic!("{other:?}"),
    };
    assert!(done > SIZE / 4 && done < SIZE, "{done}");
    let moved = done as usize;
    assert_same(&contents(&theirs)[..moved], &contents(&ours)[..moved], "moved");
    assert_same(&contents(&theirs)[moved..], &pattern(SIZE as usize, 2)[moved..], "not moved");
    near.connection.write(&source, &remote).unwrap().wait().unwrap();
    assert_same(&contents(&theirs), &contents(&ours), "all of it");
}

/// Only poll(2) blocks, as in an event loop.
#[test]
fn an_event_loop_drives_a_transfer() {
    let Wire { near, far } = Wire::with(small());
    let ((ours, source), (theirs, target)) = (near.filled(SIZE, 1), far.filled(SIZE, 2));
    let transfer = near.connection.write(&source, target.remote()).unwrap();
    let mut sleeps = 0;
    let transferred = loop {
        match transfer.try_wait().unwrap() {
            Some(transferred) => break transferred,
            None => {
                let mut fds = [PollFd::new(transfer.as_fd(), PollFlags::POLLIN)];
                let timeout = PollTimeout::try_from(Duration::from_secs(20)).unwrap();
                assert_eq!(poll(&mut fds, timeout).unwrap(), 1, "an event, not the timeout");
                sleeps += 1;
            }
        }
    };
    drop(transfer);
    assert_eq!((transferred.bytes, transferred.imm), (SIZE, None));
    assert!(sleeps > 2, "{sleeps}");
    assert_same(&contents(&theirs), &contents(&ours), "written");
}
