//! What is refused before anything is posted; the connection stays usable.

use dmabuf_rdma::Error;
use dmabuf_rdma::error::TransferError;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::sg::DmaSgList;
use dmabuf_rdma::transfer::{ConnectionOptions, LocalRange, RemoteRegion};

use crate::assert_refused;
use crate::common::wire::Wire;

#[test]
fn what_cannot_be_done_is_refused_before_it_is_posted() {
    let Wire { mut near, far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let remote = target.remote();
    let one = &mut near.connection;

    let short = LocalRange::from(&source).range(0, 4096).unwrap();
    let message = assert_refused!(
        one.write(short, &remote),
        Error::Transfer(TransferError::LengthMismatch { local: 4096, remote: 0x10_0000, .. })
    );
    assert!(message.starts_with("Write of 4096 local bytes"), "{message}");
    // Past the remote end.
    assert_refused!(remote.range((1 << 20) - 5, 6), Error::OutOfRange { size: 0x10_0000, .. });
    assert_refused!(remote.range(u64::MAX, 2), Error::OutOfRange { .. });

    // What the peer did not permit, by its own description.
    let readable = RemoteRegion::new(remote.runs().to_vec(), Access::REMOTE_READ, remote.buffer()).unwrap();
    let message = assert_refused!(
        one.write(&source, &readable),
        Error::Transfer(TransferError::RemoteAccessMissing { .. })
    );
    assert!(message.contains("REMOTE_WRITE") && message.contains("REMOTE_READ"), "{message}");
    one.read(&source, &readable).unwrap();

    // Local memory that the device may not write, or that is of another domain.
    let read_only = MemoryRegion::builder(&near.domain, &ours).register().unwrap();
    let refused = one.read(&read_only, &remote);
    assert_refused!(refused, Error::Transfer(TransferError::LocalWriteMissing { offset: 0, .. }));
    assert_refused!(one.recv(&read_only), Error::Transfer(TransferError::LocalWriteMissing { .. }));
    let mixed = LocalRange::of([&source, &target]).unwrap();
    let refused = one.send(mixed);
    assert_refused!(refused, Error::Transfer(TransferError::ForeignRegion { offset: 0x10_0000 }));

    // Atomics on something else than an aligned u64.
    let four = LocalRange::from(&source).range(0, 4).unwrap();
    assert_refused!(one.fetch_add(four, remote.range(0, 4).unwrap(), 1), Error::InvalidAtomic { .. });
    let eight = LocalRange::from(&source).range(0, 8).unwrap();
    assert_refused!(one.fetch_add(eight, remote.range(4, 8).unwrap(), 1), Error::InvalidAtomic { .. });

    // Pieces outside of their region.
    let list = DmaSgList::from_runs([dmabuf_rdma::DmaSg { addr: (1 << 20) - 4, len: 5 }]).unwrap();
    assert_refused!(LocalRange::gather(&source, &list), Error::OutOfRange { .. });
    drop(theirs);
    assert!(one.is_usable());
    one.write(&source, &remote).unwrap();
}

#[test]
fn a_scattered_message_is_refused_where_both_sides_must_cut_alike() {
    let mut options = ConnectionOptions { message: 64 << 10, ..Default::default() };
    options.queue_pair.max_sge = 2;
    let Wire { mut near, far } = Wire::with(options);
    let ((_ours, source), (_theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let rows = (0..3).map(|row| dmabuf_rdma::DmaSg { addr: 8192 * row, len: 1000 });
    let list = DmaSgList::from_runs(rows).unwrap();
    let pieces = || LocalRange::gather(&source, &list).unwrap();
    assert_refused!(
        near.connection.send(pieces()),
        Error::Transfer(TransferError::TooScattered { offset: 0, length: 3000, max_sge: 2, .. })
    );
    // A WRITE is cut where this side likes.
    let remote = target.remote();
    near.connection.write(pieces(), remote.range(0, 3000).unwrap()).unwrap();
}
