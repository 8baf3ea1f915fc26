//! Frames of a virtual camera, vivid.

use std::time::Duration;

use dmabuf_rdma::exporter::CaptureDevice;
use dmabuf_rdma::exporter::v4l2::Capture;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::Operation;
use dmabuf_rdma::{DmaBuf, Error};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::peers::Peers;
use crate::common::system::{unprivileged, vivid};
use crate::common::{assert_same, contents};

const LIMIT: Duration = Duration::from_secs(30);

/// A frame that arrived whole, and its bytes as the processor sees them.
fn frame(capture: &mut Capture) -> (u32, Vec<u8>) {
    let frame = capture.next(LIMIT).unwrap();
    assert!(!frame.damaged && frame.bytes == capture.format().size, "{frame:?}");
    let mut bytes = contents(&capture.buffers()[frame.buffer as usize]);
    bytes.truncate(frame.bytes as usize);
    assert!(bytes.iter().any(|byte| *byte != bytes[0]), "a test picture has more than one colour");
    (frame.buffer, bytes)
}

#[test]
fn a_captured_frame_crosses_the_wire() {
    let peers = Peers::new();
    let mut capture = vivid().capture(3).unwrap();
    let format = *capture.format();
    assert!(format.width > 0 && u64::from(format.size) >= u64::from(format.stride * format.height));
    assert!(capture.buffers().len() >= 3);
    assert!(capture.buffers().iter().all(DmaBuf::is_writable));
    let (number, bytes) = frame(&mut capture);
    let size = bytes.len() as u64;
    let region = MemoryRegion::builder(&peers.domain, &capture.buffers()[number as usize])
        .range(0, size)
        .access(Access::REMOTE)
        .register()
        .unwrap();
    let other = heap(size);
    let other_region = peers.register(&other);
    let local = other_region.sge(0, size).unwrap();
    let remote = region.remote().at(0, size).unwrap();
    peers.ours.succeed(Operation::Read { remote }, &[local]);
    assert_same(&contents(&other)[..size as usize], &bytes, "the frame at the peer");

    capture.give_back(number).unwrap();
    assert_refused!(capture.give_back(99), Error::OutOfRange { .. });
    // The region serves on when the camera is closed.
    drop(capture);
    peers.ours.succeed(Operation::Read { remote }, &[local]);
}

#[test]
fn a_camera_captures_into_a_registered_buffer() {
    let peers = Peers::new();
    let camera = vivid();
    let size = u64::from(camera.format().unwrap().size);
    let buffers: Vec<_> = (0..3).map(|_| heap(size)).collect();
    let regions: Vec<_> = buffers.iter().map(|buffer| peers.register(buffer)).collect();
    let mut capture = camera.capture_into(buffers).unwrap();
    let (number, bytes) = frame(&mut capture);
    let other = heap(size);
    let other_region = peers.register(&other);
    let remote = regions[number as usize].remote().at(0, bytes.len() as u64).unwrap();
    peers.ours.succeed(Operation::Read { remote }, &[other_region.sge(0, bytes.len() as u64).unwrap()]);
    assert_same(&contents(&other)[..bytes.len()], &bytes, "the frame at the peer");
}

#[test]
fn cameras_refuse_with_names() {
    drop(vivid());
    let census = Census::take();
    let message = assert_refused!(CaptureDevice::open("/dev/video63"), Error::ExporterMissing { .. });
    assert!(message.contains("modprobe vivid"), "{message}");
    assert_refused!(CaptureDevice::open("/dev/null"), Error::ExporterUnusable { .. });
    assert_refused!(CaptureDevice::by_driver("no-such-driver"), Error::ExporterMissing { .. });
    let forbidden = unprivileged(|| CaptureDevice::by_driver("vivid").map(drop));
    let message = assert_refused!(forbidden, Error::ExporterNotPermitted { .. });
    assert!(message.contains("(video)"), "{message}");
    assert_refused!(vivid().capture(0), Error::ZeroLength { .. });
    let small = vivid().capture_into(vec![heap(4096), heap(4096)]);
    assert_refused!(small, Error::OutOfRange { length, size: 4096, .. } if *length > 4096);
    let busy = vivid().capture(2).unwrap();
    let refused = vivid().capture(2);
    assert_refused!(refused, Error::Export { operation: "allocate buffers", .. });
    assert_eq!(refused.unwrap_err().errno(), Some(libc::EBUSY));
    drop(busy);
    let mut idle = vivid().capture(2).unwrap();
    let buffers: Vec<_> = (0..idle.buffers().len()).map(|_| idle.next(LIMIT).unwrap()).collect();
    assert!(buffers[0].sequence < buffers[1].sequence);
    let none = idle.next(Duration::from_millis(1));
    assert_eq!(none.unwrap_err().errno(), Some(libc::ETIMEDOUT), "no buffer is the device's");
    drop(idle);
    census.assert_unchanged();
}
