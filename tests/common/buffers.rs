//! Buffers of every exporter.

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::udmabuf::Piece;
use dmabuf_rdma::exporter::{Allocation, DmaHeap, Exporter, Pages, Udmabuf};
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
pub fn udmabuf(pages: Pages, size: u64) -> Allocation {
    Udmabuf::open().and_then(|device| device.with_pages(pages).allocate(size)).expect("udmabuf")
}

/// A udmabuf of ranges of four memfds that do not begin at 0, in an order of their own.
#[track_caller]
pub fn pieces(size: u64) -> Allocation {
    assert!(size.is_multiple_of(4 * 4096));
    let piece = |number: u64| {
        let memfd =
            memfd_create(c"piece", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).expect("memfd");
        nix::unistd::ftruncate(&memfd, (size + (64 << 10)) as i64).expect("ftruncate");
        Piece { memfd, offset: number * 4096, length: size / 4 }
    };
    let device = Udmabuf::open().expect("udmabuf");
    device.from_pieces([3, 0, 2, 1].map(piece).into()).expect("a udmabuf of pieces")
}

/// A kind of buffer that the tests go through.
pub struct Kind {
    pub name: &'static str,
    pub allocate: fn(u64) -> Allocation,
    /// What must be in force while such a buffer is made and lives.
    _settings: Option<Setting>,
}

/// Every exporter whose memory has struct pages, with each layout it can have.
pub fn every_kind() -> Vec<Kind> {
    udmabuf_kinds().into_iter().chain(driver_kinds()).collect()
}

/// Buffers of memory that a driver owns.
pub fn driver_kinds() -> Vec<Kind> {
    let plain = |name, allocate| Kind { name, allocate, _settings: None };
    vec![
        plain("dma-heap system", |size| Allocation { dmabuf: heap(size), backing: None }),
        plain("vgem", |size| card("vgem").allocate(size).expect("vgem")),
        plain("virtio_gpu", |size| card("virtio_gpu").allocate(size).expect("virtio_gpu")),
    ]
}

/// udmabufs of every kind of page.
pub fn udmabuf_kinds() -> Vec<Kind> {
    vec![
        Kind { name: "udmabuf", allocate: |size| udmabuf(Pages::Base, size), _settings: None },
        Kind { name: "udmabuf of four pieces", allocate: pieces, _settings: None },
        Kind {
            name: "udmabuf, transparent huge pages",
            allocate: |size| udmabuf(Pages::Transparent, size),
            _settings: Some(transparent_huge_pages()),
        },
        Kind {
            name: "udmabuf, 2 MiB huge pages",
            allocate: |size| udmabuf(Pages::HUGE_2M, size),
            _settings: Some(huge_pages(16)),
        },
    ]
}
