//! Requests that are refused before anything is posted. The connection stays usable.

use dma_sg::RangeError;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::transfer::{ConnectionOptions, Error, RequestError};
use dmabuf_rdma::verbs;
use dmabuf_rdma::{RegionSlice, RemoteRegion};

use crate::assert_refused;
use crate::common::wire::Wire;

#[test]
fn impossible_requests_are_refused_before_they_are_posted() {
    let Wire { mut near, far } = Wire::new();
    let ((ours, source), (theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let remote = target.remote();
    let connection = &mut near.connection;

    let short = source.slice(..4096).unwrap();
    let message = assert_refused!(
        connection.write(short, &remote).and_then(|transfer| transfer.wait()),
        Error::Request(RequestError::LengthMismatch { local: 4096, remote: 0x10_0000, .. })
    );
    assert!(message.starts_with("Write: block 0 has 4096 bytes here"), "{message}");
    // Past the ends of both sides.
    assert_refused!(
        remote.slice((1 << 20) - 5..=1 << 20),
        RangeError::OutOfRange { size: 0x10_0000, length: 6, .. }
    );
    assert_refused!(remote.slice(u64::MAX..=u64::MAX), RangeError::OutOfRange { .. });
    assert_refused!(
        source.slice((1 << 20) - 4..=1 << 20),
        RangeError::OutOfRange { size: 0x10_0000, length: 5, .. }
    );

    // The peer's description does not permit it.
    let readable = RemoteRegion::new(remote.runs().to_vec(), Access::REMOTE_READ, remote.buffer()).unwrap();
    let message = assert_refused!(
        connection.write(&source, &readable).and_then(|transfer| transfer.wait()),
        Error::Request(RequestError::RemoteAccessMissing { .. })
    );
    assert!(message.contains("REMOTE_WRITE") && message.contains("REMOTE_READ"), "{message}");
    connection.read(&source, &readable).unwrap().wait().unwrap();

    // Local memory that the device may not write, or in another protection domain.
    let read_only = MemoryRegion::builder(&near.domain, &ours).register().unwrap();
    let refused = connection.read(&read_only, &remote).and_then(|transfer| transfer.wait());
    assert_refused!(refused, Error::Request(RequestError::LocalAccessMissing { offset: 0, .. }));
    assert_refused!(
        connection.recv(&read_only).and_then(|transfer| transfer.wait()),
        Error::Request(RequestError::LocalAccessMissing { .. })
    );
    let mixed = RegionSlice::concat([&source, &target]).unwrap();
    assert_refused!(
        connection.send(mixed).and_then(|transfer| transfer.wait()),
        Error::Request(RequestError::ForeignRegion { offset: 0x10_0000 })
    );

    // Atomics need an aligned u64.
    let (four, eight) = (source.slice(..4).unwrap(), source.slice(..8).unwrap());
    for (local, place) in [(four, 0..4), (eight, 4..12)] {
        let refused =
            connection.fetch_add(local, remote.slice(place).unwrap(), 1).and_then(|transfer| transfer.wait());
        assert_refused!(refused, Error::Verbs(verbs::Error::InvalidAtomic { .. }));
    }

    drop(theirs);
    assert!(connection.is_usable());
    connection.write(&source, &remote).unwrap().wait().unwrap();
}

#[test]
fn a_scattered_message_is_refused_only_where_both_sides_must_cut_alike() {
    let mut options = ConnectionOptions::default().message_size(64 << 10);
    options.queue_pair.max_sge = 2;
    let Wire { near, far } = Wire::with(options);
    let ((_ours, source), (_theirs, target)) = (near.filled(1 << 20, 1), far.filled(1 << 20, 2));
    let rows = [0, 8192, 16384].map(|start| source.slice(start..start + 1000).unwrap());
    let rows = RegionSlice::concat(rows).unwrap();
    assert_refused!(
        near.connection.send(&rows).and_then(|transfer| transfer.wait()),
        Error::Request(RequestError::TooScattered { offset: 0, length: 3000, max_sge: 2, .. })
    );
    // The messages of a WRITE are cut on this side alone.
    near.connection.write(&rows, target.remote().slice(..3000).unwrap()).unwrap().wait().unwrap();
}
