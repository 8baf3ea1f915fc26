//! Soft-iWARP: devices without GIDs, without dma-buf import, and with connections by IP address only. What needs
//! neither import nor an `Endpoint` works through HostMapping; the rest is refused by name.

mod doctor;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::exporter::{Allocation, PageKind};
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, RegisterError, SelfCheckError, probe};
use dmabuf_rdma::transfer::{Connection, ConnectionOptions, Error, RequestError};
use dmabuf_rdma::verbs::{self, AsyncEvent, Device, Endpoint, ProtectionDomain};
use dmabuf_rdma::{ErrorKind, Iova, RegionSet, RemoteRegion};

use crate::assert_refused;
use crate::common::buffers::{udmabuf, udmabuf_kinds};
use crate::common::census::Census;
use crate::common::host::{host, host_contents, host_kinds};
use crate::common::{assert_same, contents, pattern};

const TIMEOUT: Duration = Duration::from_secs(20);
const READ_AND_WRITE: Access = Access::LOCAL_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_WRITE);

#[track_caller]
fn domain(device: &str) -> ProtectionDomain {
    let context = Device::by_name(device).and_then(|device| device.open());
    ProtectionDomain::new(&context.expect("a siw device; run this with `cargo xtask test --siw`")).unwrap()
}

/// Two ends, siw0 and siw1, connected by IP address.
fn connected(options: ConnectionOptions) -> [(Connection, ProtectionDomain); 2] {
    let address = |end: u8| SocketAddr::from(([192, 168, 77, end], 0));
    let listener = Listener::bind(address(2)).unwrap();
    let there = listener.local_addr();
    std::thread::scope(|scope| {
        let far = scope.spawn(move || {
            let incoming = listener.accept_request(TIMEOUT).unwrap();
            assert_eq!((incoming.device_name().as_str(), incoming.private_data()[0]), ("siw1", 7));
            let domain = domain("siw1");
            let mut connection = Connection::new(&domain, options).unwrap();
            incoming.accept(&mut connection, &[8], TIMEOUT).unwrap();
            (connection, domain)
        });
        let outgoing = Outgoing::resolve(there, Some(address(1)), TIMEOUT).unwrap();
        assert_eq!(outgoing.device_name(), "siw0");
        let domain = domain("siw0");
        let mut connection = Connection::new(&domain, options).unwrap();
        let answer = outgoing.connect(&mut connection, &[7], TIMEOUT).unwrap();
        assert_eq!(answer[0], 8);
        [(connection, domain), far.join().unwrap()]
    })
}

#[track_caller]
fn mapped(domain: &ProtectionDomain, allocation: &Allocation, access: Access) -> MemoryRegion {
    let backing = allocation.backing.as_ref().expect("a buffer with host pages");
    let region = MemoryRegion::builder(domain, &allocation.dmabuf).access(access).host_mapping(backing);
    let region = region.register().unwrap();
    assert_eq!(region.path(), Path::HostMapping);
    region
}

fn filled(size: u64, seed: u64) -> Allocation {
    let allocation = udmabuf(PageKind::Base, size);
    allocation.dmabuf.map().unwrap().write(0, &pattern(size as usize, seed)).unwrap();
    allocation
}

#[test]
fn every_byte_of_every_udmabuf_moves() {
    const SIZE: u64 = 4 << 20;
    let census = Census::take();
    {
        let [(near, near_domain), (far, far_domain)] = connected(ConnectionOptions::default());
        for kind in udmabuf_kinds() {
            let ours = (kind.allocate)(SIZE);
            ours.dmabuf.map().unwrap().write(0, &pattern(SIZE as usize, 1)).unwrap();
            let (theirs, back) = (filled(SIZE, 2), filled(SIZE, 3));
            let source = mapped(&near_domain, &ours, READ_AND_WRITE);
            let target = mapped(&far_domain, &theirs, READ_AND_WRITE);
            let into = mapped(&near_domain, &back, READ_AND_WRITE);
            // From and to the middle of pages.
            let (from, to, length) = (13, 0x1a37, SIZE as usize - 0x2000);
            let local = source.slice(from..from + length as u64).unwrap();
            let remote = target.remote();
            let place = remote.slice(to..to + length as u64).unwrap();
            near.write(&local, &place).unwrap().wait().unwrap();
            let mut expected = pattern(SIZE as usize, 2);
            expected[to as usize..][..length]
                .copy_from_slice(&contents(&ours.dmabuf)[from as usize..][..length]);
            assert_same(&contents(&theirs.dmabuf), &expected, &format!("{}: written", kind.name));
            near.read(&into, &remote).unwrap().wait().unwrap();
            assert_same(&contents(&back.dmabuf), &expected, &format!("{}: read back", kind.name));
            // And the other way, by SEND. iWARP has no retry for a receive that is not posted yet.
            let receiving = near.recv(&source).unwrap();
            far.send(&target).unwrap().wait().unwrap();
            receiving.wait().unwrap();
            assert_same(&contents(&ours.dmabuf), &expected, &format!("{}: sent back", kind.name));
        }
    }
    census.assert_unchanged();
}

#[test]
fn a_set_of_chunks_moves() {
    const SIZE: u64 = 2 << 20;
    let [(near, near_domain), (_far, far_domain)] = connected(ConnectionOptions::default());
    let (ours, theirs) = (filled(SIZE, 1), filled(SIZE, 2));
    let set = |domain: &ProtectionDomain, allocation: &Allocation, chunk| {
        let builder = RegionSet::builder(&allocation.dmabuf).access(READ_AND_WRITE).chunk_size(chunk);
        builder.host_mapping(allocation.backing.as_slice()).register(domain).unwrap()
    };
    let source = set(&near_domain, &ours, 96 << 12);
    let target = set(&far_domain, &theirs, 256 << 10);
    near.write(&source, target.remote()).unwrap().wait().unwrap();
    assert_same(&contents(&theirs.dmabuf), &pattern(SIZE as usize, 1), "the far end");
}

#[test]
fn a_dma_buf_is_refused_by_name() {
    let census = Census::take();
    {
        let (domain, allocation) = (domain("siw0"), udmabuf(PageKind::Base, 4096));
        let refused = MemoryRegion::builder(&domain, &allocation.dmabuf).register();
        for refused in [refused.map(drop), probe(domain.context()).map(drop)] {
            let message = assert_refused!(refused, RegisterError::ImportUnsupported { .. });
            for part in ["siw0 cannot import a dma-buf", "Verbs: EOPNOTSUPP", "Uverbs: EOPNOTSUPP"] {
                assert!(message.contains(part), "{message}");
            }
        }
    }
    census.assert_unchanged();
}

/// siw has no iova of its own (`siw_reg_user_mr`): a region is at the address of its pages.
#[test]
fn an_iova_cannot_be_chosen() {
    let (domain, allocation) = (domain("siw0"), udmabuf(PageKind::Base, 8192));
    let backing = allocation.backing.as_ref().unwrap();
    let builder = MemoryRegion::builder(&domain, &allocation.dmabuf).range(4096..).host_mapping(backing);
    let region = builder.register().unwrap();
    assert_eq!(region.iova(), Iova(backing.as_ptr() as u64 + 4096));
    let message = assert_refused!(
        builder.iova(Iova(4096)).register(),
        RegisterError::Verbs(verbs::Error::Unavailable {
            operation: "choice of the iova for host pages",
            ..
        })
    );
    assert!(message.contains("on iWARP leave the iova out"), "{message}");
    builder.iova(region.iova()).register().unwrap();
}

#[test]
fn an_endpoint_connects_nothing() {
    let census = Census::take();
    {
        let domain = domain("siw0");
        let connection = Connection::new(&domain, ConnectionOptions::default()).unwrap();
        let endpoint = connection.endpoint();
        let refused = connection.connect(&Endpoint { gid: [1; 16], ..endpoint });
        assert_eq!(refused.as_ref().unwrap_err().kind(), ErrorKind::Unsupported);
        let message = assert_refused!(
            refused,
            Error::Verbs(verbs::Error::Unavailable { operation: "connection by Endpoint", .. })
        );
        assert!(message.contains("on iWARP connect by IP address"), "{message}");
        // Nor does a peer take it.
        let message =
            assert_refused!(Endpoint::from_bytes(&endpoint.to_bytes()), verbs::Error::InvalidEndpoint { .. });
        assert!(message.contains("neither a GID nor a LID"), "{message}");
        let refused = domain.context().gid_for(1, [192, 168, 77, 1].into());
        assert_refused!(refused, verbs::Error::NoGid { .. });

        let region = mapped(&domain, &udmabuf(PageKind::Base, 4096), Access::LOCAL_WRITE);
        assert_refused!(
            region.self_check(),
            SelfCheckError::Setup(verbs::Error::Unavailable { operation: "connection by Endpoint", .. })
        );
    }
    census.assert_unchanged();
}

#[test]
fn a_read_needs_memory_that_the_peer_may_write() {
    let [(near, near_domain), (_far, far_domain)] = connected(ConnectionOptions::default());
    let (ours, theirs) = (filled(8192, 1), filled(8192, 2));
    let local = mapped(&near_domain, &ours, Access::LOCAL_WRITE);
    let target = mapped(&far_domain, &theirs, READ_AND_WRITE);
    let message = assert_refused!(
        near.read(&local, target.remote()).and_then(|transfer| transfer.wait()),
        Error::Request(RequestError::LocalAccessMissing { offset: 0, .. })
    );
    assert!(message.contains("on iWARP the peer answers a READ by writing"), "{message}");
    // Nothing was posted.
    near.write(&local, target.remote()).unwrap().wait().unwrap();
    assert_same(&contents(&theirs.dmabuf), &pattern(8192, 1), "the far end");
}

#[test]
fn immediate_data_and_atomics_are_refused_by_name() {
    for atomic in [false, true] {
        let [(near, near_domain), (_far, far_domain)] = connected(ConnectionOptions::default());
        let (ours, theirs) = (filled(4096, 1), filled(4096, 2));
        let access = READ_AND_WRITE | Access::REMOTE_ATOMIC;
        let [source, target] = [(&near_domain, &ours), (&far_domain, &theirs)]
            .map(|(domain, buffer)| mapped(domain, buffer, access));
        let remote = target.remote();
        let refused = match atomic {
            true => near
                .fetch_add(source.slice(..8).unwrap(), remote.slice(..8).unwrap(), 1)
                .and_then(|transfer| transfer.wait()),
            false => near.write_notify(&source, &remote, 7).and_then(|transfer| transfer.wait()),
        };
        let message = assert_refused!(
            refused,
            Error::Verbs(verbs::Error::Unavailable { operation: "immediate data or atomics", .. })
        );
        assert!(message.contains("iWARP device with RFC 7306"), "{message}");
        assert_same(&contents(&theirs.dmabuf), &pattern(4096, 2), "the far end");
    }
}

#[test]
fn a_wrong_key_and_a_peer_that_disconnects_end_the_connection() {
    let census = Census::take();
    {
        let [(near, near_domain), (far, far_domain)] = connected(ConnectionOptions::default());
        let (ours, theirs) = (filled(4096, 1), filled(4096, 2));
        let source = mapped(&near_domain, &ours, READ_AND_WRITE);
        let read_only = mapped(&far_domain, &theirs, Access::REMOTE_READ);
        // The peer's own check, since its description says that a WRITE is not permitted.
        assert_refused!(
            near.write(&source, read_only.remote()).and_then(|transfer| transfer.wait()),
            Error::Request(RequestError::RemoteAccessMissing { .. })
        );
        let target = mapped(&far_domain, &theirs, READ_AND_WRITE);
        let gone = target.remote();
        drop(target);
        let refused = near.read(&source, &gone).and_then(|transfer| transfer.wait());
        // The peer answers with TERMINATE, which ends the connection: whichever of the two is seen first.
        assert_refused!(refused, Error::Failed { .. } | Error::PeerDisconnected { done: 0, .. });
        assert!(!near.is_usable());
        drop(far);
        assert_same(&contents(&ours.dmabuf), &pattern(4096, 1), "the near end");
    }
    {
        let [(near, near_domain), (far, _)] = connected(ConnectionOptions::default());
        let ours = filled(4096, 1);
        let region = mapped(&near_domain, &ours, READ_AND_WRITE);
        drop(far);
        assert_refused!(
            near.recv(&region).and_then(|transfer| transfer.wait()),
            Error::PeerDisconnected { done: 0, .. }
        );
    }
    census.assert_unchanged();
}

#[test]
fn host_memory_moves() {
    const SIZE: u64 = 2 << 20;
    // librdmacm keeps both devices open from the first use on.
    drop(connected(ConnectionOptions::default()));
    let census = Census::take();
    {
        let [(near, near_domain), (far, far_domain)] = connected(ConnectionOptions::default());
        for kind in host_kinds() {
            let (ours, theirs) = ((kind.allocate)(SIZE), host(SIZE));
            ours.write(0, &pattern(SIZE as usize, 1)).unwrap();
            let register = |domain, buffer| {
                let region = MemoryRegion::builder(domain, buffer).access(READ_AND_WRITE).register().unwrap();
                assert_eq!(region.path(), Path::HostMemory);
                region
            };
            let (source, target) = (register(&near_domain, &ours), register(&far_domain, &theirs));
            assert_eq!(source.iova(), Iova(ours.as_ptr() as u64), "{}", kind.name);
            near.write(&source, target.remote()).unwrap().wait().unwrap();
            assert_same(&host_contents(&theirs), &pattern(SIZE as usize, 1), kind.name);
            theirs.write(0, &pattern(SIZE as usize, 2)).unwrap();
            near.read(&source, target.remote()).unwrap().wait().unwrap();
            assert_same(&host_contents(&ours), &pattern(SIZE as usize, 2), kind.name);
            theirs.write(0, &pattern(SIZE as usize, 3)).unwrap();
            let receiving = near.recv(&source).unwrap();
            far.send(&target).unwrap().wait().unwrap();
            receiving.wait().unwrap();
            assert_same(&host_contents(&ours), &pattern(SIZE as usize, 3), kind.name);
            let inside = Iova(source.iova().0 % 4096);
            assert_refused!(
                MemoryRegion::builder(&near_domain, &ours).iova(inside).register(),
                RegisterError::Verbs(verbs::Error::Unavailable {
                    operation: "choice of the iova for host pages",
                    ..
                })
            );
        }
    }
    census.assert_unchanged();
}

/// siw reports to the responder that it refused a request. Its receive that waits ends at once, by that name.
#[test]
fn a_queue_pair_that_refuses_a_request_ends_its_transfers_at_once() {
    // librdmacm keeps both devices open from the first use on.
    drop(connected(ConnectionOptions::default()));
    let census = Census::take();
    {
        let [(near, near_domain), (far, far_domain)] = connected(ConnectionOptions::default());
        let events = far_domain.context().events().unwrap();
        let (ours, theirs) = (filled(4096, 1), filled(4096, 2));
        let source = mapped(&near_domain, &ours, READ_AND_WRITE);
        let target = mapped(&far_domain, &theirs, Access::LOCAL_WRITE | Access::REMOTE_READ);
        // A peer that claims more than it registered.
        let remote = target.remote();
        let claimed =
            RemoteRegion::new(remote.runs().iter().copied(), READ_AND_WRITE, remote.buffer()).unwrap();
        let receive = far.recv(&target).unwrap();
        let qp_num = far.endpoint().qp_num;
        std::thread::scope(|scope| {
            let waiter = scope.spawn(move || (receive.wait(), Instant::now()));
            std::thread::sleep(Duration::from_millis(200));
            let start = Instant::now();
            // iWARP completes a WRITE when it is sent.
            let _ = near.write(&source, &claimed).unwrap().wait();
            let (ended, at) = waiter.join().unwrap();
            let event = AsyncEvent::QueuePairAccessError { qp_num };
            let message =
                assert_refused!(ended, Error::DeviceEvent { event: named, done: 0, .. } if *named == event);
            assert!(message.contains("received a request that its memory does not permit"), "{message}");
            assert_eq!(ended.unwrap_err().kind(), ErrorKind::Transport);
            assert!(at - start < Duration::from_secs(5), "{:?}", at - start);
            // The connection has taken no event from the reader.
            assert_eq!(events.wait(TIMEOUT).unwrap(), Some(event));
        });
        assert!(!far.is_usable());
    }
    census.assert_unchanged();
}
