//! Work requests of a raw queue pair: flags and chains.

use std::time::Duration;

use dmabuf_rdma::verbs::{Error, Opcode, Operation, QueuePairOptions, RemoteAddr, WorkRequest};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::capture::Capture;
use crate::common::peers::{Peers, Side, TIMEOUT, remote_addr};
use crate::common::wire::{End, FAR};
use crate::common::{assert_same, contents, pattern};

const BLOCK: u64 = 4096;

fn block(number: u64) -> std::ops::Range<u64> {
    number * BLOCK..(number + 1) * BLOCK
}

#[test]
fn a_chain_moves_every_block_with_one_call_and_one_completion() {
    const COUNT: u64 = 100;
    let peers = Peers::new();
    let (from, to) = (heap(COUNT * BLOCK), heap(COUNT * BLOCK));
    from.map().unwrap().write(0, &pattern((COUNT * BLOCK) as usize, 5)).unwrap();
    let (source, target) = (peers.register(&from), peers.register(&to));
    // Block i goes to the place COUNT - 1 - i.
    let elements: Vec<_> = (0..COUNT).map(|number| [source.sge(block(number)).unwrap()]).collect();
    let requests: Vec<_> = (0..COUNT)
        .zip(&elements)
        .map(|(number, elements)| {
            let remote = remote_addr(&target, block(COUNT - 1 - number));
            let request = WorkRequest::new(number, Operation::Write { remote }, elements);
            if number == COUNT - 1 { request.signaled() } else { request }
        })
        .collect();
    peers.ours.pair.post_chain(&requests).unwrap();
    let completion = peers.ours.queue.wait(TIMEOUT).unwrap().success().unwrap();
    assert_eq!(completion.wr_id, COUNT - 1);
    assert_eq!(peers.ours.queue.poll().unwrap().count(), 0);
    let expected: Vec<u8> = contents(&from).chunks(BLOCK as usize).rev().flatten().copied().collect();
    assert_same(&contents(&to), &expected, "the blocks in reverse order");
}

#[test]
fn a_chain_that_does_not_fit_says_what_was_posted() {
    let options = QueuePairOptions::default().send_depth(4).recv_depth(4);
    let peers = Peers::with(options);
    let buffer = heap(BLOCK);
    let region = peers.register(&buffer);
    let element = [region.sge(..8).unwrap()];
    let receives: Vec<_> = (0..1000).map(|number| (number, &element[..])).collect();
    let refused = peers.theirs.pair.post_recv_chain(&receives).unwrap_err();
    let Error::Chain { refused: at, posted, source } = &refused else { panic!("{refused:?}") };
    assert_eq!(at, posted);
    assert!(matches!(**source, Error::Post { opcode: Opcode::Recv, .. }), "{source:?}");
    assert_eq!(refused.errno(), Some(libc::ENOMEM));
    // rxe rounds depths up to powers of two.
    let room = *posted;
    assert!((4..=8).contains(&room), "{room}");

    let requests: Vec<_> =
        (0..1000).map(|number| WorkRequest::new(number, Operation::Send, &element).signaled()).collect();
    let refused = peers.ours.pair.post_chain(&requests).unwrap_err();
    let message = refused.to_string();
    let Error::Chain { refused: at, posted, .. } = refused else { panic!("{refused:?}") };
    assert_eq!(at, posted);
    assert_eq!(
        message,
        format!("request {at} of the chain was refused, and the {posted} before it were posted")
    );
    // Those posted complete in order, and no others.
    for number in 0..posted.min(room) as u64 {
        assert_eq!(peers.ours.queue.wait(TIMEOUT).unwrap().success().unwrap().wr_id, number);
        assert_eq!(peers.theirs.queue.wait(TIMEOUT).unwrap().success().unwrap().wr_id, number);
    }
    if posted <= room {
        assert!(peers.ours.queue.wait(Duration::from_millis(50)).is_err());
    }
    // A bad request in the middle: nothing is posted.
    let peers = Peers::new();
    let region = peers.register(&buffer);
    let element = [region.sge(..8).unwrap()];
    let odd = RemoteAddr { addr: 4, rkey: region.rkey() };
    let fine =
        WorkRequest::new(1, Operation::Write { remote: remote_addr(&region, 0..8) }, &element).signaled();
    let bad = WorkRequest::new(2, Operation::FetchAdd { remote: odd, add: 1 }, &element);
    let refused = peers.ours.pair.post_chain(&[fine, bad, fine]);
    assert_refused!(refused, Error::Chain { refused: 1, posted: 0, .. });
    assert!(peers.ours.queue.wait(Duration::from_millis(50)).is_err());
}

#[test]
fn inline_bytes_are_copied_while_they_are_posted() {
    let peers = Peers::with(QueuePairOptions::default().max_inline(64));
    let buffer = heap(BLOCK);
    let region = peers.register(&buffer);
    let mut bytes = *b"sixteen of these";
    let remote = remote_addr(&region, 100..116);
    let request = WorkRequest::inline(1, Operation::Write { remote }, &bytes).signaled();
    peers.ours.pair.post(request).unwrap();
    bytes.fill(0);
    peers.ours.queue.wait(TIMEOUT).unwrap().success().unwrap();
    assert_same(&contents(&buffer)[100..116], b"sixteen of these", "written inline");

    // In a chain, as a SEND.
    peers.theirs.pair.post_recv(7, &[region.sge(200..264).unwrap()]).unwrap();
    let long = pattern(64, 3);
    let send = WorkRequest::inline(2, Operation::Send, &long).signaled();
    peers.ours.pair.post_chain(&[send]).unwrap();
    assert_eq!(peers.theirs.queue.wait(TIMEOUT).unwrap().success().unwrap().byte_len, 64);
    peers.ours.queue.wait(TIMEOUT).unwrap().success().unwrap();
    assert_same(&contents(&buffer)[200..264], &long, "sent inline");

    let too_long = vec![0; 1 << 16];
    let request = WorkRequest::inline(3, Operation::Write { remote }, &too_long);
    let message = assert_refused!(
        peers.ours.pair.post(request),
        Error::RequestTooLarge { what: "inline bytes", count: 0x1_0000, .. }
    );
    assert!(message.contains("a larger max_inline"), "{message}");
    let read = WorkRequest::inline(3, Operation::Read { remote }, &long);
    assert_refused!(peers.ours.pair.post(read), Error::Unavailable { .. });
}

/// The WRITE behind the fence sends what the READ before it fetched.
#[test]
fn a_fenced_request_waits_for_the_read_before_it() {
    let peers = Peers::new();
    let (from, scratch, to) = (heap(1 << 20), heap(1 << 20), heap(1 << 20));
    from.map().unwrap().write(0, &pattern(1 << 20, 8)).unwrap();
    let [source, middle, target] = [&from, &scratch, &to].map(|buffer| peers.register(buffer));
    let element = [middle.sge(..).unwrap()];
    let read = WorkRequest::new(1, Operation::Read { remote: remote_addr(&source, 0..1 << 20) }, &element);
    let write = WorkRequest::new(2, Operation::Write { remote: remote_addr(&target, 0..1 << 20) }, &element);
    peers.ours.pair.post_chain(&[read, write.fence().signaled()]).unwrap();
    assert_eq!(peers.ours.queue.wait(TIMEOUT).unwrap().success().unwrap().wr_id, 2);
    assert_same(&contents(&to), &contents(&from), "read, then written");
}

#[test]
fn only_a_solicited_send_wakes_a_queue_armed_for_them() {
    let sides = ["rxe0", "rxe1"].map(|device| {
        let end = End::new(device, Default::default());
        Side::new(&end.domain, QueuePairOptions::default())
    });
    sides[0].pair.connect(&sides[1].pair.endpoint().unwrap()).unwrap();
    sides[1].pair.connect(&sides[0].pair.endpoint().unwrap()).unwrap();
    let capture = Capture::new("wire0");
    (0..2).for_each(|number| sides[1].pair.post_recv(number, &[]).unwrap());
    sides[1].queue.arm_solicited().unwrap();
    let send = WorkRequest::new(1, Operation::Send, &[]).signaled();
    let to = sides[1].pair.number();
    for (request, wakes) in [(send, false), (send.solicited(), true)] {
        sides[0].pair.post(request).unwrap();
        sides[0].queue.wait(TIMEOUT).unwrap().success().unwrap();
        let packet = capture.find(FAR, |p| p.dest_qp == to);
        assert_eq!(packet.solicited, wakes);
        let mut ready =
            [nix::poll::PollFd::new(sides[1].queue.channel().unwrap(), nix::poll::PollFlags::POLLIN)];
        let count = nix::poll::poll(&mut ready, if wakes { 5000_u16 } else { 300 }).unwrap();
        assert_eq!(count == 1, wakes);
    }
    assert_eq!(sides[1].queue.poll().unwrap().count(), 2);
}
