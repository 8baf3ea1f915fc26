//! Buffers of every exporter.

use std::os::fd::OwnedFd;

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::{Allocation, DmaHeap, Exporter, PageKind, Udmabuf};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::drm::card;
use super::system::{Setting, huge_pages, transparent_huge_pages};

/// A buffer of the system heap.
#[track_caller]
pub fn heap(size: u64) -> DmaBuf {
    DmaHeap::open("system").and_then(|heap| heap.allocate(size)).expect("system heap").dmabuf
}

/// A udmabuf with its host pages.
#[track_caller]
pub fn udmabuf(pages: PageKind, size: u64) -> Allocation {
    Udmabuf::open().and_then(|device| device.with_pages(pages).allocate(size)).expect("udmabuf")
}

/// A memfd that can be sealed, with no page yet.
#[track_caller]
pub fn memfd(size: u64) -> OwnedFd {
    let memfd = memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).expect("memfd");
    nix::unistd::ftruncate(&memfd, size as i64).expect("ftruncate");
    memfd
}

/// A udmabuf of one range from each of four memfds, at different offsets and in a shuffled order.
#[track_caller]
pub fn four_ranges(size: u64) -> Allocation {
    assert!(size.is_multiple_of(4 * 4096));
    let range = |number: u64| {
        let memfd = memfd(size + (64 << 10));
        let start = number * 4096;
        (memfd, start..start + size / 4)
    };
    let device = Udmabuf::open().expect("udmabuf");
    device.from_memfds([3, 0, 2, 1].map(range)).expect("a udmabuf of four ranges")
}

/// A kind of buffer to test with.
pub struct Kind {
    pub name: &'static str,
    pub allocate: fn(u64) -> Allocation,
    /// A setting that must hold while such a buffer exists.
    _settings: Option<Setting>,
}

/// All kinds of buffers whose memory has struct pages.
pub fn every_kind() -> Vec<Kind> {
    udmabuf_kinds().into_iter().chain(driver_kinds()).collect()
}

/// Buffers of kernel drivers.
pub fn driver_kinds() -> Vec<Kind> {
    let plain = |name, allocate| Kind { name, allocate, _settings: None };
    vec![
        plain("dma-heap system", |size| Allocation { dmabuf: heap(size), backing: None }),
        plain("vgem", |size| card("vgem").allocate(size).expect("vgem")),
        plain("virtio_gpu", |size| card("virtio_gpu").allocate(size).expect("virtio_gpu")),
    ]
}

/// udmabufs of every page size and layout.
pub fn udmabuf_kinds() -> Vec<Kind> {
    vec![
        Kind { name: "udmabuf", allocate: |size| udmabuf(PageKind::Base, size), _settings: None },
        Kind { name: "udmabuf of four ranges", allocate: four_ranges, _settings: None },
        Kind {
            name: "udmabuf, transparent huge pages",
            allocate: |size| udmabuf(PageKind::Transparent, size),
            _settings: Some(transparent_huge_pages()),
        },
        Kind {
            name: "udmabuf, 2 MiB huge pages",
            allocate: |size| udmabuf(PageKind::HUGE_2M, size),
            _settings: Some(huge_pages(16)),
        },
    ]
}
