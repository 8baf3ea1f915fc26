//! The GID table, and the choice of a GID for a peer.

use std::net::IpAddr;

use dmabuf_rdma::verbs::{Context, Device, Error, Operation, ProtectionDomain, QueuePairOptions};

use crate::assert_refused;
use crate::common::peers::{Side, TIMEOUT};
use crate::common::system::run;
use crate::common::wire::FAR;

fn context(device: &str) -> Context {
    Device::by_name(device).unwrap().open().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn the_table_has_addresses_versions_and_interfaces() {
    let context = context("rxe0");
    let gids = context.gids(1).unwrap();
    // The default GID comes from the MAC address of wire0.
    let mut addresses: Vec<_> = gids.iter().map(|entry| entry.address().unwrap()).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses, ["192.168.77.1", "fd77::1", "fe80::ff:fe00:7701"].map(ip));
    for entry in &gids {
        assert_eq!(
            (entry.netdev.as_deref(), entry.up, entry.roce_version),
            (Some("wire0"), true, 2),
            "{entry}"
        );
    }
    assert_eq!(context.best_gid(1).unwrap().address(), Some(ip("192.168.77.1")));
    assert!(context.gids(9).unwrap().is_empty());
}

#[test]
fn a_gid_is_chosen_by_the_peers_address_or_ones_own() {
    let context = context("rxe0");
    let towards = |address: &str| context.gid_for(1, ip(address)).unwrap().address().unwrap();
    for (address, expected) in [
        (FAR, "192.168.77.1"),
        ("192.168.77.1", "192.168.77.1"),
        ("::ffff:192.168.77.2", "192.168.77.1"),
        ("fd77::2", "fd77::1"),
        ("2001:db8::1", "fd77::1"),
        ("fe80::1", "fe80::ff:fe00:7701"),
    ] {
        assert_eq!(towards(address), ip(expected), "{address}");
    }
    let message = assert_refused!(context.gid_for(9, ip(FAR)), Error::NoGid { port: 9, .. });
    assert!(message.contains("none reaches 192.168.77.2; it has none"), "{message}");
}

/// A device on an interface without IPv4: the error lists what there is. An interface that is down comes last.
#[test]
fn a_port_without_the_family_says_what_it_has() {
    run("ip", &["link", "add", "gids0", "type", "dummy"]);
    run("rdma", &["link", "add", "gids", "type", "rxe", "netdev", "gids0"]);
    let refused = context("gids").gid_for(1, ip(FAR));
    let entry = context("gids").best_gid(1);
    run("rdma", &["link", "delete", "gids"]);
    run("ip", &["link", "delete", "gids0"]);
    let message = assert_refused!(refused, Error::NoGid { port: 1, .. });
    let part = "gids port 1 has no usable GID: none reaches 192.168.77.2; it has GID 0, fe80::";
    assert!(message.contains(part) && message.contains("gids0, which is down"), "{message}");
    let entry = entry.unwrap();
    assert_eq!((entry.netdev.as_deref(), entry.up), (Some("gids0"), false));
}

/// One side has an IPv4 GID and the other an IPv6 one.
#[test]
fn ends_of_different_families_are_refused_by_name_and_those_of_one_family_meet() {
    let (near, far) = (context("rxe0"), context("rxe1"));
    let side = |context: &Context, address: &str| {
        let gid = context.gid_for(1, ip(address)).unwrap();
        let options = QueuePairOptions::default().gid_index(Some(gid.index));
        Side::new(&ProtectionDomain::new(context).unwrap(), options)
    };
    let (v4, v6) = (side(&near, FAR), side(&near, "fd77::2"));
    let peer = side(&far, "fd77::1");
    let peers = peer.pair.endpoint().unwrap();
    assert_eq!((peers.roce_version, peers.address()), (2, Some(ip("fd77::2"))));
    let message = assert_refused!(v4.pair.connect(&peers), Error::InvalidEndpoint { .. });
    let parts =
        "GID 192.168.77.1 of this end is an IPv4 address and the peer's fd77::2 is a routable IPv6 address";
    assert!(message.contains(parts) && message.contains("gid_index"), "{message}");
    let older = dmabuf_rdma::verbs::Endpoint { roce_version: 1, ..peers };
    let message = assert_refused!(v6.pair.connect(&older), Error::InvalidEndpoint { .. });
    assert!(message.contains("RoCE v2") && message.contains("RoCE v1"), "{message}");
    // No route: the message has both addresses.
    let mut elsewhere = peers;
    elsewhere.gid = "2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let message = assert_refused!(v6.pair.connect(&elsewhere), Error::Device { .. });
    assert!(message.contains("ip route get 2001:db8::7 from fd77::1"), "{message}");

    v6.pair.connect(&peers).unwrap();
    peer.pair.connect(&v6.pair.endpoint().unwrap()).unwrap();
    peer.pair.post_recv(5, &[]).unwrap();
    v6.succeed(Operation::Send, &[]);
    assert_eq!(peer.queue.wait(TIMEOUT).unwrap().success().unwrap().wr_id, 5);
    let message = assert_refused!(v6.pair.connect(&peers), Error::Device { .. });
    assert!(message.contains("is it connected already"), "{message}");
}

#[test]
fn an_index_without_a_gid_is_refused() {
    let domain = ProtectionDomain::new(&context("rxe0")).unwrap();
    let queue = dmabuf_rdma::verbs::CompletionQueue::new(domain.context(), 8).unwrap();
    let options = QueuePairOptions::default().gid_index(Some(200));
    let refused = dmabuf_rdma::verbs::QueuePair::new(&domain, &queue, &queue, options);
    let message = assert_refused!(refused, Error::NoGid { .. });
    assert!(message.contains("it has none at index 200"), "{message}");
}
