//! Waiting for a buffer's fences, which vgem makes.

use std::time::Duration;

use dmabuf_rdma::dmabuf::{CpuAccess, Error};
use dmabuf_rdma::exporter::Exporter;

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::drm::{Fence, card};

const SOON: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(5);

#[test]
fn readers_and_writers_wait_for_a_writers_fence() {
    let buffer = card("vgem").allocate(4096).unwrap().dmabuf;
    buffer.wait(CpuAccess::ReadWrite, Duration::ZERO).unwrap();
    let fence = Fence::attach(&buffer, true);
    for access in [CpuAccess::Read, CpuAccess::Write, CpuAccess::ReadWrite] {
        assert_refused!(buffer.wait(access, SOON), Error::FenceTimeout { timeout: SOON });
    }
    assert_refused!(buffer.wait(CpuAccess::Read, Duration::ZERO), Error::FenceTimeout { .. });
    fence.signal();
    buffer.wait(CpuAccess::Read, LONG).unwrap();
    buffer.wait(CpuAccess::Write, LONG).unwrap();
}

#[test]
fn only_writers_wait_for_a_readers_fence() {
    let buffer = card("vgem").allocate(4096).unwrap().dmabuf;
    let fence = Fence::attach(&buffer, false);
    buffer.wait(CpuAccess::Read, Duration::ZERO).unwrap();
    assert_refused!(buffer.wait(CpuAccess::Write, SOON), Error::FenceTimeout { .. });
    fence.signal();
    buffer.wait(CpuAccess::Write, LONG).unwrap();
}

#[test]
fn a_wait_ends_when_the_fence_signals() {
    let buffer = card("vgem").allocate(4096).unwrap().dmabuf;
    let fence = Fence::attach(&buffer, true);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| buffer.wait(CpuAccess::Read, LONG));
        std::thread::sleep(SOON);
        assert!(!waiter.is_finished(), "the fence has not signaled yet");
        fence.signal();
        waiter.join().unwrap().unwrap();
    });
}

#[test]
fn fences_move_to_another_buffer_as_a_sync_file() {
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
fn a_descriptor_that_is_not_a_sync_file_is_refused() {
    let (buffer, other) = (heap(4096), heap(4096));
    let message = assert_refused!(buffer.import_fence(CpuAccess::Write, &other), Error::Fence { .. });
    assert_eq!(message, "cannot add a fence to the dma-buf");
}
