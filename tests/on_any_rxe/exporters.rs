//! The exporters that need no GPU: their buffers and their errors.

use dma_sg::RangeError;
use dmabuf_rdma::exporter::{DmaHeap, DumbBuffers, Error, Exporter, PageKind, Udmabuf};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::assert_refused;
use crate::common::buffers::{every_kind, four_ranges, memfd, udmabuf};
use crate::common::census::Census;
use crate::common::drm::card;
use crate::common::system::{Setting, huge_pages, unprivileged};
use crate::common::{assert_same, contents, pattern};

const SIZE_LIMIT: &str = "/sys/module/udmabuf/parameters/size_limit_mb";
const LIST_LIMIT: &str = "/sys/module/udmabuf/parameters/list_limit";

#[test]
fn every_kind_of_buffer_is_zeroed_writable_and_at_least_of_the_size() {
    for kind in every_kind() {
        for size in [1, 4096, (2 << 20) + 16384] {
            let size = if kind.name.contains("four ranges") {
                (size as u64).next_multiple_of(16384)
            } else {
                size as u64
            };
            let buffer = (kind.allocate)(size).dmabuf;
            assert!(
                buffer.size() >= size && buffer.size() < size + (2 << 20),
                "{}: {}",
                kind.name,
                buffer.size()
            );
            assert!(buffer.is_writable(), "{}", kind.name);
            assert!(contents(&buffer).iter().all(|byte| *byte == 0), "{} is not zeroed", kind.name);
        }
    }
}

#[test]
fn the_heaps_are_listed() {
    let heaps = DmaHeap::list().unwrap();
    assert!(heaps.contains(&"system".into()), "{heaps:?}");
    for heap in heaps {
        assert_eq!(DmaHeap::open(&heap).unwrap().name(), format!("dma-heap {heap}"));
    }
}

#[test]
fn the_ranges_of_a_udmabuf_are_in_order_in_buffer_and_mapping() {
    let allocation = four_ranges(64 << 10);
    let bytes = pattern(64 << 10, 11);
    allocation.dmabuf.map().unwrap().write(0, &bytes).unwrap();
    let backing = allocation.backing.unwrap();
    assert_eq!((backing.len(), backing.memfds().len()), (64 << 10, 4));
    for (number, memfd) in backing.memfds().enumerate() {
        let mut seen = vec![0; 16 << 10];
        let offset = [3, 0, 2, 1][number] * 4096;
        nix::sys::uio::pread(memfd, &mut seen, offset).unwrap();
        assert_same(&seen, &bytes[number * 16384..][..16384], "one of the memfds");
    }
    // SAFETY: the mapping is 64 KiB long, and nothing writes the buffer meanwhile.
    let mapped = unsafe { std::slice::from_raw_parts(backing.as_ptr(), 64 << 10).to_vec() };
    assert_same(&mapped, &bytes, "the mapping of all memfds");
}

#[test]
fn udmabuf_over_its_size_limit_names_parameter_and_value() {
    let _limit = Setting::new(SIZE_LIMIT, "2");
    assert_eq!(udmabuf(PageKind::Base, 2 << 20).dmabuf.size(), 2 << 20, "the limit is inclusive");
    let refused = Udmabuf::open().unwrap().allocate((2 << 20) + 1);
    let message = assert_refused!(
        refused,
        Error::UdmabufLimit { parameter: "size_limit_mb", value: 2, requested: 3, .. }
    );
    assert!(message.contains("size_limit_mb=2"), "{message}");
    let refused = Udmabuf::open().unwrap().from_memfds([(memfd(4 << 20), 0..4 << 20)]);
    assert_refused!(refused, Error::UdmabufLimit { parameter: "size_limit_mb", requested: 4, .. });
}

#[test]
fn udmabuf_over_its_list_limit_names_parameter_and_value() {
    let _limit = Setting::new(LIST_LIMIT, "3");
    let list = |count: u64| (0..count).map(|_| (memfd(4096), 0..4096));
    let device = Udmabuf::open().unwrap();
    assert_eq!(device.from_memfds(list(3)).unwrap().dmabuf.size(), 3 * 4096, "the limit is inclusive");
    let message = assert_refused!(
        device.from_memfds(list(4)),
        Error::UdmabufLimit { parameter: "list_limit", value: 3, requested: 4, .. }
    );
    assert!(message.contains("list_limit=3"), "{message}");
}

#[test]
fn an_empty_pool_of_huge_pages_is_named() {
    let _pool = huge_pages(0);
    let device = Udmabuf::open().unwrap().with_pages(PageKind::HUGE_2M);
    let message = assert_refused!(device.allocate(5 << 20), Error::HugePages { size: 0x60_0000, .. });
    assert!(message.contains("need 3 free huge pages") && message.contains("hugepages-2048kB"), "{message}");
}

#[test]
fn a_missing_exporter_says_how_to_get_it() {
    let message = assert_refused!(DmaHeap::open("no-such-heap"), Error::Missing { .. });
    assert!(message.starts_with("/dev/dma_heap/no-such-heap is missing:"), "{message}");
    assert_refused!(DumbBuffers::open("/dev/dri/card63"), Error::Missing { .. });
    card("vgem");
    let message = assert_refused!(DumbBuffers::by_driver("no-such-driver"), Error::Missing { .. });
    assert!(message.starts_with("a DRM card of driver no-such-driver is missing: the cards"), "{message}");
    assert!(message.contains("vgem"), "{message}");
    assert_refused!(DumbBuffers::open("/dev/null"), Error::Unusable { .. });
}

#[test]
fn a_forbidden_exporter_says_how_to_get_the_permission() {
    card("vgem");
    let (udmabuf, heap, card) = unprivileged(|| {
        let card = DumbBuffers::by_driver("vgem").map(drop);
        (Udmabuf::open().map(drop), DmaHeap::open("system").map(drop), card)
    });
    let message = assert_refused!(udmabuf, Error::NotPermitted { .. });
    assert!(
        message.contains("no permission to open /dev/udmabuf: run as root, or join the group"),
        "{message}"
    );
    assert_refused!(heap, Error::NotPermitted { .. });
    let message = assert_refused!(card, Error::NotPermitted { .. });
    assert!(message.contains("/dev/dri/card") && message.contains("video or render"), "{message}");
}

#[test]
fn impossible_sizes_are_refused() {
    let heap = DmaHeap::open("system").unwrap();
    let devices: [&dyn Exporter; 3] = [&Udmabuf::open().unwrap(), &heap, &card("vgem")];
    for device in devices {
        assert_refused!(device.allocate(0), Error::Range(RangeError::Empty { .. }));
        assert_refused!(device.allocate(u64::MAX), Error::SizeTooLarge { size: u64::MAX });
    }
    let huge = Udmabuf::open().unwrap().with_pages(PageKind::Huge { size: 3 << 20 });
    assert_refused!(huge.allocate(1 << 20), Error::HugePageSize { size: 0x30_0000 });
    // The kernel would kill processes to get that much.
    let message = assert_refused!(heap.allocate(1 << 50), Error::OutOfMemory { available: Some(_), .. });
    assert!(message.starts_with("dma-heap system cannot allocate 1125899906842624 bytes"), "{message}");
}

#[test]
fn refusals_leave_nothing_behind() {
    let census = Census::take();
    let _limit = Setting::new(SIZE_LIMIT, "2");
    for _ in 0..20 {
        Udmabuf::open().unwrap().allocate(4 << 20).unwrap_err();
        let plain = memfd_create(c"unsealable", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&plain, 4096).unwrap();
        assert_refused!(Udmabuf::open().unwrap().from_memfds([(plain, 0..4096)]), Error::UnfitMemfd { .. });
        DmaHeap::open("system").unwrap().allocate(1 << 50).unwrap_err();
    }
    census.assert_unchanged();
}
