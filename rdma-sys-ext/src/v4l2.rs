//! Capture buffers of video devices as dma-bufs: the part of `linux/videodev2.h` that this needs.
//!
//! `device` is a file `/dev/video*`, opened for reading and writing. `kind` is its capture queue:
//! [`TYPE_CAPTURE`] or [`TYPE_CAPTURE_MPLANE`]. Of a multi-planar buffer only the first plane is used.
//!
//! Kernel: `drivers/media/common/videobuf2/videobuf2-v4l2.c`, `drivers/media/v4l2-core/v4l2-ioctl.c`.

use crate::ioctl::{ioctl, own};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// The single-planar capture queue.
#[doc(alias = "V4L2_BUF_TYPE_VIDEO_CAPTURE")]
pub const TYPE_CAPTURE: u32 = 1;
/// The multi-planar capture queue.
#[doc(alias = "V4L2_BUF_TYPE_VIDEO_CAPTURE_MPLANE")]
pub const TYPE_CAPTURE_MPLANE: u32 = 9;
/// Buffers that the driver allocates.
#[doc(alias = "V4L2_MEMORY_MMAP")]
pub const MEMORY_MMAP: u32 = 1;
/// Buffers imported from dma-bufs.
#[doc(alias = "V4L2_MEMORY_DMABUF")]
pub const MEMORY_DMABUF: u32 = 4;
/// The device captures video, single-planar.
#[doc(alias = "V4L2_CAP_VIDEO_CAPTURE")]
pub const CAP_VIDEO_CAPTURE: u32 = 0x1;
/// The device captures video, multi-planar.
#[doc(alias = "V4L2_CAP_VIDEO_CAPTURE_MPLANE")]
pub const CAP_VIDEO_CAPTURE_MPLANE: u32 = 0x1000;
/// The device supports streaming.
#[doc(alias = "V4L2_CAP_STREAMING")]
pub const CAP_STREAMING: u32 = 0x0400_0000;
/// [`Capability::device_caps`] is set: it describes this node, and [`Capability::capabilities`] the whole
/// device.
#[doc(alias = "V4L2_CAP_DEVICE_CAPS")]
pub const CAP_DEVICE_CAPS: u32 = 0x8000_0000;
/// The frame is corrupt.
#[doc(alias = "V4L2_BUF_FLAG_ERROR")]
pub const BUF_FLAG_ERROR: u32 = 0x40;

/// Argument of [`query_capability`].
#[doc(alias = "v4l2_capability")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Capability {
    /// Name of the driver, NUL-terminated.
    pub driver: [u8; 16],
    /// Name of the device.
    pub card: [u8; 32],
    /// Location of the device on its bus.
    pub bus_info: [u8; 32],
    /// Version of the driver.
    pub version: u32,
    /// Capabilities of the whole device.
    pub capabilities: u32,
    /// Capabilities of this node.
    pub device_caps: u32,
    /// Zero.
    pub reserved: [u32; 3],
}

/// The single-planar half of [`Format`].
#[doc(alias = "v4l2_pix_format")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PixFormat {
    /// Pixels per row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Four-character code.
    pub pixelformat: u32,
    /// Interlacing of the rows.
    pub field: u32,
    /// Bytes from one row to the next.
    pub bytesperline: u32,
    /// Bytes per frame.
    pub sizeimage: u32,
}

/// Argument of [`get_format`].
#[doc(alias = "v4l2_format")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// [`TYPE_CAPTURE`].
    pub buf_type: u32,
    /// Zero.
    pub pad: u32,
    /// The part of a union that [`TYPE_CAPTURE`] uses.
    pub pix: PixFormat,
    /// The rest of the union.
    pub rest: [u64; 22],
}

/// A plane of [`PixFormatMplane`].
#[doc(alias = "v4l2_plane_pix_format")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PlanePixFormat {
    /// Bytes of the plane.
    pub sizeimage: u32,
    /// Bytes from one row to the next.
    pub bytesperline: u32,
    /// Zero.
    pub reserved: [u16; 6],
}

/// The multi-planar half of [`Format`].
#[doc(alias = "v4l2_pix_format_mplane")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PixFormatMplane {
    /// Pixels per row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Four-character code.
    pub pixelformat: u32,
    /// Interlacing of the rows.
    pub field: u32,
    /// Color space.
    pub colorspace: u32,
    /// The planes, each in separate memory.
    pub plane_fmt: [PlanePixFormat; 8],
    /// Number of planes.
    pub num_planes: u8,
    /// Flags and further color properties.
    pub rest: [u8; 11],
}

/// Argument of [`get_format_mplane`].
#[doc(alias = "v4l2_format")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct FormatMplane {
    /// [`TYPE_CAPTURE_MPLANE`].
    pub buf_type: u32,
    /// Zero.
    pub pad: u32,
    /// The part of a union that [`TYPE_CAPTURE_MPLANE`] uses.
    pub pix_mp: PixFormatMplane,
    /// The rest of the union.
    pub rest: u64,
}

/// A plane of a multi-planar [`Buffer`].
#[doc(alias = "v4l2_plane")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Plane {
    /// Bytes of the frame.
    pub bytesused: u32,
    /// Bytes of the plane.
    pub length: u32,
    /// A union: the offset for mmap, or a dma-buf descriptor in the first four bytes.
    pub m: u64,
    /// Offset of the frame in the plane, in bytes.
    pub data_offset: u32,
    /// Zero.
    pub reserved: [u32; 11],
}

/// Argument of [`request_buffers`].
#[doc(alias = "v4l2_requestbuffers")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestBuffers {
    /// In: buffers requested. Out: buffers allocated.
    pub count: u32,
    /// [`TYPE_CAPTURE`].
    pub buf_type: u32,
    /// [`MEMORY_MMAP`] or [`MEMORY_DMABUF`].
    pub memory: u32,
    /// Out: capabilities of the queue.
    pub capabilities: u32,
    /// Zero.
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Argument of [`queue`] and [`dequeue`].
#[doc(alias = "v4l2_buffer")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Buffer {
    /// Index of the buffer.
    pub index: u32,
    /// [`TYPE_CAPTURE`] or [`TYPE_CAPTURE_MPLANE`].
    pub buf_type: u32,
    /// Bytes of the frame.
    pub bytesused: u32,
    /// Flags such as [`BUF_FLAG_ERROR`].
    pub flags: u32,
    /// Interlacing of the rows.
    pub field: u32,
    /// Zero.
    pub pad: u32,
    /// Time of capture in seconds and microseconds.
    pub timestamp: [i64; 2],
    /// SMPTE time code.
    pub timecode: [u32; 4],
    /// Sequence number of the frame.
    pub sequence: u32,
    /// [`MEMORY_MMAP`] or [`MEMORY_DMABUF`].
    pub memory: u32,
    /// A union: the offset for mmap, a dma-buf descriptor in the first four bytes, or the address of the
    /// planes.
    pub m: u64,
    /// Bytes of the buffer, or the number of planes.
    pub length: u32,
    /// Zero.
    pub reserved2: u32,
    /// Zero.
    pub request_fd: i32,
}

/// Argument of [`export`].
#[doc(alias = "v4l2_exportbuffer")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ExportBuffer {
    /// [`TYPE_CAPTURE`] or [`TYPE_CAPTURE_MPLANE`].
    pub buf_type: u32,
    /// Index of the buffer.
    pub index: u32,
    /// Index of the plane: 0.
    pub plane: u32,
    /// `O_CLOEXEC` and an access mode.
    pub flags: u32,
    /// Out: the dma-buf.
    pub fd: i32,
    /// Zero.
    pub reserved: [u32; 11],
}

/// Opcode of [`query_capability`].
#[doc(alias = "VIDIOC_QUERYCAP")]
pub const IOCTL_QUERYCAP: libc::Ioctl = libc::_IOR::<Capability>(b'V' as u32, 0);
/// Opcode of [`get_format`].
#[doc(alias = "VIDIOC_G_FMT")]
pub const IOCTL_G_FMT: libc::Ioctl = libc::_IOWR::<Format>(b'V' as u32, 4);
/// Opcode of [`request_buffers`].
#[doc(alias = "VIDIOC_REQBUFS")]
pub const IOCTL_REQBUFS: libc::Ioctl = libc::_IOWR::<RequestBuffers>(b'V' as u32, 8);
/// Opcode of [`queue`].
#[doc(alias = "VIDIOC_QBUF")]
pub const IOCTL_QBUF: libc::Ioctl = libc::_IOWR::<Buffer>(b'V' as u32, 15);
/// Opcode of [`export`].
#[doc(alias = "VIDIOC_EXPBUF")]
pub const IOCTL_EXPBUF: libc::Ioctl = libc::_IOWR::<ExportBuffer>(b'V' as u32, 16);
/// Opcode of [`dequeue`].
#[doc(alias = "VIDIOC_DQBUF")]
pub const IOCTL_DQBUF: libc::Ioctl = libc::_IOWR::<Buffer>(b'V' as u32, 17);
/// Opcode of [`stream_on`].
#[doc(alias = "VIDIOC_STREAMON")]
pub const IOCTL_STREAMON: libc::Ioctl = libc::_IOW::<i32>(b'V' as u32, 18);
/// Opcode of [`stream_off`].
#[doc(alias = "VIDIOC_STREAMOFF")]
pub const IOCTL_STREAMOFF: libc::Ioctl = libc::_IOW::<i32>(b'V' as u32, 19);

/// Name and capabilities of the device.
///
/// # Errors
/// ENOTTY or EINVAL: not a video device.
#[doc(alias = "VIDIOC_QUERYCAP")]
pub fn query_capability(device: BorrowedFd<'_>) -> io::Result<Capability> {
    let mut found = Capability::default();
    // SAFETY: the kernel writes one Capability, the type of the opcode.
    unsafe { ioctl(device, IOCTL_QUERYCAP, &raw mut found) }?;
    Ok(found)
}

/// The format of the frames.
///
/// # Errors
/// EINVAL: no single-planar capture queue.
#[doc(alias = "VIDIOC_G_FMT")]
pub fn get_format(device: BorrowedFd<'_>) -> io::Result<PixFormat> {
    let pix = PixFormat { width: 0, height: 0, pixelformat: 0, field: 0, bytesperline: 0, sizeimage: 0 };
    let mut format = Format { buf_type: TYPE_CAPTURE, pad: 0, pix, rest: [0; 22] };
    // SAFETY: the kernel reads and writes one Format, the type of the opcode. The format of a capture
    // queue contains no pointer.
    unsafe { ioctl(device, IOCTL_G_FMT, &raw mut format) }?;
    Ok(format.pix)
}

/// The format of the frames of the multi-planar queue.
///
/// # Errors
/// EINVAL: no multi-planar capture queue.
#[doc(alias = "VIDIOC_G_FMT")]
pub fn get_format_mplane(device: BorrowedFd<'_>) -> io::Result<PixFormatMplane> {
    let mut format = FormatMplane { buf_type: TYPE_CAPTURE_MPLANE, ..Default::default() };
    // SAFETY: the kernel reads and writes one v4l2_format, which has the size of FormatMplane. The format
    // of a capture queue contains no pointer.
    unsafe { ioctl(device, IOCTL_G_FMT, &raw mut format) }?;
    Ok(format.pix_mp)
}

/// Requests `count` buffers and returns how many the driver allocated. 0 frees all buffers; the memory of
/// an exported one stays until the last descriptor is closed.
///
/// # Errors
/// - EBUSY: another file handle owns the queue.
/// - EINVAL: no capture queue, or the queue does not support this type of memory.
/// - ENOMEM.
#[doc(alias = "VIDIOC_REQBUFS")]
pub fn request_buffers(device: BorrowedFd<'_>, kind: u32, memory: u32, count: u32) -> io::Result<u32> {
    let mut request = RequestBuffers { count, buf_type: kind, memory, ..Default::default() };
    // SAFETY: the kernel reads and writes one RequestBuffers, the type of the opcode.
    unsafe { ioctl(device, IOCTL_REQBUFS, &raw mut request) }?;
    Ok(request.count)
}

/// Exports a [`MEMORY_MMAP`] buffer, or its first plane, as a dma-buf. Each call makes a new dma-buf of
/// the same memory.
///
/// # Errors
/// - EINVAL: no such buffer, or not a [`MEMORY_MMAP`] buffer.
/// - ENOTTY: the driver does not support exporting.
/// - EMFILE, ENFILE.
#[doc(alias = "VIDIOC_EXPBUF")]
pub fn export(device: BorrowedFd<'_>, kind: u32, index: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut request = ExportBuffer { buf_type: kind, index, flags, fd: -1, ..Default::default() };
    // SAFETY: the kernel reads and writes one ExportBuffer, the type of the opcode.
    unsafe { ioctl(device, IOCTL_EXPBUF, &raw mut request) }?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    unsafe { own(request.fd) }
}

/// Queues a buffer for the device to fill: a buffer of the driver, or `dmabuf`.
///
/// # Errors
/// EINVAL: the dma-buf is too small, the driver cannot map it, the buffer is already queued, or its format
/// has several planes.
#[doc(alias = "VIDIOC_QBUF")]
pub fn queue(
    device: BorrowedFd<'_>,
    kind: u32,
    index: u32,
    dmabuf: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let memory = if dmabuf.is_some() { MEMORY_DMABUF } else { MEMORY_MMAP };
    let m = first(dmabuf.map_or(0, |fd| fd.as_raw_fd() as u32));
    let mut plane = Plane { m, ..Default::default() };
    let mut buffer = Buffer { index, buf_type: kind, memory, m, ..Default::default() };
    exchange(device, IOCTL_QBUF, &mut buffer, &mut plane)
}

/// Dequeues a buffer that the device has filled. For a multi-planar buffer `bytesused` is that of its
/// first plane.
///
/// # Errors
/// - EAGAIN: no buffer is filled, and the file is non-blocking.
/// - EINVAL: the stream is off.
/// - EIO.
#[doc(alias = "VIDIOC_DQBUF")]
pub fn dequeue(device: BorrowedFd<'_>, kind: u32, memory: u32) -> io::Result<Buffer> {
    let mut buffer = Buffer { buf_type: kind, memory, ..Default::default() };
    let mut plane = Plane::default();
    exchange(device, IOCTL_DQBUF, &mut buffer, &mut plane)?;
    if kind == TYPE_CAPTURE_MPLANE {
        (buffer.bytesused, buffer.m, buffer.length) = (plane.bytesused, plane.m, plane.length);
    }
    Ok(buffer)
}

fn exchange(
    device: BorrowedFd<'_>,
    opcode: libc::Ioctl,
    buffer: &mut Buffer,
    plane: &mut Plane,
) -> io::Result<()> {
    if buffer.buf_type == TYPE_CAPTURE_MPLANE {
        // The union is an address here, with the size of a pointer.
        let address = std::ptr::from_mut(plane).expose_provenance();
        buffer.m = if size_of::<usize>() == 8 { address as u64 } else { first(address as u32) };
        buffer.length = 1;
    }
    // SAFETY: the kernel reads and writes one Buffer, the type of the opcode. For a multi-planar queue it
    // also reads and writes `length` planes, 1, at the address in `m`: the borrowed `plane`.
    unsafe { ioctl(device, opcode, std::ptr::from_mut(buffer)) }?;
    Ok(())
}

/// Puts `value` into the first four bytes of the union in either byte order.
const fn first(value: u32) -> u64 {
    if cfg!(target_endian = "big") { (value as u64) << 32 } else { value as u64 }
}

/// Starts the stream.
///
/// # Errors
/// - EINVAL: too few buffers are queued.
/// - EIO, EPIPE.
#[doc(alias = "VIDIOC_STREAMON")]
pub fn stream_on(device: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    let mut kind = kind as i32;
    // SAFETY: the kernel reads one int, the type of the opcode.
    unsafe { ioctl(device, IOCTL_STREAMON, &raw mut kind) }?;
    Ok(())
}

/// Stops the stream and returns all buffers to the application.
///
/// # Errors
/// EINVAL: no capture queue.
#[doc(alias = "VIDIOC_STREAMOFF")]
pub fn stream_off(device: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    let mut kind = kind as i32;
    // SAFETY: as in `stream_on`.
    unsafe { ioctl(device, IOCTL_STREAMOFF, &raw mut kind) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioctl::fake::{self, errno, null};
    use std::os::fd::{AsFd, IntoRawFd};

    #[test]
    fn another_device_is_enotty() {
        assert_eq!(errno(query_capability(null().as_fd())), Some(libc::ENOTTY));
    }

    #[test]
    fn an_imported_buffer_is_passed_as_its_descriptor() {
        let (device, dmabuf) = (null(), null());
        let number = dmabuf.as_raw_fd();
        for kind in [TYPE_CAPTURE, TYPE_CAPTURE_MPLANE] {
            let kernel = move |opcode, argument: *mut u8| {
                assert_eq!(opcode, IOCTL_QBUF);
                // SAFETY: `queue` passes a Buffer.
                let buffer = unsafe { argument.cast::<Buffer>().read() };
                assert_eq!((buffer.index, buffer.buf_type, buffer.memory), (3, kind, MEMORY_DMABUF));
                let m = match kind {
                    TYPE_CAPTURE => buffer.m,
                    _ => {
                        assert_eq!(buffer.length, 1);
                        let plane = std::ptr::with_exposed_provenance::<Plane>(buffer.m as usize);
                        // SAFETY: `queue` passes the address of one Plane.
                        unsafe { plane.read() }.m
                    }
                };
                assert_eq!(m.to_ne_bytes()[..4], number.to_ne_bytes());
                Ok(0)
            };
            fake::with(kernel, || queue(device.as_fd(), kind, 3, Some(dmabuf.as_fd()))).unwrap();
        }
    }

    #[test]
    fn the_exported_descriptor_is_owned() {
        let new = null().into_raw_fd();
        let kernel = move |opcode, argument: *mut u8| {
            assert_eq!(opcode, IOCTL_EXPBUF);
            // SAFETY: `export` passes an ExportBuffer.
            let request = unsafe { &mut *argument.cast::<ExportBuffer>() };
            assert_eq!((request.index, request.flags, request.fd), (2, libc::O_CLOEXEC as u32, -1));
            request.fd = new;
            Ok(0)
        };
        let owned = fake::with(kernel, || export(null().as_fd(), TYPE_CAPTURE, 2, libc::O_CLOEXEC as u32));
        assert_eq!(owned.unwrap().as_raw_fd(), new);
    }
}
