//! Connections by address between ports of different MTUs.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use dmabuf_rdma::cm::{Error, Listener, Outgoing};
use dmabuf_rdma::verbs::Device;
use dmabuf_rdma::{ErrorKind, RemoteRegion};

use crate::assert_refused;
use crate::common::system::run;
use crate::common::wire::{End, FAR};
use crate::common::{assert_same, contents};

const TIMEOUT: Duration = Duration::from_secs(30);
const SIZE: u64 = 300_001;

/// A RoCE MTU of 1024 on one end of the wire, until dropped.
struct Narrow(&'static str);

impl Narrow {
    fn new(netdev: &'static str) -> Self {
        // IPv6 needs 1280.
        run("ip", &["link", "set", "dev", netdev, "mtu", "1500"]);
        Self(netdev)
    }
}

impl Drop for Narrow {
    fn drop(&mut self) {
        run("ip", &["link", "set", "dev", self.0, "mtu", "4200"]);
    }
}

fn mtu(device: &str) -> u32 {
    Device::by_name(device).unwrap().open().unwrap().port(1).unwrap().mtu
}

/// Moves bytes both ways by WRITE, READ and SEND between a passive and an active side.
fn moves((passive, at): (&str, &str), active: &str) {
    let listener = Listener::bind(SocketAddr::new(at.parse().unwrap(), 0)).unwrap();
    let at = listener.local_addr();
    let (mut server, mut client) =
        (End::new(passive, Default::default()), End::new(active, Default::default()));
    let ((theirs, target), (ours, source)) = (server.filled(SIZE, 2), client.filled(SIZE, 1));
    let (theirs, ours) = (&theirs, &ours);
    let what = format!("{active} to {passive}");
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let incoming = listener.accept_request(TIMEOUT).unwrap();
            let (remote, _) = RemoteRegion::split_from(incoming.private_data()).unwrap();
            incoming.accept(&mut server.connection, &target.remote().to_bytes(), TIMEOUT).unwrap();
            server.connection.recv(&target).unwrap().wait().unwrap();
            let sent = contents(ours);
            assert_same(&contents(theirs), &sent, "sent");
            // The passive side writes and reads too.
            let bytes = crate::common::pattern(sent.len(), 3);
            theirs.map().unwrap().write(0, &bytes).unwrap();
            server.connection.write(&target, &remote).unwrap().wait().unwrap();
            assert_same(
                &contents(ours)[..SIZE as usize],
                &bytes[..SIZE as usize],
                "written by the passive side",
            );
            server.connection.read(&target, &remote).unwrap().wait().unwrap();
            server.connection.send(&target).unwrap().wait().unwrap();
        });
        let outgoing = Outgoing::resolve(at, None, TIMEOUT).unwrap();
        let answer = outgoing.connect(&mut client.connection, &source.remote().to_bytes(), TIMEOUT).unwrap();
        let (remote, _) = RemoteRegion::split_from(&answer).unwrap();
        client
            .connection
            .write(&source, &remote)
            .and_then(|transfer| transfer.wait())
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        client
            .connection
            .read(&source, &remote)
            .and_then(|transfer| transfer.wait())
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        client
            .connection
            .send(&source)
            .and_then(|transfer| transfer.wait())
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        client
            .connection
            .recv(&source)
            .and_then(|transfer| transfer.wait())
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        serving.join().unwrap();
    });
}

#[test]
fn ports_of_different_mtus_agree_on_the_smaller() {
    let (near, far) = (("rxe0", "192.168.77.1"), ("rxe1", FAR));
    for netdev in ["wire1", "wire0"] {
        let narrow = Narrow::new(netdev);
        let mut mtus = [mtu("rxe0"), mtu("rxe1")];
        mtus.sort();
        assert_eq!(mtus, [1024, 4096]);
        moves(far, "rxe0");
        moves(near, "rxe1");
        drop(narrow);
    }
    assert_eq!([mtu("rxe0"), mtu("rxe1")], [4096; 2]);
}

/// The rping of rdmacm-utils takes the MTU of its own interface and does not say what its port carries.
#[test]
fn a_peer_that_does_not_negotiate_is_refused_if_its_mtu_does_not_fit() {
    let listener = Listener::bind(SocketAddr::new(FAR.parse().unwrap(), 0)).unwrap();
    let port = listener.local_addr().port().to_string();
    let narrow = Narrow::new("wire1");
    let mut rping = Command::new("/usr/bin/rping");
    rping.args(["-c", "-a", FAR, "-p", &port, "-C", "1"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut client = rping.spawn().expect("rping");
    let mut end = End::new("rxe1", Default::default());
    let incoming = listener.accept_request(TIMEOUT).unwrap();
    assert_eq!(incoming.private_data(), [0; 56], "all of it is the peer's");
    let error = incoming.accept(&mut end.connection, &[], TIMEOUT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let message = assert_refused!(Err::<(), _>(error), Error::MtuMismatch { route: 4096, port: 1024, .. });
    assert!(message.contains("give the network interfaces of both ends the same MTU"), "{message}");
    assert!(!client.wait().unwrap().success(), "the client is rejected");
    drop(narrow);
}
