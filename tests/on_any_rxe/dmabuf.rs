//! One imported dma-buf: identity, names, mode, CPU mapping.

use std::os::fd::{AsFd, OwnedFd};

use dma_sg::RangeError;
use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::dmabuf::{CpuAccess, Error};
use dmabuf_rdma::exporter::PageKind;

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap, udmabuf};
use crate::common::census::Census;
use crate::common::{assert_same, contents, pattern};

/// A buffer of the system heap whose descriptor is read-only.
pub fn read_only() -> DmaBuf {
    let heap = std::fs::File::options().read(true).write(true).open("/dev/dma_heap/system").unwrap();
    let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u32;
    let fd = rdma_sys_ext::dma_heap::alloc(heap.as_fd(), 64 << 10, flags).unwrap();
    DmaBuf::from_fd(fd).unwrap()
}

#[test]
fn identity_is_that_of_the_buffer_not_of_the_descriptor() {
    let (one, other) = (heap(4096), heap(4096));
    let again = one.try_clone().unwrap();
    assert_eq!(one.id(), again.id());
    assert_ne!(one.id(), other.id());
    let id = one.id();
    drop(one);
    let imported_again = DmaBuf::from_fd(again.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(imported_again.id(), id);
}

#[test]
fn size_and_exporter_are_what_was_asked_for() {
    let buffer = heap(5 << 20);
    assert_eq!((buffer.size(), buffer.exporter_name().unwrap().as_str()), (5 << 20, "system"));
    let buffer = udmabuf(PageKind::Base, 8192).dmabuf;
    assert_eq!((buffer.size(), buffer.exporter_name().unwrap().as_str()), (8192, "udmabuf"));
}

#[test]
fn a_buffer_can_be_named() {
    let buffer = heap(4096);
    assert_eq!(buffer.name().unwrap(), None);
    buffer.set_name("frames").unwrap();
    assert_eq!(buffer.name().unwrap().as_deref(), Some("frames"));
    let longest = "x".repeat(31);
    buffer.set_name(&longest).unwrap();
    assert_eq!(buffer.name().unwrap(), Some(longest));
    assert_refused!(buffer.set_name(&"x".repeat(32)), Error::InvalidName { .. });
    assert_refused!(buffer.set_name("a\0b"), Error::InvalidName { .. });
}

#[test]
fn the_cpu_mapping_copies_both_ways_and_outlives_the_buffer() {
    for kind in every_kind() {
        let buffer = (kind.allocate)(2 << 20).dmabuf;
        let mapping = buffer.map().unwrap();
        drop(buffer);
        let bytes = pattern(10_001, 5);
        // Odd offsets, across pages.
        mapping.write(4093, &bytes).unwrap();
        let mut seen = vec![0; bytes.len()];
        mapping.read(4093, &mut seen).unwrap();
        assert_same(&seen, &bytes, kind.name);
    }
}

#[test]
fn the_cpu_mapping_refuses_what_is_outside_and_the_wrong_direction() {
    let mapping = heap(8192).map().unwrap();
    let mut bytes = [0; 16];
    assert_refused!(
        mapping.read(8192 - 15, &mut bytes),
        Error::Range(RangeError::OutOfRange { size: 8192, .. })
    );
    assert_refused!(mapping.read(u64::MAX, &mut bytes), Error::Range(RangeError::OutOfRange { .. }));
    assert_refused!(mapping.write(0, &[]), Error::Range(RangeError::Empty { .. }));
    let reading = mapping.begin(CpuAccess::Read).unwrap();
    assert_refused!(reading.write(0, &bytes), Error::CpuAccessDirection { access: CpuAccess::Read });
    let writing = mapping.begin(CpuAccess::Write).unwrap();
    assert_refused!(writing.read(0, &mut bytes), Error::CpuAccessDirection { access: CpuAccess::Write });
}

#[test]
fn a_read_only_buffer_can_be_read_and_not_written() {
    let buffer = read_only();
    assert!(!buffer.is_writable());
    assert!(heap(4096).is_writable());
    let mapping = buffer.map().unwrap();
    let mut bytes = [1; 8];
    mapping.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 8], "a heap's memory begins as zeros");
    let message = assert_refused!(mapping.write(0, &bytes), Error::ReadOnly { .. });
    assert!(message.contains("DRM_RDWR"), "{message}");
}

#[test]
fn a_descriptor_round_trips() {
    let buffer = heap(4096);
    let id = buffer.id();
    let fd: OwnedFd = buffer.into();
    assert_eq!(DmaBuf::try_from(fd).unwrap().id(), id);
}

#[test]
fn nothing_is_left_of_a_buffer_and_its_mappings() {
    let census = Census::take();
    for kind in every_kind() {
        let buffer = (kind.allocate)(2 << 20).dmabuf;
        let (one, two) = (buffer.map().unwrap(), buffer.try_clone().unwrap().map().unwrap());
        one.write(0, b"seen").unwrap();
        let mut seen = [0; 4];
        two.read(0, &mut seen).unwrap();
        assert_eq!(&seen, b"seen");
        assert_eq!(contents(&buffer)[..4], *b"seen");
    }
    census.assert_unchanged();
}
