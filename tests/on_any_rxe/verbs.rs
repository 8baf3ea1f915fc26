//! The verbs objects: what they are, and what they refuse.

use std::time::Duration;

use dmabuf_rdma::verbs::{
    CompletionQueue, CompletionStatus, Device, Endpoint, Error, Operation, QueuePair, QueuePairOptions,
    WorkRequest, devices,
};

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::peers::{Peers, Side, TIMEOUT, device, domain};

#[test]
fn the_device_is_listed_and_opened_by_name() {
    let names: Vec<_> = devices().unwrap().iter().map(|device| device.name().to_owned()).collect();
    assert!(names.contains(&"rxe0".into()), "{names:?}");
    assert_eq!(Device::by_name("rxe0").unwrap().open().unwrap().device_name(), "rxe0");
}

#[test]
fn an_unknown_device_lists_those_present() {
    let message = assert_refused!(Device::by_name("mlx5_7"), Error::UnknownDevice { .. });
    assert!(message.starts_with("no RDMA device is named \"mlx5_7\"; present: rxe0"), "{message}");
}

#[test]
fn rxe_reports_its_limits_port_and_gid() {
    let context = device().open().unwrap();
    let limits = context.limits().unwrap();
    assert_eq!((limits.max_mr_size, limits.page_size_cap, limits.max_sge), (u64::MAX, 0xffff_f000, 32));
    let port = context.port(1).unwrap();
    assert!(port.active);
    assert_eq!((port.mtu, port.lid), (4096, 0));
    let gid = context.best_gid(1).unwrap().gid;
    assert_eq!(gid[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff], "the GID of an IPv4 address");
}

#[test]
fn missing_ports_and_excessive_depths_are_refused() {
    let domain = domain();
    let context = domain.context();
    let message = assert_refused!(context.port(9), Error::Device { .. });
    assert_eq!(message, "rxe0: cannot query port 9");
    assert_refused!(context.best_gid(9), Error::NoGid { port: 9, .. });
    let message = assert_refused!(CompletionQueue::new(context, 1 << 30), Error::Device { .. });
    assert_eq!(message, "rxe0: cannot create a completion queue of 1073741824 entries");
    assert_refused!(CompletionQueue::new(context, u32::MAX), Error::Device { .. });
    let queue = CompletionQueue::new(context, 8).unwrap();
    let options = QueuePairOptions::default().send_depth(1 << 30);
    let refused = QueuePair::new(&domain, &queue, &queue, options);
    let message = assert_refused!(refused, Error::Device { .. });
    assert!(message.contains("send depth 1073741824"), "{message}");
}

#[test]
fn a_completion_queue_of_another_context_is_refused() {
    let (ours, other) = (domain(), domain());
    let queue = CompletionQueue::new(ours.context(), 8).unwrap();
    let foreign = CompletionQueue::new(other.context(), 8).unwrap();
    for [send, recv] in [[&queue, &foreign], [&foreign, &queue]] {
        let refused = QueuePair::new(&ours, send, recv, QueuePairOptions::default());
        assert_refused!(refused, Error::ContextMismatch { object: "completion queue", .. });
    }
}

#[test]
fn invalid_endpoints_are_refused() {
    let side = Side::new(&domain(), QueuePairOptions::default());
    let ours = side.pair.endpoint().unwrap();
    let refused = side.pair.connect(&Endpoint { qp_num: 1 << 24, ..ours });
    assert_refused!(refused, Error::InvalidEndpoint { .. });
    assert_refused!(side.pair.connect(&Endpoint { mtu: 9000, ..ours }), Error::InvalidEndpoint { .. });
    side.pair.connect(&ours).unwrap();
    assert_refused!(side.pair.connect(&ours), Error::Device { .. });
}

#[test]
fn posting_before_connecting_and_past_the_depth_is_refused() {
    let side = Side::new(&domain(), QueuePairOptions::default().send_depth(4).recv_depth(4));
    let message = assert_refused!(
        side.pair.post(WorkRequest::new(1, Operation::Send, &[]).signaled()),
        Error::Post { .. }
    );
    assert!(message.contains("is it connected?"), "{message}");
    let full = (0..10_000).find_map(|id| side.pair.post_recv(id, &[]).err());
    let message = assert_refused!(full.map_or(Ok(()), Err), Error::Post { .. });
    assert!(message.contains("the queue is full"), "{message}");
}

#[test]
fn messages_without_bytes_carry_immediate_data() {
    let peers = Peers::new();
    peers.theirs.pair.post_recv(5, &[]).unwrap();
    peers.ours.succeed(Operation::SendWithImm { imm: 0xdead_beef }, &[]);
    let received = peers.theirs.queue.wait(TIMEOUT).unwrap().success().unwrap();
    assert_eq!((received.wr_id, received.imm, received.byte_len), (5, Some(0xdead_beef), 0));
    assert_eq!(received.qp_num, peers.theirs.pair.number());
}

#[test]
fn a_wait_times_out_and_a_late_completion_is_not_lost() {
    let peers = Peers::new();
    let short = Duration::from_millis(30);
    assert_refused!(peers.theirs.queue.wait(short), Error::Timeout { timeout } if *timeout == short);
    peers.theirs.pair.post_recv(6, &[]).unwrap();
    std::thread::scope(|scope| {
        // It sleeps on the channel when the completion comes.
        let waiter = scope.spawn(|| peers.theirs.queue.wait(TIMEOUT));
        std::thread::sleep(Duration::from_millis(100));
        peers.ours.pair.post(WorkRequest::new(1, Operation::Send, &[])).unwrap();
        assert_eq!(waiter.join().unwrap().unwrap().wr_id, 6);
    });
    assert_eq!(peers.theirs.queue.poll().unwrap().count(), 0);
}

#[test]
fn completions_come_in_order() {
    let peers = Peers::new();
    (0..50).for_each(|id| peers.theirs.pair.post_recv(id, &[]).unwrap());
    for id in 0..50 {
        let request = WorkRequest::new(id, Operation::Send, &[]);
        peers.ours.pair.post(if id % 10 == 9 { request.signaled() } else { request }).unwrap();
    }
    let received: Vec<_> = (0..50).map(|_| peers.theirs.queue.wait(TIMEOUT).unwrap().wr_id).collect();
    assert!(received.iter().copied().eq(0..50), "{received:?}");
    let sent: Vec<_> = (0..5).map(|_| peers.ours.queue.wait(TIMEOUT).unwrap().wr_id).collect();
    assert_eq!(sent, [9, 19, 29, 39, 49], "only signaled requests complete");
}

#[test]
fn a_send_to_a_peer_without_a_receive_completes_with_its_status() {
    let peers = Peers::with(QueuePairOptions::default().rnr_retry(1));
    let ended = peers.ours.complete(Operation::Send, &[]);
    assert_eq!(ended.status, CompletionStatus::RNR_RETRY_EXC_ERR);
    let message = assert_refused!(ended.success(), Error::Completion { wr_id: 77, .. });
    assert!(message.contains("RNR_RETRY_EXC_ERR (the peer had no receive posted)"), "{message}");
    assert_eq!(peers.ours.complete(Operation::Send, &[]).status, CompletionStatus::WR_FLUSH_ERR);
}

#[test]
fn objects_may_be_dropped_in_any_order_and_leave_nothing() {
    let census = Census::take();
    let peers = Peers::new();
    let context = peers.context().clone();
    let Peers { domain, ours, theirs } = peers;
    drop(domain);
    drop(context);
    theirs.pair.post_recv(1, &[]).unwrap();
    ours.succeed(Operation::Send, &[]);
    let Side { queue, pair } = ours;
    drop(queue);
    drop(pair);
    drop(theirs);
    census.assert_unchanged();
}
