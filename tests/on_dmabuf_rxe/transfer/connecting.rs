//! Connections by IP address.

use std::net::SocketAddr;
use std::time::Duration;

use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::error::{ConnectError, TransferError};
use dmabuf_rdma::transfer::RemoteRegion;
use dmabuf_rdma::{Error, Iova};

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::wire::{End, FAR};
use crate::common::{assert_same, contents};

const LIMIT: Duration = Duration::from_secs(30);

fn address(port: u16) -> SocketAddr {
    SocketAddr::new(FAR.parse().unwrap(), port)
}

/// librdmacm opens each device when it is first needed, and keeps it open as long as the process lives:
/// once before anything is counted.
fn census() -> Census {
    drop(Listener::bind(address(0)).unwrap());
    drop(Outgoing::resolve(address(9), None, LIMIT).unwrap());
    Census::take()
}

/// Buffers are described in the handshake, in both directions, and the peer is told of the end.
#[test]
fn descriptions_travel_with_the_handshake() {
    let census = census();
    {
        let listener = Listener::bind(address(0)).unwrap();
        let at = listener.local_address();
        assert_ne!(at.port(), 0);
        let (mut far, mut near) =
            (End::new("rxe1", Default::default()), End::new("rxe0", Default::default()));
        let ((theirs, target), (ours, source)) = (far.filled(3 << 20, 2), near.filled(3 << 20, 1));
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let incoming = listener.next(LIMIT).unwrap();
                assert_eq!((incoming.device_name().as_str(), incoming.port()), ("rxe1", 1));
                assert_eq!(incoming.peer_address().ip().to_string(), "192.168.77.1");
                let (remote, rest) = RemoteRegion::split_from(incoming.private_data()).unwrap();
                assert!(rest.iter().all(|byte| *byte == 0), "padding");
                incoming.accept(&mut far.connection, &target.remote().to_bytes(), LIMIT).unwrap();
                // They write; it ends when they leave.
                let ended = far.connection.recv(&target);
                assert_refused!(ended, Error::Transfer(TransferError::PeerLeft { done: 0, .. }));
                assert!(!far.connection.is_usable());
                remote
            });
            let outgoing = Outgoing::resolve(at, None, LIMIT).unwrap();
            assert_eq!(outgoing.device_name(), "rxe0");
            let answer = outgoing.connect(&mut near.connection, &source.remote().to_bytes(), LIMIT).unwrap();
            let (remote, _) = RemoteRegion::split_from(&answer).unwrap();
            assert_eq!((remote.buffer(), remote.len()), (theirs.id(), 3 << 20));
            near.connection.write(&source, &remote).unwrap();
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
fn refusals_are_in_words() {
    let census = census();
    {
        let listener = Listener::bind(address(0)).unwrap();
        let at = listener.local_address();
        let taken = Listener::bind(at);
        let message = assert_refused!(taken, Error::Connect(ConnectError::Listen { .. }));
        assert!(message.contains("something else does"), "{message}");
        let foreign = Listener::bind("203.0.113.7:9".parse().unwrap());
        let message = assert_refused!(foreign, Error::Connect(ConnectError::Listen { .. }));
        assert!(message.contains("no RDMA device has this address"), "{message}");
        assert_refused!(
            listener.next(Duration::from_millis(30)),
            Error::Connect(ConnectError::ConnectTimeout { step: "be asked for one", .. })
        );

        // Nobody listens; the program there says no, with words of its own; another device.
        let (mut near, far) = (End::new("rxe0", Default::default()), End::new("rxe1", Default::default()));
        let nobody = Outgoing::resolve(address(9), None, LIMIT).unwrap();
        let refused = nobody.connect(&mut near.connection, &[], LIMIT);
        let message = assert_refused!(refused, Error::Connect(ConnectError::Rejected { reason: 8, .. }));
        assert!(message.contains("192.168.77.2:9 rejected the connection: nobody listens"), "{message}");
        std::thread::scope(|scope| {
            let server = scope.spawn(|| listener.next(LIMIT).unwrap().reject(b"full").unwrap());
            let outgoing = Outgoing::resolve(at, None, LIMIT).unwrap();
            match outgoing.connect(&mut near.connection, &[], LIMIT) {
                Err(Error::Connect(ConnectError::Rejected { reason: 28, private_data, .. })) => {
                    assert_eq!(&private_data[..4], b"full");
                }
                other => panic!("{other:?}"),
            }
            server.join().unwrap();
            let server = scope.spawn(|| drop(listener.next(LIMIT).unwrap()));
            let outgoing = Outgoing::resolve(at, None, LIMIT).unwrap();
            let dropped = outgoing.connect(&mut near.connection, &[], LIMIT);
            assert_refused!(dropped, Error::Connect(ConnectError::Rejected { reason: 28, .. }));
            server.join().unwrap();
        });
        let mut on_rxe1 = far.connection;
        let outgoing = Outgoing::resolve(at, None, LIMIT).unwrap();
        let message = assert_refused!(
            outgoing.connect(&mut on_rxe1, &[], LIMIT),
            Error::Connect(ConnectError::OtherDevice { .. })
        );
        assert!(message.contains("through rxe0, port 1 and the connection was made on rxe1"), "{message}");
        let outgoing = Outgoing::resolve(at, None, LIMIT).unwrap();
        let refused = outgoing.connect(&mut near.connection, &[0; 57], LIMIT);
        assert_refused!(refused, Error::Connect(ConnectError::PrivateDataTooLong { length: 57, limit: 56 }));

        // An address that is routed nowhere, and one without an RDMA device: loopback's own.
        let nowhere = Outgoing::resolve("203.0.113.7:9".parse().unwrap(), None, LIMIT);
        let message = assert_refused!(nowhere, Error::Connect(ConnectError::Address { .. }));
        assert!(message.contains("no route"), "{message}");
        let source = Some("203.0.113.8:0".parse().unwrap());
        assert_refused!(Outgoing::resolve(at, source, LIMIT), Error::Connect(ConnectError::Address { .. }));
    }
    census.assert_unchanged();
}
