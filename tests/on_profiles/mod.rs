//! What the library says and does on other devices, which the guest's provider pretends to be. `provider/profiles.c`
//! has what each of them reports and refuses. The sources named here are those of Linux 6.12 and rdma-core 55, unless
//! another version is named.

mod devices;
mod doctor;
mod faulty;
mod limits;

use dmabuf_rdma::Connection;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path};
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::ProtectionDomain;

use crate::common::buffers::heap;
use crate::common::{assert_same, contents, pattern};

/// What the connections and regions of these tests can do without atomics.
const READ_AND_WRITE: Access = Access::LOCAL_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_WRITE);

/// Two connected ends in one domain, so that a device that refuses a request does not flush its own.
#[track_caller]
fn connected(domain: &ProtectionDomain, options: ConnectionOptions) -> [Connection; 2] {
    let ends = [(); 2].map(|()| Connection::new(domain, options).expect("connection"));
    ends[0].connect(&ends[1].endpoint()).expect("connect");
    ends[1].connect(&ends[0].endpoint()).expect("connect");
    ends
}

/// Writes `length` bytes through the path Verbs into another buffer, and reads them back if `read`.
#[track_caller]
fn bytes_move(domain: &ProtectionDomain, connection: &mut Connection, length: u64, read: bool) {
    let [(ours, source), (theirs, target), (back, into)] = [1, 2, 3].map(|seed| {
        let buffer = heap(length.next_multiple_of(4096));
        buffer.map().unwrap().write(0, &pattern(buffer.size() as usize, seed)).unwrap();
        let region = MemoryRegion::builder(domain, &buffer).access(READ_AND_WRITE).register().unwrap();
        assert_eq!(region.path(), Path::Verbs);
        (buffer, region)
    });
    let expected = contents(&ours)[..length as usize].to_vec();
    let there = target.remote();
    let there = there.slice(..length).unwrap();
    connection.write(source.slice(..length).unwrap(), &there).unwrap().wait().unwrap();
    assert_same(&contents(&theirs)[..length as usize], &expected, "written");
    if read {
        connection.read(into.slice(..length).unwrap(), &there).unwrap().wait().unwrap();
        assert_same(&contents(&back)[..length as usize], &expected, "read back");
    }
}
