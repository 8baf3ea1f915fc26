//! Frames of a virtual camera, vivid.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use dmabuf_rdma::error::ExporterError;
use dmabuf_rdma::exporter::CaptureDevice;
use dmabuf_rdma::exporter::v4l2::Capture;
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::Operation;
use dmabuf_rdma::{DmaBuf, Error};
use rdma_sys_ext::v4l2::{self as sys, FormatMplane};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::peers::Peers;
use crate::common::system::{cameras, unprivileged, vivid};
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
    for node in cameras() {
        a_frame_of_its_own_crosses_the_wire(CaptureDevice::open(node).unwrap());
    }
}

fn a_frame_of_its_own_crosses_the_wire(camera: CaptureDevice) {
    let peers = Peers::new();
    let mut capture = camera.capture(3).unwrap();
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
    for node in cameras() {
        a_frame_is_captured_into_a_registered_buffer(CaptureDevice::open(node).unwrap());
    }
}

fn a_frame_is_captured_into_a_registered_buffer(camera: CaptureDevice) {
    let peers = Peers::new();
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

/// Gives a multi-planar camera another pixel format, with VIDIOC_S_FMT.
fn choose(node: &str, fourcc: &[u8; 4]) {
    let file = std::fs::File::options().read(true).write(true).open(node).unwrap();
    let mut format = FormatMplane { buf_type: sys::TYPE_CAPTURE_MPLANE, ..Default::default() };
    format.pix_mp = sys::get_format_mplane(file.as_fd()).unwrap();
    format.pix_mp.pixelformat = u32::from_le_bytes(*fourcc);
    let opcode = libc::_IOWR::<FormatMplane>(b'V'.into(), 5);
    // SAFETY: the kernel reads and writes one v4l2_format, which has no pointer in it.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), opcode, &raw mut format) }, 0, "S_FMT");
    assert_eq!(format.pix_mp.pixelformat.to_le_bytes(), *fourcc);
}

#[test]
fn a_frame_in_several_pieces_is_refused() {
    let [_, node] = cameras();
    let before = CaptureDevice::open(node).unwrap().format().unwrap();
    choose(node, b"NM16");
    let camera = CaptureDevice::open(node).unwrap();
    let message = assert_refused!(camera.format(), Error::Exporters(ExporterError::NotACapture { .. }));
    assert!(message.contains("NV12, not NM12"), "{message}");
    assert_refused!(camera.capture(2), Error::Exporters(ExporterError::NotACapture { .. }));
    choose(node, &before.fourcc);
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
