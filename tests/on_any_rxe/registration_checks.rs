//! What a registration refuses before any system call, on any device.

use std::ops::Bound;

use dma_sg::RangeError;
use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{Access, MemoryRegion, RegisterError};
use dmabuf_rdma::{Iova, Umem, host};

use super::dmabuf::read_only;
use crate::assert_refused;
use crate::common::buffers::{heap, udmabuf};
use crate::common::census::Census;
use crate::common::peers::domain;

#[test]
fn ranges_outside_the_buffer() {
    const SIZE: u64 = 1 << 20;
    let (domain, buffer) = (domain(), heap(SIZE));
    let builder = MemoryRegion::builder(&domain, &buffer);
    let refused = |range: (Bound<u64>, Bound<u64>)| match builder.range(range).register() {
        Err(RegisterError::Range(error)) => error,
        other => panic!("expected a RangeError, got {other:?}"),
    };
    let (from, to) = (Bound::Included, Bound::Excluded);
    let out_of_range = |offset, length| RangeError::OutOfRange { offset, length, size: SIZE };
    let past_the_end = refused((from(0), to(SIZE + 1)));
    assert_eq!(past_the_end, out_of_range(0, SIZE + 1));
    let message = "1048577 bytes at offset 0 do not lie within 1048576 bytes: choose a range inside";
    assert_eq!(past_the_end.to_string(), message);
    assert_eq!(refused((from(SIZE), to(SIZE + 1))), out_of_range(SIZE, 1));
    assert_eq!(refused((from(u64::MAX - 4095), to(u64::MAX))), out_of_range(u64::MAX - 4095, 4095));
    // The end of the range does not fit in 64 bits.
    assert_eq!(refused((from(4096), Bound::Included(u64::MAX))), out_of_range(4096, u64::MAX - 4096));
    assert_eq!(refused((from(4096), to(4096))), RangeError::Empty { offset: 4096 });
    assert_eq!(refused((from(SIZE), Bound::Unbounded)), RangeError::Empty { offset: SIZE });
    assert_eq!(refused((from(8192), to(4096))), RangeError::Inverted { start: 8192, end: 4096 });
}

#[test]
fn iovas_that_overflow_or_are_not_congruent() {
    let (domain, buffer) = (domain(), heap(1 << 20));
    let at = |offset, iova| {
        let range = offset..offset + 8192;
        MemoryRegion::builder(&domain, &buffer).range(range).iova(Iova(iova)).register()
    };
    assert_refused!(at(0, u64::MAX - 4095), RegisterError::IovaOverflow { length: 8192, .. });
    let message = assert_refused!(at(0x1012, 0x7000), RegisterError::IovaNotCongruent { .. });
    assert!(message.contains("in that page, 0x7012 fits"), "{message}");
    let umem = Umem::new(&buffer, 0x1012..0x3012, Iova(0x7012)).unwrap();
    assert_eq!((umem.offset(), umem.len(), umem.iova()), (0x1012, 8192, Iova(0x7012)));
}

#[test]
fn access_flags_that_are_not_permitted() {
    let (domain, buffer) = (domain(), heap(4096));
    let with = |access| MemoryRegion::builder(&domain, &buffer).access(access).register();
    for bit in [4, 5, 6, 7, 8, 9, 31] {
        // MW_BIND, ZERO_BASED, ON_DEMAND, HUGETLB, FLUSH_GLOBAL, FLUSH_PERSISTENT, and an unknown one.
        let flag = Access::from_bits_retain(1 << bit);
        assert_refused!(with(Access::REMOTE | flag), RegisterError::AccessNotPermitted { flags, .. } if *flags == flag);
    }
    assert_refused!(with(Access::REMOTE_WRITE), RegisterError::LocalWriteMissing { .. });
    assert_refused!(
        with(Access::REMOTE_ATOMIC | Access::REMOTE_READ),
        RegisterError::LocalWriteMissing { .. }
    );
}

#[test]
fn write_access_to_a_read_only_buffer() {
    let (domain, buffer) = (domain(), read_only());
    for access in [Access::LOCAL_WRITE, Access::REMOTE, Access::LOCAL_WRITE | Access::REMOTE_WRITE] {
        let refused = MemoryRegion::builder(&domain, &buffer).access(access).register();
        let message = assert_refused!(refused, RegisterError::ReadOnlyBuffer { .. });
        assert!(message.starts_with("Access(LOCAL_WRITE"), "{message}");
    }
}

#[test]
fn host_pages_of_another_buffer_and_no_path() {
    let (domain, ours, other) = (domain(), udmabuf(PageKind::Base, 4096), udmabuf(PageKind::Base, 4096));
    let builder = || MemoryRegion::builder(&domain, &ours.dmabuf);
    let backing = other.backing.as_ref().unwrap();
    assert_refused!(
        builder().host_mapping(backing).register(),
        RegisterError::Host(host::Error::ForeignBacking)
    );
    let none = assert_refused!(builder().paths(&[]).register(), RegisterError::NoPath { .. });
    assert!(none.contains("none is allowed"), "{none}");
}

#[test]
fn refusals_leave_nothing_behind() {
    let census = Census::take();
    for _ in 0..50 {
        let (domain, buffer) = (domain(), heap(4096));
        let builder = || MemoryRegion::builder(&domain, &buffer);
        builder().range(0..0).register().unwrap_err();
        builder().access(Access::REMOTE_WRITE).register().unwrap_err();
        builder().paths(&[]).register().unwrap_err();
    }
    census.assert_unchanged();
}
