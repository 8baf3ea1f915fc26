//! Frames of a virtual camera, vivid.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use dma_sg::RangeError;
use dmabuf_rdma::exporter::v4l2::Frame;
use dmabuf_rdma::exporter::{CaptureDevice, Error};
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::Operation;
use dmabuf_rdma::{DmaBuf, RemoteSlice};
use rdma_sys_ext::v4l2::{self as sys, FormatMplane};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::peers::Peers;
use crate::common::system::{cameras, unprivileged, vivid};
use crate::common::{assert_same, contents};

const TIMEOUT: Duration = Duration::from_secs(30);

/// Captures an undamaged frame, with its bytes as the processor reads them.
fn capture(camera: &mut CaptureDevice) -> (Frame, Vec<u8>) {
    let frame = camera.next_frame(TIMEOUT).unwrap();
    assert!(!frame.damaged && frame.bytes == camera.frame_size().unwrap(), "{frame:?}");
    let mut bytes = contents(&camera.buffers()[frame.buffer as usize]);
    bytes.truncate(frame.bytes as usize);
    assert!(bytes.iter().any(|byte| *byte != bytes[0]), "a test picture has more than one colour");
    (frame, bytes)
}

#[test]
fn a_captured_frame_crosses_the_wire() {
    for node in cameras() {
        a_frame_of_its_own_crosses_the_wire(CaptureDevice::open(node).unwrap());
    }
}

fn a_frame_of_its_own_crosses_the_wire(mut camera: CaptureDevice) {
    let peers = Peers::new();
    camera.start(3).unwrap();
    assert!(camera.buffers().len() >= 3);
    assert!(camera.buffers().iter().all(DmaBuf::is_writable));
    let (frame, bytes) = capture(&mut camera);
    let size = frame.bytes;
    assert!(frame.width > 0 && size >= u64::from(frame.stride * frame.height), "{frame:?}");
    let region = MemoryRegion::builder(&peers.domain, &camera.buffers()[frame.buffer as usize])
        .range(0..size)
        .access(Access::REMOTE)
        .register()
        .unwrap();
    let other = heap(size);
    let other_region = peers.register(&other);
    let local = other_region.sge(..size).unwrap();
    let remote = RemoteSlice::from(region.remote()).addr().unwrap();
    peers.ours.succeed(Operation::Read { remote }, &[local]);
    assert_same(&contents(&other)[..size as usize], &bytes, "the frame at the peer");

    camera.requeue(frame.buffer).unwrap();
    assert_refused!(camera.requeue(99), Error::Range(RangeError::OutOfRange { .. }));
    // The region stays valid after the camera is closed.
    drop(camera);
    peers.ours.succeed(Operation::Read { remote }, &[local]);
}

#[test]
fn a_camera_captures_into_a_registered_buffer() {
    for node in cameras() {
        a_frame_is_captured_into_a_registered_buffer(CaptureDevice::open(node).unwrap());
    }
}

fn a_frame_is_captured_into_a_registered_buffer(mut camera: CaptureDevice) {
    let peers = Peers::new();
    let size = camera.frame_size().unwrap();
    let buffers: Vec<_> = (0..3).map(|_| heap(size)).collect();
    let regions: Vec<_> = buffers.iter().map(|buffer| peers.register(buffer)).collect();
    camera.start_into(buffers).unwrap();
    let (frame, bytes) = capture(&mut camera);
    let other = heap(size);
    let other_region = peers.register(&other);
    let remote = regions[frame.buffer as usize].remote().slice(..frame.bytes).unwrap().addr().unwrap();
    peers.ours.succeed(Operation::Read { remote }, &[other_region.sge(..frame.bytes).unwrap()]);
    assert_same(&contents(&other)[..bytes.len()], &bytes, "the frame at the peer");
}

/// Sets another pixel format on a multi-planar camera, with VIDIOC_S_FMT. Returns the previous one.
fn set_format(node: &str, fourcc: &[u8; 4]) -> [u8; 4] {
    let file = std::fs::File::options().read(true).write(true).open(node).unwrap();
    let mut format = FormatMplane { buf_type: sys::TYPE_CAPTURE_MPLANE, ..Default::default() };
    format.pix_mp = sys::get_format_mplane(file.as_fd()).unwrap();
    let before = format.pix_mp.pixelformat.to_le_bytes();
    format.pix_mp.pixelformat = u32::from_le_bytes(*fourcc);
    let opcode = libc::_IOWR::<FormatMplane>(b'V'.into(), 5);
    // SAFETY: the kernel reads and writes one v4l2_format, which has no pointer in it.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), opcode, &raw mut format) }, 0, "S_FMT");
    assert_eq!(format.pix_mp.pixelformat.to_le_bytes(), *fourcc);
    before
}

#[test]
fn a_frame_in_several_buffers_is_refused() {
    let [_, node] = cameras();
    let before = set_format(node, b"NM16");
    let mut camera = CaptureDevice::open(node).unwrap();
    let message = assert_refused!(camera.frame_size(), Error::NotACapture { .. });
    assert!(message.contains("NV12, not NM12"), "{message}");
    assert_refused!(camera.start(2), Error::NotACapture { .. });
    set_format(node, &before);
}

#[test]
fn cameras_refuse_with_exact_errors() {
    drop(vivid());
    let census = Census::take();
    let message = assert_refused!(CaptureDevice::open("/dev/video63"), Error::Missing { .. });
    assert!(message.contains("modprobe vivid"), "{message}");
    assert_refused!(CaptureDevice::open("/dev/null"), Error::Unusable { .. });
    assert_refused!(CaptureDevice::by_driver("no-such-driver"), Error::Missing { .. });
    let forbidden = unprivileged(|| CaptureDevice::by_driver("vivid").map(drop));
    let message = assert_refused!(forbidden, Error::NotPermitted { .. });
    assert!(message.contains("(video)"), "{message}");
    let mut camera = vivid();
    assert_refused!(camera.start(0), Error::Range(RangeError::Empty { .. }));
    let small = camera.start_into(vec![heap(4096), heap(4096)]);
    assert_refused!(small, Error::Range(RangeError::OutOfRange { length, size: 4096, .. }) if *length > 4096);
    let idle = camera.next_frame(TIMEOUT);
    assert_eq!(idle.unwrap_err().errno(), Some(libc::EINVAL), "not started");
    let mut other = vivid();
    other.start(2).unwrap();
    let refused = camera.start(2);
    assert_refused!(refused, Error::Allocate { operation: "allocate buffers", .. });
    assert_eq!(refused.unwrap_err().errno(), Some(libc::EBUSY));
    other.stop();
    assert!(other.buffers().is_empty());
    // Started twice: the second stream replaces the first.
    camera.start(3).unwrap();
    camera.start(2).unwrap();
    let frames: Vec<_> = (0..camera.buffers().len()).map(|_| camera.next_frame(TIMEOUT).unwrap()).collect();
    assert!(frames[0].sequence < frames[1].sequence);
    let none = camera.next_frame(Duration::from_millis(1));
    assert_eq!(none.unwrap_err().errno(), Some(libc::ETIMEDOUT), "the device has no buffer");
    drop((camera, other));
    census.assert_unchanged();
}
