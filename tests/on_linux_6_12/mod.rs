//! Linux 6.12, where the dumb buffers of a bochs display have no struct pages. Later kernels give them some.

mod doctor;

use dma_sg::device_view::{self, DeviceView, DmaDevice};
use dmabuf_rdma::exporter::Exporter;
use dmabuf_rdma::mr::{MemoryRegion, RegisterError, SetError};
use dmabuf_rdma::{DmaBuf, RegionSet};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::drm::card;
use crate::common::peers::domain;
use crate::common::raw::alloc_dma_handle;
use crate::common::system::{driven_by, modprobe};

fn without_pages() -> DmaBuf {
    card("bochs-drm").allocate(1 << 20).unwrap().dmabuf
}

#[test]
fn memory_without_struct_pages_differs_from_a_device_without_import() {
    let census = Census::take();
    let (domain, buffer) = (domain(), without_pages());
    let refused = MemoryRegion::builder(&domain, &buffer).register();
    let message = assert_refused!(refused, RegisterError::MemoryWithoutPages { .. });
    assert!(message.contains("rxe0 imports dma-bufs, but the memory of exporter \"drm\""), "{message}");
    drop((domain, buffer));
    census.assert_unchanged();
}

#[test]
fn an_exporter_that_refuses_is_quoted() {
    modprobe("dma_sg");
    let video = without_pages();
    let census = Census::take();
    for device in [DmaDevice::Untranslated, DmaDevice::Pci(driven_by("virtio-pci")[0])] {
        let refused = DeviceView::new(&video, device);
        let message = assert_refused!(refused, device_view::Error::Map { source, .. } if source.raw_os_error() == Some(libc::ENOSYS));
        assert!(message.contains("no pages"), "{message}");
    }
    census.assert_unchanged();
}

/// The exporter refuses: video memory without pages, among buffers with pages.
#[test]
fn a_buffer_that_is_refused_ends_the_set() {
    let census = Census::take();
    let domain = domain();
    let video = without_pages();
    let size = video.size();
    let buffers = [heap(64 << 10), heap(64 << 10), video, heap(64 << 10)];
    for threads in [1, 3] {
        let refused = RegionSet::of_buffers(&buffers).threads(threads).register(&domain);
        let message = assert_refused!(
            refused,
            SetError::Chunk { chunk: 2, chunks: 4, offset: 0x2_0000, length, source, .. }
                if *length == size && matches!(**source, RegisterError::MemoryWithoutPages { .. })
        );
        assert!(message.starts_with("rxe0: chunk 2 of 4 was refused"), "{message}");
        assert_eq!(refused.unwrap_err().errno(), Some(libc::ENOSYS));
    }
    drop((domain, buffers));
    census.assert_unchanged();
}

#[test]
fn the_kernel_has_no_dma_handles() {
    let refused = alloc_dma_handle(&domain()).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPROTONOSUPPORT));
}
