//! Waiting for a buffer's fences: real ones, of vgem.

use std::time::Duration;

use dmabuf_rdma::Error;
use dmabuf_rdma::dmabuf::CpuAccess;

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::drm::{Fence, card};

const SOON: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(5);

#[test]
fn a_writers_fence_holds_up_readers_and_writers() {
    use dmabuf_rdma::exporter::Exporter;
    let buffer = card("vgem").allocate(4096).unwrap().dmabuf;
    buffer.wait(CpuAccess::ReadWrite, Duration::ZERO).unwrap();
    let fence = Fence::attach(&buffer, true);
    for access in [CpuAccess::Read, CpuAccess::Write, CpuAccess::ReadWrite] {
        assert_refused!(buffer.wait(access, SOON), Error::FenceTimeout { limit: SOON });
    }
    assert_refused!(buffer.wait(CpuAccess::Read, Duration::ZERO), Error::FenceTimeout { .. });
    fence.signal();
    buffer.wait(CpuAccess::Read, LONG).unwrap();
    buffer.wait(CpuAccess::Write, LONG).unwrap();
}

#[test]
fn a_readers_fence_holds_up_writers_only() {
    use dmabuf_rdma::exporter::Exporter;
    let buffer = card("vgem").allocate(4096).unwrap().dmabuf;
    let fence = Fence::attach(&buffer, false);
    buffer.wait(CpuAccess::Read, Duration::ZERO).unwrap();
    assert_refused!(buffer.wait(CpuAccess::Write, SOON), Error::FenceTimeout { .. });
    fence.signal();
    buffer.wait(CpuAccess::Write, LONG).unwrap();
}

#[test]
fn a_wait_ends_when_the_fence_signals() {
    use dmabuf_rdma::exporter::Exporter;
    let buffer = card("vgem").allocate(4096).unwrap().dmabuf;
    let fence = Fence::attach(&buffer, true);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| buffer.wait(CpuAccess::Read, LONG));
        std::thread::sleep(SOON);
        assert!(!waiter.is_finished(), "the fence has not signalled yet");
        fence.signal();
        waiter.join().unwrap().unwrap();
    });
}

#[test]
fn fences_move_to_another_buffer_as_a_sync_file() {
    use dmabuf_rdma::exporter::Exporter;
    let (source, target) = (card("vgem").allocate(4096).unwrap().dmabuf, heap(4096));
    let fence = Fence::attach(&source, true);
    let sync_file = source.export_fences(CpuAccess::Read).unwrap();
    target.wait(CpuAccess::Read, Duration::ZERO).unwrap();
    target.import_fence(CpuAccess::Write, &sync_file).unwrap();
    assert_refused!(target.wait(CpuAccess::Read, SOON), Error::FenceTimeout { .. });
    fence.signal();
    target.wait(CpuAccess::Read, LONG).unwrap();
}

#[test]
fn what_is_no_sync_file_is_refused() {
    let (buffer, other) = (heap(4096), heap(4096));
    let message = assert_refused!(buffer.import_fence(CpuAccess::Write, &other), Error::Fence { .. });
    assert_eq!(message, "cannot add a fence of the dma-buf");
}
