//! What the library does not offer on a region, but another program may do: each works right, or is refused
//! with its errno.

use std::io;

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::verbs::{
    CompletionStatus, Operation, ProtectionDomain, QueuePairOptions, RemoteAddr, Rkey, WorkRequest,
};

use crate::common::buffers::{heap, udmabuf};
use crate::common::census::Census;
use crate::common::cgroup::Cgroup;
use crate::common::peers::{Peers, Side, TIMEOUT, domain};
use crate::common::raw::*;
use crate::common::{assert_same, contents, pattern};

const SIZE: u64 = 64 << 10;

/// soft-RoCE ends a request that this side refuses with this status, whatever the reason.
const REFUSED_HERE: CompletionStatus = CompletionStatus::WR_FLUSH_ERR;

/// Two connected queue pairs in this domain.
fn peers(domain: &ProtectionDomain) -> Peers {
    let options = QueuePairOptions::default();
    let (ours, theirs) = (Side::new(domain, options), Side::new(domain, options));
    ours.pair.connect(&theirs.pair.endpoint().unwrap()).unwrap();
    theirs.pair.connect(&ours.pair.endpoint().unwrap()).unwrap();
    Peers { domain: domain.clone(), ours, theirs }
}

fn errno(result: io::Result<impl Sized>) -> Option<i32> {
    result.err().map(|error| error.raw_os_error().expect("an errno"))
}

/// Writes a new pattern to the first 4096 bytes under the key, on new queue pairs. Checks the bytes if the
/// write succeeds, and that there are none otherwise.
#[track_caller]
fn write(domain: &ProtectionDomain, target: &DmaBuf, rkey: u32) -> CompletionStatus {
    static SEED: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let bytes = pattern(4096, SEED.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    let peers = peers(domain);
    let source = heap(4096);
    source.map().unwrap().write(0, &bytes).unwrap();
    let region = peers.register(&source);
    let before = contents(target);
    let remote = RemoteAddr { addr: 0, rkey: Rkey(rkey) };
    let status = peers.ours.complete(Operation::Write { remote }, &[region.sge(..).unwrap()]).status;
    let after = contents(target);
    match status {
        CompletionStatus::SUCCESS => assert_same(&after[..4096], &bytes, "the target"),
        _ => assert_same(&after, &before, "the target of a refused write"),
    }
    status
}

#[test]
fn re_registration_changes_access() {
    let census = Census::take();
    let (domain, buffer) = (domain(), heap(SIZE));
    let region = RawRegion::new(&domain, &buffer, LOCAL_WRITE | REMOTE_READ).unwrap();
    assert_eq!(write(&domain, &buffer, region.keys.rkey), CompletionStatus::REM_ACCESS_ERR);
    region.rereg(CHANGE_ACCESS, &domain, REMOTE | RELAXED_ORDERING).unwrap();
    assert_eq!(write(&domain, &buffer, region.keys.rkey), CompletionStatus::SUCCESS);
    region.rereg(CHANGE_ACCESS, &domain, LOCAL_WRITE).unwrap();
    assert_eq!(write(&domain, &buffer, region.keys.rkey), CompletionStatus::REM_ACCESS_ERR);
    region.deregister().unwrap();
    drop((domain, buffer));
    census.assert_unchanged();
}

#[test]
fn re_registration_changes_the_domain() {
    let census = Census::take();
    let (old, buffer) = (domain(), heap(SIZE));
    let new = ProtectionDomain::new(old.context()).unwrap();
    let region = RawRegion::new(&old, &buffer, REMOTE).unwrap();
    region.rereg(CHANGE_PD, &new, 0).unwrap();
    assert_eq!(write(&new, &buffer, region.keys.rkey), CompletionStatus::SUCCESS);
    assert_eq!(write(&old, &buffer, region.keys.rkey), CompletionStatus::REM_ACCESS_ERR);
    region.rereg(CHANGE_PD | CHANGE_ACCESS, &old, LOCAL_WRITE | REMOTE_WRITE).unwrap();
    assert_eq!(write(&old, &buffer, region.keys.rkey), CompletionStatus::SUCCESS);
    region.deregister().unwrap();
    drop((old, new, buffer));
    census.assert_unchanged();
}

#[test]
fn re_registration_refuses_the_rest() {
    let (domain, buffer) = (domain(), heap(SIZE));
    let region = RawRegion::new(&domain, &buffer, REMOTE).unwrap();
    for changes in 0..8 {
        let refused = errno(region.rereg(changes, &domain, REMOTE));
        let expected = match changes {
            0 => Some(libc::EINVAL),
            _ if changes & CHANGE_TRANSLATION != 0 => Some(libc::EOPNOTSUPP),
            _ => None,
        };
        assert_eq!(refused, expected, "changes {changes:#x}");
    }
    for flag in [FLUSH_PERSISTENT, ON_DEMAND, ZERO_BASED, HUGETLB] {
        let refused = errno(region.rereg(CHANGE_ACCESS, &domain, REMOTE | flag));
        assert_eq!(refused, Some(libc::EOPNOTSUPP), "flag {flag:#x}");
    }
    // Writing by a peer needs local write access, as at a registration.
    assert_eq!(errno(region.rereg(CHANGE_ACCESS, &domain, REMOTE_WRITE)), Some(libc::EINVAL));
    assert_eq!(write(&domain, &buffer, region.keys.rkey), CompletionStatus::SUCCESS, "nothing changed");

    let reading = RawRegion::new(&domain, &buffer, REMOTE_READ).unwrap();
    assert_eq!(errno(reading.rereg(CHANGE_ACCESS, &domain, REMOTE)), Some(libc::EACCES));
    assert_eq!(write(&domain, &buffer, reading.keys.rkey), CompletionStatus::REM_ACCESS_ERR);
}

#[test]
fn a_registration_takes_no_other_flag() {
    let (domain, buffer) = (domain(), heap(SIZE));
    for flag in [MW_BIND, ZERO_BASED, ON_DEMAND, HUGETLB, FLUSH_GLOBAL, FLUSH_PERSISTENT] {
        let refused = errno(RawRegion::new(&domain, &buffer, REMOTE | flag));
        assert_eq!(refused, Some(libc::EINVAL), "flag {flag:#x}");
    }
    drop(RawRegion::new(&domain, &buffer, REMOTE | RELAXED_ORDERING).unwrap());
}

/// 16 bytes for each page of each region. The buffer itself is charged to nobody, since it exists before.
#[test]
fn the_page_lists_are_charged_to_the_cgroup() {
    let census = Census::take();
    let (domain, buffer) = (domain(), udmabuf(PageKind::Base, 256 << 20));
    let cgroup = Cgroup::new(64 << 20);
    let mut regions = Vec::new();
    let refused = (0..200).find_map(|_| match RawRegion::new(&domain, &buffer.dmabuf, REMOTE) {
        Ok(region) => {
            regions.push(region);
            None
        }
        Err(error) => Some(error),
    });
    let error = refused.expect("200 regions, with lists of 1 MiB each, in a cgroup of 64 MiB");
    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
    assert!((32..64).contains(&regions.len()), "{} regions", regions.len());
    regions.pop().unwrap().deregister().unwrap();
    regions.push(RawRegion::new(&domain, &buffer.dmabuf, REMOTE).expect("room for one again"));
    drop((regions, cgroup, domain, buffer));
    census.assert_unchanged();
}

#[test]
fn a_memory_window_gives_a_part() {
    let census = Census::take();
    {
        let peers = Peers::new();
        let buffer = heap(SIZE);
        let region = RawRegion::new(&peers.domain, &buffer, REMOTE).unwrap();
        region.rereg(CHANGE_ACCESS, &peers.domain, REMOTE | MW_BIND).unwrap();
        let window = Window::new(&peers.domain);
        // The far side binds: a window of type 2 belongs to a queue pair.
        let rkey = window.bind(&peers.theirs.pair, &region, 8192, 4096);
        assert_eq!(peers.theirs.queue.wait(TIMEOUT).unwrap().status, CompletionStatus::SUCCESS);

        let bytes = pattern(4096, 5);
        let source = heap(4096);
        source.map().unwrap().write(0, &bytes).unwrap();
        let local = peers.register(&source);
        let to = |addr| Operation::Write { remote: RemoteAddr { addr, rkey: Rkey(rkey) } };
        peers.ours.succeed(to(8192), &[local.sge(..).unwrap()]);
        assert_same(&contents(&buffer)[8192..][..4096], &bytes, "the window");

        // Another program's window keeps the region.
        let refused = errno(region.try_deregister());
        assert_eq!(refused, Some(libc::EINVAL), "a bound window keeps the region");
        send_with_invalidate_to(&peers, rkey, CompletionStatus::SUCCESS);
        let refused = peers.ours.complete(to(8192), &[local.sge(..).unwrap()]).status;
        assert_eq!(refused, CompletionStatus::REM_ACCESS_ERR, "the window is gone");
        drop(window);
        region.deregister().unwrap();
    }
    census.assert_unchanged();
}

#[test]
fn a_window_needs_its_flag_and_its_range() {
    let (domain, buffer) = (domain(), heap(SIZE));
    let region = RawRegion::new(&domain, &buffer, REMOTE).unwrap();
    let bound = |address, length| {
        let peers = peers(&domain);
        let window = Window::new(&domain);
        window.bind(&peers.theirs.pair, &region, address, length);
        peers.theirs.queue.wait(TIMEOUT).unwrap().status
    };
    assert_eq!(bound(0, 4096), REFUSED_HERE, "no flag");
    region.rereg(CHANGE_ACCESS, &domain, REMOTE | MW_BIND).unwrap();
    assert_eq!(bound(0, SIZE), CompletionStatus::SUCCESS);
    assert_eq!(bound(SIZE - 4096, 4097), REFUSED_HERE, "past the end");
    region.deregister().unwrap();
}

#[test]
fn a_region_of_user_memory_cannot_be_invalidated() {
    let (domain, buffer) = (domain(), heap(SIZE));
    let region = RawRegion::new(&domain, &buffer, REMOTE).unwrap();
    let locally = peers(&domain);
    invalidate(&locally.ours.pair, region.keys.rkey);
    assert_eq!(locally.ours.queue.wait(TIMEOUT).unwrap().status, REFUSED_HERE);

    send_with_invalidate_to(&peers(&domain), region.keys.rkey, CompletionStatus::REM_INV_REQ_ERR);
    assert_eq!(
        write(&domain, &buffer, region.keys.rkey),
        CompletionStatus::SUCCESS,
        "the region still serves"
    );
    region.deregister().unwrap();
}

/// Sends an empty message that invalidates a key of the receiver's, and compares the receiver's status: it is the
/// receiver that fails, after it has acknowledged the message.
#[track_caller]
fn send_with_invalidate_to(peers: &Peers, rkey: u32, expected: CompletionStatus) {
    peers.theirs.pair.post_recv(5, &[]).unwrap();
    send_with_invalidate(&peers.ours.pair, rkey);
    assert_eq!(peers.theirs.queue.wait(TIMEOUT).unwrap().status, expected, "SEND with invalidate");
    peers.ours.queue.wait(TIMEOUT).unwrap();
}

/// One operation of newer providers after a WRITE of a pattern; returns the operation's status.
fn newer(domain: &ProtectionDomain, region: &RawRegion, operation: Newer, address: u64) -> CompletionStatus {
    const WR_ID: u64 = 0x6e65_7765_725f_6f70;
    let peers = peers(domain);
    allow_flush(&peers.theirs.pair);
    let source = heap(4096);
    source.map().unwrap().write(0, &pattern(4096, 9)).unwrap();
    let local = peers.register(&source);
    let remote = RemoteAddr { addr: 0, rkey: Rkey(region.keys.rkey) };
    let elements = [local.sge(..).unwrap()];
    peers.ours.pair.post(WorkRequest::new(WR_ID, Operation::Write { remote }, &elements).signaled()).unwrap();
    assert_eq!(peers.ours.queue.wait(TIMEOUT).unwrap().status, CompletionStatus::SUCCESS);
    post_newer(&peers.ours.pair, WR_ID, operation, address, region.keys.rkey);
    peers.ours.queue.wait(TIMEOUT).unwrap().status
}

#[test]
fn atomic_write_stores_eight_bytes() {
    let (domain, buffer) = (domain(), heap(SIZE));
    let region = RawRegion::new(&domain, &buffer, REMOTE).unwrap();
    let value = *b"8 bytes!";
    assert_eq!(newer(&domain, &region, Newer::AtomicWrite(value), 4104), CompletionStatus::SUCCESS);
    let mut expected = [pattern(4096, 9), vec![0; SIZE as usize - 4096]].concat();
    expected[4104..4112].copy_from_slice(&value);
    assert_same(&contents(&buffer), &expected, "all of the buffer");
    let misaligned = newer(&domain, &region, Newer::AtomicWrite(value), 4100);
    assert_eq!(misaligned, CompletionStatus::REM_INV_REQ_ERR);
    let past_the_end = newer(&domain, &region, Newer::AtomicWrite(value), SIZE);
    assert_eq!(past_the_end, CompletionStatus::REM_ACCESS_ERR);
}

#[test]
fn flush_needs_its_flag_and_is_never_persistent() {
    let (domain, buffer) = (domain(), heap(SIZE));
    let region = RawRegion::new(&domain, &buffer, REMOTE).unwrap();
    let global = Newer::Flush { kind: 1, length: 4096 };
    assert_eq!(newer(&domain, &region, global, 0), CompletionStatus::REM_ACCESS_ERR, "no flag");
    region.rereg(CHANGE_ACCESS, &domain, REMOTE | FLUSH_GLOBAL).unwrap();
    assert_eq!(newer(&domain, &region, global, 0), CompletionStatus::SUCCESS);
    assert_same(&contents(&buffer)[..4096], &pattern(4096, 9), "the flushed bytes");
    let persistent = Newer::Flush { kind: 2, length: 4096 };
    assert_eq!(newer(&domain, &region, persistent, 0), CompletionStatus::REM_ACCESS_ERR);
}
