//! The options that packets carry: on the wire, as the device reports them, and what is refused.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use dmabuf_rdma::ErrorKind;
use dmabuf_rdma::cm::{self, Listener, Outgoing};
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{
    CompletionQueue, Device, Error, Operation, ProtectionDomain, QueuePair, QueuePairOptions, ffi,
};

use crate::assert_refused;
use crate::common::capture::Capture;
use crate::common::census::Census;
use crate::common::peers::{Side, TIMEOUT};
use crate::common::system::run;
use crate::common::wire::{End, FAR};
use crate::common::{assert_same, contents};

/// Opcodes of RC in the BTH: SEND only, and of UD, which the connection manager uses.
const SEND_ONLY: u8 = 0x04;
const UD_SEND_ONLY: u8 = 0x64;

fn domain(device: &str) -> ProtectionDomain {
    ProtectionDomain::new(&Device::by_name(device).unwrap().open().unwrap()).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Two connected queue pairs, of rxe0 and rxe1.
fn connected(near: QueuePairOptions, far: QueuePairOptions) -> [Side; 2] {
    let sides = [Side::new(&domain("rxe0"), near), Side::new(&domain("rxe1"), far)];
    sides[0].pair.connect(&sides[1].pair.endpoint().unwrap()).unwrap();
    sides[1].pair.connect(&sides[0].pair.endpoint().unwrap()).unwrap();
    sides
}

/// The attributes of a queue pair, as the device reports them.
fn queried(pair: &QueuePair) -> ffi::ibv_qp_attr {
    let (mut attr, mut init) = (ffi::ibv_qp_attr::default(), ffi::ibv_qp_init_attr::default());
    let mask = ffi::ibv_qp_attr_mask::IBV_QP_AV | ffi::ibv_qp_attr_mask::IBV_QP_TIMEOUT;
    // SAFETY: the queue pair is live; the other pointers are local variables.
    assert_eq!(unsafe { ffi::ibv_query_qp(pair.as_raw().as_ptr(), &mut attr, mask.0 as i32, &mut init) }, 0);
    attr
}

/// The source port that the kernel derives from a flow label (`rdma_flow_label_to_udp_sport`).
fn source_port(flow_label: u32) -> u16 {
    ((flow_label & 0x3fff) ^ (flow_label >> 14) | 0xc000) as u16
}

fn send(sides: &[Side; 2]) {
    sides[1].pair.post_recv(1, &[]).unwrap();
    sides[0].succeed(Operation::Send, &[]);
    sides[1].queue.wait(TIMEOUT).unwrap().success().unwrap();
}

#[test]
fn options_reach_the_ipv4_header() {
    const LABEL: u32 = 0x5_4321;
    let near = QueuePairOptions::default()
        .traffic_class(Some(26 << 2))
        .flow_label(Some(LABEL))
        .hop_limit(Some(77))
        .service_level(Some(5))
        .static_rate(Some(2500))
        .pkey(Some(0x7fff));
    let sides = connected(near, QueuePairOptions::default().traffic_class(Some(46 << 2)));
    let capture = Capture::new("wire0");
    send(&sides);
    let to = sides[1].pair.number();
    let packet = capture.find("to the far end", |p| p.dest_qp == to && p.opcode == SEND_ONLY);
    assert_eq!((packet.version, packet.traffic_class, packet.pkey), (4, 26 << 2, 0xffff));
    assert_eq!(packet.source_port, source_port(LABEL));
    // The kernel replaces the hop limit with that of the route.
    assert_eq!(packet.hop_limit, 64);
    // The far end's acknowledgement has its own traffic class.
    let back = sides[0].pair.number();
    assert_eq!(capture.find("to the near end", |p| p.dest_qp == back).traffic_class, 46 << 2);

    let attr = queried(&sides[0].pair);
    let grh = attr.ah_attr.grh;
    assert_eq!((grh.traffic_class, grh.flow_label, grh.hop_limit), (26 << 2, LABEL, 64));
}

#[test]
fn options_reach_the_ipv6_header() {
    let v6 = |address: &str| QueuePairOptions::default().gid_address(Some(ip(address)));
    let sides = connected(v6("fd77::1").traffic_class(Some(0xb8)), v6("fd77::2"));
    let capture = Capture::new("wire0");
    send(&sides);
    let to = sides[1].pair.number();
    let packet = capture.find("to the far end", |p| p.dest_qp == to && p.opcode == SEND_ONLY);
    assert_eq!((packet.version, packet.traffic_class, packet.pkey), (6, 0xb8, 0xffff));
    assert_eq!(sides[0].pair.endpoint().unwrap().address(), Some(ip("fd77::1")));
}

#[test]
fn a_route_with_a_hop_limit_gives_it_to_the_packets() {
    run(
        "ip",
        &["route", "change", FAR, "dev", "wire0", "src", "192.168.77.1", "hoplimit", "9", "table", "101"],
    );
    let sides = connected(QueuePairOptions::default(), QueuePairOptions::default());
    run("ip", &["route", "change", FAR, "dev", "wire0", "src", "192.168.77.1", "table", "101"]);
    let capture = Capture::new("wire0");
    send(&sides);
    let to = sides[1].pair.number();
    assert_eq!(capture.find("to the far end", |p| p.dest_qp == to && p.opcode == SEND_ONLY).hop_limit, 9);
}

/// Two ends connected by IP address.
fn by_address(
    near: QueuePairOptions,
    far: QueuePairOptions,
    resolve: impl FnOnce(SocketAddr) -> Outgoing,
) -> Result<[End; 2], cm::Error> {
    let listener = Listener::bind(SocketAddr::new(ip(FAR), 0)).unwrap();
    let end = |device: &str, pair| End::new(device, ConnectionOptions::default().queue_pair(pair));
    let (mut near, mut far) = (end("rxe0", near), end("rxe1", far));
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let incoming = listener.accept_request(TIMEOUT).unwrap();
            incoming.accept(&mut far.connection, &[], Duration::from_secs(5))
        });
        let connected = resolve(listener.local_addr()).connect(&mut near.connection, &[], TIMEOUT);
        let accepted = server.join().unwrap();
        connected?;
        accepted
    })?;
    Ok([near, far])
}

#[test]
fn a_route_has_a_traffic_class_that_a_connection_can_replace() {
    let options = QueuePairOptions::default();
    let resolve = |address| Outgoing::resolve_with_traffic_class(address, None, 0x48, TIMEOUT).unwrap();
    // What the far end chooses is in its acknowledgements.
    for (near, far, classes) in [
        (options, options, (0x48, 0x48)),
        (options.traffic_class(Some(0x20)), options, (0x20, 0x48)),
        (options, options.traffic_class(Some(0)).timeout(14), (0x48, 0)),
    ] {
        let capture = Capture::new("wire0");
        let [near, far] = by_address(near.timeout(15), far, resolve).unwrap();
        let request = capture.find("of the connection manager", |p| p.opcode == UD_SEND_ONLY);
        assert_eq!(request.traffic_class, 0x48);
        let ((ours, source), (theirs, target)) = (near.filled(4096, 1), far.filled(4096, 2));
        near.connection.write(&source, target.remote()).unwrap().wait().unwrap();
        assert_same(&contents(&theirs), &contents(&ours), "written");
        let of = |end: &End| end.connection.endpoint().qp_num;
        let there = capture.find("to the far end", |p| p.dest_qp == of(&far));
        let back = capture.find("to the near end", |p| p.dest_qp == of(&near));
        assert_eq!((there.traffic_class, back.traffic_class), classes);
    }
}

/// The connection manager agrees on the partition with the peer.
#[test]
fn a_p_key_of_the_route_is_taken_and_no_other() {
    let options = QueuePairOptions::default();
    let resolve = |address| Outgoing::resolve(address, None, TIMEOUT).unwrap();
    by_address(options.pkey(Some(0xffff)), options.pkey_index(Some(0)), resolve).unwrap();
}

#[test]
fn options_beyond_their_range_are_refused_before_anything_is_made() {
    let census = Census::take();
    let domain = domain("rxe0");
    let queue = CompletionQueue::new(domain.context(), 8).unwrap();
    let options = QueuePairOptions::default();
    let before = run("rdma", &["resource", "show", "qp"]);
    for (option, bad, allowed) in [
        ("service_level", options.service_level(Some(16)), "service_level cannot be 16: it is 0 to 15"),
        ("flow_label", options.flow_label(Some(1 << 20)), "flow_label cannot be 1048576: it is 0 to 1048575"),
        ("hop_limit", options.hop_limit(Some(0)), "hop_limit cannot be 0: it is 1 to 255"),
        ("timeout", options.timeout(32), "timeout cannot be 32: it is 0 to 31"),
        ("retry_count", options.retry_count(8), "retry_count cannot be 8: it is 0 to 7"),
        ("rnr_retry", options.rnr_retry(255), "rnr_retry cannot be 255: it is 0 to 7"),
        (
            "static_rate",
            options.static_rate(Some(2501)),
            "static_rate cannot be 2501: it is one of 2500, 5000",
        ),
        ("static_rate", options.static_rate(Some(1_275_000)), "since the port has "),
        (
            "pkey",
            options.pkey(Some(0x8001)),
            "pkey cannot be 0x8001: it is a P_Key of port 1, which has 0xffff at index 0",
        ),
        (
            "pkey_index",
            options.pkey_index(Some(1)),
            "pkey_index cannot be 1: it is a P_Key of port 1, which has 0xffff",
        ),
        ("pkey_index", options.pkey_index(Some(0)).pkey(Some(0x8001)), "pkey_index cannot be 0"),
    ] {
        let refused = QueuePair::new(&domain, &queue, &queue, bad);
        let message =
            assert_refused!(refused, Error::InvalidOption { option: named, .. } if *named == option);
        assert!(message.starts_with("rxe0: ") && message.contains(allowed), "{message}");
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Misuse);
    }
    for (bad, part) in [
        (options.gid_index(Some(200)), "it has none at index 200"),
        (options.gid_address(Some(ip("10.9.9.9"))), "it has none with the address 10.9.9.9"),
        (
            options.gid_index(Some(0)).gid_address(Some(ip("10.9.9.9"))),
            "it has none at index 0 with the address 10.9.9.9",
        ),
    ] {
        let refused = QueuePair::new(&domain, &queue, &queue, bad);
        let message = assert_refused!(refused, Error::NoGid { .. });
        assert!(message.contains(part), "{message}");
    }
    // The device says how much it takes inline.
    let refused = QueuePair::new(&domain, &queue, &queue, options.max_inline(1 << 20));
    let message = assert_refused!(refused, Error::Device { .. });
    assert!(message.contains("1048576 inline bytes"), "{message}");
    assert_refused!(QueuePair::new(&domain, &queue, &queue, options.port(2)), Error::Device { .. });
    assert_eq!(run("rdma", &["resource", "show", "qp"]), before);
    drop((queue, domain));
    census.assert_unchanged();
}

#[test]
fn a_port_has_a_rate_and_p_keys() {
    let context = Device::by_name("rxe0").unwrap().open().unwrap();
    assert_eq!(context.pkeys(1).unwrap(), [(0, 0xffff)]);
    assert_refused!(context.pkeys(2), Error::Device { .. });
    let rate = context.port(1).unwrap().rate;
    let sysfs = std::fs::read_to_string("/sys/class/infiniband/rxe0/ports/1/rate").unwrap();
    let gigabits: f64 = sysfs.split(' ').next().unwrap().parse().unwrap();
    assert!((f64::from(rate) - gigabits * 1000.0).abs() < 400.0 * gigabits / 10.0, "{rate} and {sysfs}");
}
