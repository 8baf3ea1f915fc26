//! A dma-buf as a device sees it, proved by reading the memory that the list names.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

use dma_sg::DmaSgList;
use dma_sg::device_view::{self, DeviceView, DmaDevice};
use dma_sg::pci;
use dmabuf_rdma::exporter::PageKind;

use crate::assert_refused;
use crate::common::buffers::{every_kind, heap, udmabuf};
use crate::common::census::{Census, dma_bufs};
use crate::common::kcore::Kcore;
use crate::common::leaks;
use crate::common::peers::{Peers, device};
use crate::common::system::{driven_by, modprobe, run, unprivileged, without_capabilities};
use crate::common::{assert_same, pattern};

// Past the checks of the crate.
#[path = "../../dma-sg/src/device_view/sys.rs"]
mod sys;

const SIZE: u64 = 6 << 20;

/// What is in the memory that a list names.
fn memory(kcore: &Kcore, list: &DmaSgList) -> Vec<u8> {
    kcore.gather(list.runs().iter().map(|run| (run.addr, run.len)))
}

#[test]
fn the_memory_that_a_list_names_has_every_byte_that_a_peer_wrote() {
    modprobe("dma_sg");
    let kcore = Kcore::open();
    let rdma = device();
    let address = driven_by("virtio-pci")[0];
    for kind in every_kind() {
        let peers = Peers::new();
        let subject = (kind.allocate)(SIZE);
        let size = subject.dmabuf.size();
        let other = udmabuf(PageKind::Base, size);
        let (source, target) = (peers.register(&other.dmabuf), peers.register(&subject.dmabuf));
        let write = |seed| {
            let put = pattern(size as usize, seed);
            other.dmabuf.map().unwrap().write(0, &put).unwrap();
            peers.write(&source, &target);
            put
        };
        let put = write(51);
        // None of these is behind an IOMMU here, so each list is of physical addresses.
        let devices = [DmaDevice::Untranslated, DmaDevice::Rdma(rdma.name()), DmaDevice::Pci(address)];
        let views = devices.map(|device| DeviceView::new(&subject.dmabuf, device).unwrap());
        let lists = views.each_ref().map(|view| view.list().unwrap());
        for (device, list) in devices.iter().zip(&lists) {
            let what = format!("{} for {device}", kind.name);
            assert_eq!(list.total_len(), size, "{what}");
            assert_same(&memory(&kcore, list), &put, &what);
        }
        // The views hold the memory in its place: what is written later is where they said.
        let put = write(52);
        assert_same(&memory(&kcore, &lists[0]), &put, &format!("{}, later", kind.name));
        assert!(views.iter().all(|view| view.is_valid()));
    }
}

#[test]
fn huge_pages_are_few_and_long_runs() {
    modprobe("dma_sg");
    for kind in every_kind().iter().filter(|kind| kind.name.contains("huge pages")) {
        let subject = (kind.allocate)(SIZE);
        let list = DeviceView::new(&subject.dmabuf, DmaDevice::Untranslated).unwrap().list().unwrap();
        assert!(list.runs().len() <= 3, "{}: {} runs of 3 huge pages", kind.name, list.runs().len());
        assert!(list.runs().iter().all(|run| run.addr % (2 << 20) == 0), "{}", kind.name);
    }
}

#[test]
fn a_list_is_read_in_batches_of_any_size() {
    modprobe("dma_sg");
    let buffer = crate::common::buffers::four_ranges(1 << 20).dmabuf;
    let view = DeviceView::new(&buffer, DmaDevice::Untranslated).unwrap();
    let whole = view.list().unwrap();
    let (_, total) = sys::read(view.as_fd(), 0, &mut []).unwrap();
    assert_eq!(total, whole.runs().len() as u64);
    assert!(total >= 2, "four memfds in another order are not one run");
    for size in [1, 3, 1000] {
        let mut seen = Vec::new();
        let mut batch = vec![sys::Entry::default(); size];
        loop {
            let (count, _) = sys::read(view.as_fd(), seen.len() as u64, &mut batch).unwrap();
            seen.extend(batch[..count].iter().map(|entry| (entry.addr, entry.len)));
            if count < size {
                break;
            }
        }
        let expected: Vec<_> = whole.runs().iter().map(|run| (run.addr, run.len)).collect();
        assert_eq!(seen, expected, "in batches of {size}");
    }
    let past = sys::read(view.as_fd(), total + 1, &mut [sys::Entry::default()]);
    assert_eq!(past.unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

fn users() -> u32 {
    let text = fs::read_to_string("/sys/module/dma_sg/refcnt").expect("refcnt");
    text.trim().parse().expect("a number")
}

#[test]
fn killing_the_holder_of_a_view_leaves_nothing() {
    modprobe("dma_sg");
    let census = Census::take();
    let (users_before, buffers_before) = (users(), dma_bufs());
    let view = DeviceView::new(heap(SIZE), DmaDevice::Untranslated).unwrap();
    let holder = Command::new("sleep").arg("1000").stdin(Stdio::from(OwnedFd::from(view))).spawn();
    let mut holder = holder.expect("sleep");
    assert_eq!((users(), dma_bufs()), (users_before + 1, buffers_before + 1), "held by the child alone");
    let unload = Command::new("rmmod").arg("dma_sg").stderr(Stdio::null()).status().unwrap();
    assert!(!unload.success(), "the module went while a view was open");
    holder.kill().unwrap();
    holder.wait().unwrap();
    census.assert_unchanged();
    leaks::assert_none();
    assert_eq!(users(), users_before);
}

#[test]
fn a_thousand_views_leave_nothing() {
    modprobe("dma_sg");
    let kinds = every_kind();
    let buffers: Vec<_> = kinds.iter().map(|kind| (kind.allocate)(256 << 10)).collect();
    let address = driven_by("virtio-pci")[0];
    let census = Census::take();
    for cycle in 0..1000 {
        let buffer = &buffers[cycle % buffers.len()].dmabuf;
        let device = if cycle % 2 == 0 { DmaDevice::Untranslated } else { DmaDevice::Pci(address) };
        let view = DeviceView::new(buffer, device).unwrap();
        assert_eq!(view.list().unwrap().total_len(), buffer.size());
    }
    census.assert_unchanged();
    leaks::assert_none();
}

/// The module's own answer, past the checks of the library.
fn errno(dmabuf: BorrowedFd<'_>, kind: u32, name: &std::ffi::CStr) -> Option<i32> {
    let node = File::open("/dev/dma_sg").unwrap();
    sys::map(node.as_fd(), dmabuf, kind, name).unwrap_err().raw_os_error()
}

#[test]
fn what_is_no_dma_buf_or_no_device_is_refused() {
    modprobe("dma_sg");
    let census = Census::take();
    let buffer = heap(4096);
    // SAFETY: nothing owns this number, which is above any limit, and it is only looked up.
    let closed = unsafe { BorrowedFd::borrow_raw(1_000_000_000) };
    assert_eq!(errno(closed, sys::DEVICE_NONE, c""), Some(libc::EBADF));
    let null = File::open("/dev/null").unwrap();
    assert_eq!(errno(null.as_fd(), sys::DEVICE_NONE, c""), Some(libc::EINVAL));
    let malformed: [(u32, &std::ffi::CStr); 6] = [
        (sys::DEVICE_NONE, c"rxe0"),
        (sys::DEVICE_PCI, c""),
        (sys::DEVICE_PCI, c"0000:00:20.0"),
        (sys::DEVICE_PCI, c"0000:00:00.8"),
        (sys::DEVICE_PCI, c"0000:00:00.0x"),
        (3, c""),
    ];
    for (kind, name) in malformed {
        assert_eq!(errno(buffer.as_fd(), kind, name), Some(libc::EINVAL), "{kind} {name:?}");
    }
    assert_eq!(errno(buffer.as_fd(), sys::DEVICE_PCI, c"0000:fe:1f.7"), Some(libc::ENODEV));
    assert_eq!(errno(buffer.as_fd(), sys::DEVICE_RDMA, c"nowhere0"), Some(libc::ENODEV));

    let message = assert_refused!(
        DeviceView::new(&null, DmaDevice::Untranslated),
        device_view::Error::Map { source, .. } if source.raw_os_error() == Some(libc::EINVAL)
    );
    assert!(message.contains("not a dma-buf"), "{message}");
    let view = |device| DeviceView::new(&buffer, device);
    let message = assert_refused!(
        view(DmaDevice::Rdma("nowhere0")),
        device_view::Error::Device(pci::Error::UnknownRdmaDevice { .. })
    );
    assert!(message.contains("rxe0"), "{message}");
    let long = "x".repeat(64);
    assert_refused!(
        view(DmaDevice::Rdma(&long)),
        device_view::Error::Device(pci::Error::UnknownRdmaDevice { .. })
    );
    assert_refused!(
        view(DmaDevice::Rdma("rxe0\0x")),
        device_view::Error::Device(pci::Error::UnknownRdmaDevice { .. })
    );
    let absent = DmaDevice::Pci("0000:fe:1f.7".parse().unwrap());
    assert_refused!(view(absent), device_view::Error::Device(pci::Error::NotInSysfs { .. }));
    // The host bridge has no driver.
    let bridge = view(DmaDevice::Pci("0000:00:00.0".parse().unwrap()));
    assert_refused!(bridge, device_view::Error::Map { source, .. } if source.raw_os_error() == Some(libc::ENXIO));
    drop((buffer, null));
    census.assert_unchanged();
}

#[test]
fn only_an_administrator_sees_addresses() {
    modprobe("dma_sg");
    let buffer = heap(4096);
    let view = || DeviceView::new(&buffer, DmaDevice::Untranslated);
    let refused = unprivileged(view);
    assert_refused!(refused, device_view::Error::NotPermitted { source, .. } if source.raw_os_error() == Some(libc::EACCES));
    let refused = without_capabilities(view);
    assert_refused!(refused, device_view::Error::NotPermitted { source, .. } if source.raw_os_error() == Some(libc::EPERM));
    // Nor through a descriptor that somebody else opened.
    let node = File::open("/dev/dma_sg").unwrap();
    let map = || sys::map(node.as_fd(), buffer.as_fd(), sys::DEVICE_NONE, c"");
    assert_eq!(without_capabilities(map).unwrap_err().raw_os_error(), Some(libc::EPERM));
}

#[test]
fn without_the_module_the_error_says_so() {
    modprobe("dma_sg");
    run("rmmod", &["dma_sg"]);
    let refused = DeviceView::new(heap(4096), DmaDevice::Untranslated);
    let message = assert_refused!(refused, device_view::Error::ModuleMissing { .. });
    assert!(message.contains("modprobe dma_sg"), "{message}");
    modprobe("dma_sg");
    DeviceView::new(heap(4096), DmaDevice::Untranslated).unwrap();
}
