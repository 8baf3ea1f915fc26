//! What a registration refuses before any system call, whatever the device.

use dmabuf_rdma::exporter::Pages;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::{Error, Iova, Umem};

use super::dmabuf::read_only;
use crate::assert_refused;
use crate::common::buffers::{heap, udmabuf};
use crate::common::census::Census;
use crate::common::peers::domain;

#[test]
fn ranges_that_are_not_in_the_buffer() {
    let (domain, buffer) = (domain(), heap(1 << 20));
    let range = |offset, length| MemoryRegion::builder(&domain, &buffer).range(offset, length).register();
    assert_refused!(range(4096, 0), Error::ZeroLength { offset: 4096 });
    assert_refused!(range(0, (1 << 20) + 1), Error::OutOfRange { size: 0x10_0000, .. });
    assert_refused!(range(1 << 20, 1), Error::OutOfRange { .. });
    let message = assert_refused!(range(u64::MAX - 4095, 8192), Error::OutOfRange { .. });
    assert_eq!(
        message,
        "a range of 8192 bytes at offset 18446744073709547520 does not lie within 1048576 bytes"
    );
}

#[test]
fn iovas_that_overflow_or_lie_elsewhere_in_their_page() {
    let (domain, buffer) = (domain(), heap(1 << 20));
    let at = |offset, iova| {
        MemoryRegion::builder(&domain, &buffer).range(offset, 8192).iova(Iova(iova)).register()
    };
    assert_refused!(at(0, u64::MAX - 4095), Error::IovaOverflow { length: 8192, .. });
    let message = assert_refused!(at(0x1012, 0x7000), Error::IovaNotCongruent { .. });
    assert!(message.contains("in that page, 0x7012 fits"), "{message}");
    Umem::new(&buffer, 0x1012, 8192, Iova(0x7012)).unwrap();
}

#[test]
fn access_flags_that_are_not_permitted() {
    let (domain, buffer) = (domain(), heap(4096));
    let with = |access| MemoryRegion::builder(&domain, &buffer).access(access).register();
    for bit in [4, 5, 6, 7, 8, 9, 31] {
        // MW_BIND, ZERO_BASED, ON_DEMAND, HUGETLB, FLUSH_GLOBAL, FLUSH_PERSISTENT, and an unknown one.
        let flag = Access::from_bits_retain(1 << bit);
        assert_refused!(with(Access::REMOTE | flag), Error::AccessNotPermitted { flags } if *flags == flag);
    }
    assert_refused!(with(Access::REMOTE_WRITE), Error::LocalWriteMissing { .. });
    assert_refused!(with(Access::REMOTE_ATOMIC | Access::REMOTE_READ), Error::LocalWriteMissing { .. });
}

#[test]
fn write_access_to_a_read_only_buffer() {
    let (domain, buffer) = (domain(), read_only());
    for access in [Access::LOCAL_WRITE, Access::REMOTE, Access::LOCAL_WRITE | Access::REMOTE_WRITE] {
        let refused = MemoryRegion::builder(&domain, &buffer).access(access).register();
        let message = assert_refused!(refused, Error::ReadOnlyBuffer { .. });
        assert!(message.starts_with("Access(LOCAL_WRITE"), "{message}");
    }
}

#[test]
fn host_pages_of_another_buffer_and_no_path_at_all() {
    let (domain, ours, other) = (domain(), udmabuf(Pages::Base, 4096), udmabuf(Pages::Base, 4096));
    let builder = || MemoryRegion::builder(&domain, &ours.dmabuf);
    let backing = other.backing.as_ref().unwrap();
    assert_refused!(builder().host_mapping(backing).register(), Error::ForeignBacking);
    assert_refused!(builder().paths(&[]).register(), Error::NoPath);
}

#[test]
fn refusals_leave_nothing_behind() {
    let census = Census::take();
    for _ in 0..50 {
        let (domain, buffer) = (domain(), heap(4096));
        let builder = || MemoryRegion::builder(&domain, &buffer);
        builder().range(0, 0).register().unwrap_err();
        builder().access(Access::REMOTE_WRITE).register().unwrap_err();
        builder().paths(&[]).register().unwrap_err();
    }
    census.assert_unchanged();
}
