//! Connections by IP address.

use std::net::SocketAddr;
use std::time::Duration;

use dmabuf_rdma::cm::{Error, Listener, Outgoing};
use dmabuf_rdma::{Iova, RemoteRegion, transfer};

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::wire::{End, FAR};
use crate::common::{assert_same, contents};

const TIMEOUT: Duration = Duration::from_secs(30);

pub(super) fn address(port: u16) -> SocketAddr {
    SocketAddr::new(FAR.parse().unwrap(), port)
}

/// The counts before a test. librdmacm opens each device at its first use and keeps it open until the process
/// ends, so this uses both devices before it counts.
pub(super) fn census() -> Census {
    drop(Listener::bind(address(0)).unwrap());
    drop(Outgoing::resolve(address(9), None, TIMEOUT).unwrap());
    Census::take()
}

/// The handshake carries descriptions of buffers in both directions, and the peer learns of the
/// disconnection.
#[test]
fn the_handshake_carries_descriptions() {
    let census = census();
    {
        let listener = Listener::bind(address(0)).unwrap();
        let at = listener.local_addr();
        assert_ne!(at.port(), 0);
        let (mut far, mut near) =
            (End::new("rxe1", Default::default()), End::new("rxe0", Default::default()));
        let ((theirs, target), (ours, source)) = (far.filled(3 << 20, 2), near.filled(3 << 20, 1));
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let incoming = listener.accept_request(TIMEOUT).unwrap();
                assert_eq!((incoming.device_name().as_str(), incoming.port()), ("rxe1", 1));
                assert_eq!(incoming.peer_addr().ip().to_string(), "192.168.77.1");
                let (remote, rest) = RemoteRegion::split_from(incoming.private_data()).unwrap();
                assert!(rest.iter().all(|byte| *byte == 0), "padding");
                incoming.accept(&mut far.connection, &target.remote().to_bytes(), TIMEOUT).unwrap();
                // The peer writes; this receive ends when it disconnects.
                let ended = far.connection.recv(&target).and_then(|transfer| transfer.wait());
                assert_refused!(ended, transfer::Error::PeerDisconnected { done: 0, .. });
                assert!(!far.connection.is_usable());
                remote
            });
            let outgoing = Outgoing::resolve(at, None, TIMEOUT).unwrap();
            assert_eq!(outgoing.device_name(), "rxe0");
            let answer =
                outgoing.connect(&mut near.connection, &source.remote().to_bytes(), TIMEOUT).unwrap();
            let (remote, _) = RemoteRegion::split_from(&answer).unwrap();
            assert_eq!((remote.buffer(), remote.len()), (theirs.id(), 3 << 20));
            near.connection.write(&source, &remote).unwrap().wait().unwrap();
            assert_same(&contents(&theirs), &contents(&ours), "written");
            near.connection.disconnect();
            assert!(!near.connection.is_usable());
            let seen = server.join().unwrap();
            assert_eq!((seen.buffer(), seen.runs()[0].iova), (ours.id(), Iova(0)));
        });
    }
    census.assert_unchanged();
}

#[test]
fn refusals_name_their_cause() {
    let census = census();
    {
        let listener = Listener::bind(address(0)).unwrap();
        let at = listener.local_addr();
        let message = assert_refused!(Listener::bind(at), Error::Listen { .. });
        assert!(message.contains("another program listens there"), "{message}");
        let foreign = Listener::bind("203.0.113.7:9".parse().unwrap());
        let message = assert_refused!(foreign, Error::Listen { .. });
        assert!(message.contains("no RDMA device has this address"), "{message}");
        assert_refused!(
            listener.accept_request(Duration::from_millis(30)),
            Error::Timeout { step: "receive a request", .. }
        );

        // No program listens; the program rejects with data of its own; the route leads through another
        // device.
        let (mut near, far) = (End::new("rxe0", Default::default()), End::new("rxe1", Default::default()));
        let unheard = Outgoing::resolve(address(9), None, TIMEOUT).unwrap();
        let refused = unheard.connect(&mut near.connection, &[], TIMEOUT);
        let message = assert_refused!(refused, Error::Rejected { reason: 8, .. });
        assert!(message.contains("192.168.77.2:9 rejected the connection: no program listens"), "{message}");
        std::thread::scope(|scope| {
            let server = scope.spawn(|| listener.accept_request(TIMEOUT).unwrap().reject(b"full").unwrap());
            let outgoing = Outgoing::resolve(at, None, TIMEOUT).unwrap();
            match outgoing.connect(&mut near.connection, &[], TIMEOUT) {
                Err(Error::Rejected { reason: 28, private_data, .. }) => {
                    assert_eq!(&private_data[..4], b"full");
                }
                other => panic!("{other:?}"),
            }
            server.join().unwrap();
            let server = scope.spawn(|| drop(listener.accept_request(TIMEOUT).unwrap()));
            let outgoing = Outgoing::resolve(at, None, TIMEOUT).unwrap();
            let dropped = outgoing.connect(&mut near.connection, &[], TIMEOUT);
            assert_refused!(dropped, Error::Rejected { reason: 28, .. });
            server.join().unwrap();
        });
        let mut on_rxe1 = far.connection;
        let outgoing = Outgoing::resolve(at, None, TIMEOUT).unwrap();
        let message =
            assert_refused!(outgoing.connect(&mut on_rxe1, &[], TIMEOUT), Error::OtherDevice { .. });
        assert!(message.contains("through rxe0, port 1 and the connection was made on rxe1"), "{message}");
        let outgoing = Outgoing::resolve(at, None, TIMEOUT).unwrap();
        let refused = outgoing.connect(&mut near.connection, &[0; 53], TIMEOUT);
        assert_refused!(refused, Error::PrivateDataTooLong { length: 53, limit: 52 });

        // An address without a route, and a source address without an RDMA device.
        let nowhere = Outgoing::resolve("203.0.113.7:9".parse().unwrap(), None, TIMEOUT);
        let message = assert_refused!(nowhere, Error::Address { .. });
        assert!(message.contains("no route"), "{message}");
        let source = Some("203.0.113.8:0".parse().unwrap());
        assert_refused!(Outgoing::resolve(at, source, TIMEOUT), Error::Address { .. });
    }
    census.assert_unchanged();
}
