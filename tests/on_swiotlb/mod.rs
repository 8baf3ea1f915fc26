//! A kernel that bounces every DMA mapping (`swiotlb=force`): what the device writes must land in the
//! buffer, not in a bounce page that is thrown away.

use dma_sg::device_view::{self, DeviceView, DmaDevice};

use crate::assert_refused;
use crate::common::buffers::{driver_kinds, heap, udmabuf_kinds};
use crate::common::census::Census;
use crate::common::peers::{Peers, import_path};
use crate::common::system::{driven_by, modprobe};
use crate::common::{assert_same, bytes, pattern};

#[test]
fn the_kernel_does_bounce() {
    let words = std::fs::read_to_string("/proc/cmdline").unwrap();
    assert!(words.split_whitespace().any(|word| word == "swiotlb=force"), "{words}");
}

#[test]
fn every_byte_of_every_drivers_buffer() {
    driver_kinds().iter().for_each(|kind| bytes::whole_buffer(import_path(), kind));
}

#[test]
fn odd_ranges_with_an_iova_of_their_own() {
    driver_kinds().iter().for_each(|kind| bytes::odd_range(import_path(), kind));
}

/// The addresses would be those of bounce buffers; the module's own device has none and shows the pages.
#[test]
fn a_devices_view_is_never_one_of_bounce_buffers() {
    modprobe("dma_sg");
    let buffer = heap(1 << 20);
    let census = Census::take();
    let device = DmaDevice::Pci(driven_by("virtio-pci")[0]);
    let refused = DeviceView::new(&buffer, device);
    let message = assert_refused!(refused, device_view::Error::Map { source, .. } if source.raw_os_error() == Some(libc::EADDRNOTAVAIL));
    assert!(message.contains("bounce"), "{message}");
    assert_eq!(
        DeviceView::new(&buffer, DmaDevice::Untranslated).unwrap().list().unwrap().total_len(),
        1 << 20
    );
    census.assert_unchanged();
}

/// Seen through the memfds' own mapping: udmabuf's SYNC ioctl bounces too, by itself, and would put
/// back what the memory held before.
#[test]
fn every_byte_of_every_udmabuf() {
    for kind in udmabuf_kinds() {
        let peers = Peers::new();
        let [from, to] = [(); 2].map(|()| (kind.allocate)(2 << 20));
        let [source, target] = [&from, &to].map(|buffer| peers.register(&buffer.dmabuf));
        let size = to.dmabuf.size() as usize;
        let put = pattern(size, 31);
        let mut seen = vec![0; size];
        let [from, to] = [&from, &to].map(|buffer| buffer.backing.as_ref().unwrap().as_ptr());
        // SAFETY: both mappings are `size` bytes long, and the device moves bytes only in between.
        unsafe {
            from.copy_from_nonoverlapping(put.as_ptr(), size);
            peers.write(&source, &target);
            to.copy_to_nonoverlapping(seen.as_mut_ptr(), size);
        }
        assert_same(&seen, &put, kind.name);
    }
}
