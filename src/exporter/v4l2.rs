//! Frames of a camera or capture card in dma-bufs: buffers of the driver, or buffers that you pass in.
//!
//! Single-planar capture is supported, which most PCI and USB devices have, and multi-planar capture, which
//! cameras of embedded systems have, in formats that keep a frame in one buffer.
//!
//! Source: `Documentation/userspace-api/media/v4l/dmabuf.rst`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dma_sg::pci::{PciAddress, Sysfs};
use dma_sg::{RangeError, check_range};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma_sys_ext::v4l2 as sys;

use super::{Error, Result, nodes, open_error, pci_device_of};
use crate::dmabuf::{self, DmaBuf};
use crate::kind::ErrorKind;
use crate::observe::Process;

const MISSING: &str = "v4l2-ctl --list-devices shows the devices of this machine, and `modprobe vivid` makes one without hardware";
const FORBIDDEN: &str = "run as root, or join the group that owns the node (video)";

/// A camera or capture card. [`start`](Self::start) has it capture frames into dma-bufs.
///
/// Dropping it stops the stream. Regions registered for its buffers stay valid.
#[derive(Debug)]
pub struct CaptureDevice {
    node: File,
    path: PathBuf,
    driver: String,
    /// The type of its capture queue.
    kind: u32,
    /// The memory of the queue's buffers.
    memory: u32,
    /// The format of the stream's frames.
    format: Format,
    /// None while it does not capture.
    buffers: Vec<DmaBuf>,
    creator: Process,
}

#[derive(Debug, Clone, Copy, Default)]
struct Format {
    width: u32,
    height: u32,
    fourcc: [u8; 4],
    stride: u32,
    /// Largest size of a frame in bytes.
    size: u32,
}

/// A captured frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Frame {
    /// Index of the frame's buffer in [`CaptureDevice::buffers`].
    pub buffer: u32,
    /// Size of the frame in bytes, from the start of the buffer.
    pub bytes: u64,
    /// The frame's number since the stream began. A gap means lost frames.
    pub sequence: u32,
    /// Whether the device marked the frame as damaged.
    pub damaged: bool,
    /// Pixels per row.
    pub width: u32,
    /// Number of rows.
    pub height: u32,
    /// The pixel format's four characters, such as `YUYV`.
    pub fourcc: [u8; 4],
    /// Bytes from the start of one row to that of the next.
    pub stride: u32,
}

impl CaptureDevice {
    /// Opens a device by its node, such as `/dev/video0`.
    ///
    /// # Errors
    /// - [`Error::Missing`], [`Error::NotPermitted`].
    /// - [`Error::Unusable`]: the node is not a video device.
    /// - [`Error::NotACapture`]: the device does not capture, or does not stream.
    #[doc(alias = "VIDIOC_QUERYCAP")]
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // Non-blocking, so that waiting for a frame can time out.
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
        let node = opened.map_err(|source| open_error(path, MISSING, FORBIDDEN, source))?;
        let device = path.display().to_string();
        let found = sys::query_capability(node.as_fd())
            .map_err(|source| Error::Unusable { device: device.clone(), source })?;
        let per_node = found.capabilities & sys::CAP_DEVICE_CAPS != 0;
        let can = if per_node { found.device_caps } else { found.capabilities };
        for (capability, reason) in [
            (sys::CAP_VIDEO_CAPTURE | sys::CAP_VIDEO_CAPTURE_MPLANE, "it has no capture queue"),
            (sys::CAP_STREAMING, "it supports read(2) only, not streaming into buffers"),
        ] {
            if can & capability == 0 {
                return Err(Error::NotACapture { device, reason });
            }
        }
        let single = can & sys::CAP_VIDEO_CAPTURE != 0;
        let kind = if single { sys::TYPE_CAPTURE } else { sys::TYPE_CAPTURE_MPLANE };
        let end = found.driver.iter().position(|byte| *byte == 0).unwrap_or(found.driver.len());
        let driver = String::from_utf8_lossy(&found.driver[..end]).into_owned();
        let (memory, format) = (sys::MEMORY_MMAP, Format::default());
        let (path, creator) = (path.into(), Process::current());
        Ok(Self { node, path, driver, kind, memory, format, buffers: Vec::new(), creator })
    }

    /// Opens the first capture device of a driver: `vivid`, `uvcvideo`, …
    ///
    /// # Errors
    /// - [`Error::Missing`]: no capture device has that driver.
    /// - [`Error::NotPermitted`]: this user may not open some devices, and no other has that driver.
    /// - [`Error::Unusable`] (`EMFILE`, `ENFILE`): no descriptor is free.
    pub fn by_driver(driver: &str) -> Result<Self> {
        let mut forbidden = None;
        for node in nodes("/dev", "video")? {
            match Self::open(node) {
                Ok(device) if device.driver == driver => return Ok(device),
                Err(error @ Error::NotPermitted { .. }) => forbidden = Some(error),
                Err(error) if error.kind() == ErrorKind::Limit => return Err(error),
                _ => {}
            }
        }
        Err(forbidden.unwrap_or_else(|| Error::Missing {
            device: format!("a capture device of driver {driver}"),
            remedy: MISSING.into(),
            source: io::Error::from_raw_os_error(libc::ENODEV),
        }))
    }

    /// The kernel driver's name.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// The PCI address of the device, or of the controller that it is attached to; `None` for a device that is not on the
    /// PCI bus, such as vivid.
    pub fn pci_device(&self) -> Option<PciAddress> {
        pci_device_of(&self.path, Sysfs::video_device)
    }

    /// Largest size of a frame in bytes, in the device's present format.
    ///
    /// # Errors
    /// - [`Error::NotACapture`]: the format takes several buffers per frame.
    /// - [`Error::Allocate`]: the driver refused.
    #[doc(alias = "VIDIOC_G_FMT")]
    pub fn frame_size(&self) -> Result<u64> {
        Ok(self.present_format()?.size.into())
    }

    fn present_format(&self) -> Result<Format> {
        let failed = self.failed("read the format", 0);
        if self.kind == sys::TYPE_CAPTURE {
            let found = sys::get_format(self.node.as_fd()).map_err(failed)?;
            let (width, height, fourcc) = (found.width, found.height, found.pixelformat.to_le_bytes());
            return Ok(Format { width, height, fourcc, stride: found.bytesperline, size: found.sizeimage });
        }
        let found = sys::get_format_mplane(self.node.as_fd()).map_err(failed)?;
        if found.num_planes != 1 {
            let reason = "its format takes several buffers per frame; set one whose planes share a buffer (NV12, not NM12), see v4l2-ctl --list-formats";
            let device = self.path.display().to_string();
            return Err(Error::NotACapture { device, reason });
        }
        let (width, height, fourcc) = (found.width, found.height, found.pixelformat.to_le_bytes());
        let plane = found.plane_fmt[0];
        Ok(Format { width, height, fourcc, stride: plane.bytesperline, size: plane.sizeimage })
    }

    /// Starts to capture into `count` buffers that the driver allocates. The driver may allocate more. A running
    /// stream is stopped first.
    ///
    /// # Errors
    /// - As [`frame_size`](Self::frame_size); [`Error::Range`]: a count of 0.
    /// - [`Error::Allocate`]: `EBUSY` if another process captures, `ENOMEM`, `EMFILE`, `ENOTTY` if the driver
    ///   does not export buffers.
    #[doc(alias = "VIDIOC_EXPBUF")]
    pub fn start(&mut self, count: u32) -> Result<()> {
        self.stream(sys::MEMORY_MMAP, count, |device, count| {
            (0..count).map(|index| device.export(index)).collect()
        })
    }

    /// Starts to capture into these buffers, such as buffers of registered memory. Each holds at least
    /// [`frame_size`](Self::frame_size) bytes. A running stream is stopped first.
    ///
    /// # Errors
    /// - As [`frame_size`](Self::frame_size); [`Error::Range`]: a buffer is smaller than a frame, or there is
    ///   none.
    /// - [`dmabuf::Error::ReadOnly`]: a buffer's descriptor is read-only.
    /// - [`Error::Allocate`]: `EINVAL` or `EFAULT` if the driver cannot access such memory, `EBUSY` if
    ///   another process captures.
    #[doc(alias = "V4L2_MEMORY_DMABUF")]
    pub fn start_into(&mut self, buffers: Vec<DmaBuf>) -> Result<()> {
        let size = self.frame_size()?;
        for buffer in &buffers {
            check_range(0, size, buffer.size())?;
            if !buffer.is_writable() {
                return Err(dmabuf::Error::ReadOnly { access: "capturing" }.into());
            }
        }
        self.stream(sys::MEMORY_DMABUF, buffers.len() as u32, |_, _| Ok(buffers))
    }

    /// Requests buffers of the driver, has `buffers` make as many dma-bufs, and starts the stream.
    fn stream(
        &mut self,
        memory: u32,
        count: u32,
        buffers: impl FnOnce(&Self, u32) -> Result<Vec<DmaBuf>>,
    ) -> Result<()> {
        let format = self.present_format()?;
        if count == 0 {
            return Err(RangeError::Empty { offset: 0 }.into());
        }
        self.stop();
        // The driver may allocate more than requested.
        let count = sys::request_buffers(self.node.as_fd(), self.kind, memory, count)
            .map_err(self.failed("allocate buffers", u64::from(format.size) * u64::from(count)))?;
        (self.memory, self.format) = (memory, format);
        let started = buffers(self, count).and_then(|buffers| {
            self.buffers = buffers;
            (0..self.buffers.len() as u32).try_for_each(|buffer| self.requeue(buffer))?;
            sys::stream_on(self.node.as_fd(), self.kind)
                .map_err(self.failed("start the stream", format.size.into()))
        });
        if started.is_err() {
            self.release();
        }
        started
    }

    fn export(&self, index: u32) -> Result<DmaBuf> {
        let size = self.format.size.into();
        let _span = crate::observe::exporting(|| self.name(), size);
        let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
        let fd = sys::export(self.node.as_fd(), self.kind, index, flags)
            .map_err(self.failed("export a buffer", size))?;
        Ok(DmaBuf::from_fd(fd)?.with_device(self.pci_device()))
    }

    /// The buffers, indexed by [`Frame::buffer`]; none while the device does not capture.
    pub fn buffers(&self) -> &[DmaBuf] {
        &self.buffers
    }

    /// Waits for the next frame. The device does not write the frame's buffer again until
    /// [`requeue`](Self::requeue).
    ///
    /// # Errors
    /// [`Error::Allocate`]: `ETIMEDOUT` if no frame arrived within `timeout`; `EINVAL` if the device was not
    /// started; `EIO` and others from the driver.
    #[doc(alias = "VIDIOC_DQBUF")]
    pub fn next_frame(&mut self, timeout: Duration) -> Result<Frame> {
        // None: no end.
        let end = Instant::now().checked_add(timeout);
        let failed = || self.failed("capture a frame", self.format.size.into());
        loop {
            match sys::dequeue(self.node.as_fd(), self.kind, self.memory) {
                Ok(got) => {
                    let Format { width, height, fourcc, stride, .. } = self.format;
                    let damaged = got.flags & sys::BUF_FLAG_ERROR != 0;
                    let (buffer, bytes, sequence) = (got.index, got.bytesused.into(), got.sequence);
                    return Ok(Frame { buffer, bytes, sequence, damaged, width, height, fourcc, stride });
                }
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(failed()(error)),
            }
            let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(failed()(io::Error::from_raw_os_error(libc::ETIMEDOUT)));
            }
            // Rounded up: poll(2) counts in milliseconds, and 0 would spin.
            let left = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            let mut waiting = [PollFd::new(self.node.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waiting, left) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(failed()(error.into())),
            }
        }
    }

    /// Returns a buffer to the device, which captures another frame into it.
    ///
    /// # Errors
    /// - [`Error::Range`]: no buffer has that index.
    /// - [`Error::Allocate`]: `EINVAL` if the device already has the buffer.
    #[doc(alias = "VIDIOC_QBUF")]
    pub fn requeue(&mut self, buffer: u32) -> Result<()> {
        check_range(buffer.into(), 1, self.buffers.len() as u64)?;
        let dmabuf = &self.buffers[buffer as usize];
        let dmabuf = (self.memory == sys::MEMORY_DMABUF).then(|| dmabuf.as_fd());
        sys::queue(self.node.as_fd(), self.kind, buffer, dmabuf)
            .map_err(self.failed("queue a buffer", self.format.size.into()))
    }

    /// Stops the stream, if the device captures, and releases the buffers.
    pub fn stop(&mut self) {
        if !self.buffers.is_empty() {
            self.release();
        }
    }

    /// Frees the driver's buffers. Only the process that requested them may.
    fn release(&mut self) {
        let (node, kind) = (self.node.as_fd(), self.kind);
        let ended = sys::stream_off(node, kind)
            .and_then(|()| sys::request_buffers(node, kind, self.memory, 0).map(drop));
        if let Err(error) = ended {
            tracing::warn!(%error, device = %self.path.display(), "cannot stop capturing");
        }
        self.buffers.clear();
    }

    fn name(&self) -> String {
        format!("v4l2 {} ({})", self.driver, self.path.display())
    }

    fn failed(&self, operation: &'static str, size: u64) -> impl FnOnce(io::Error) -> Error + use<> {
        let exporter = self.name();
        move |source| Error::Allocate { exporter, operation, size, source }
    }
}

impl Drop for CaptureDevice {
    fn drop(&mut self) {
        if self.creator.is_current() {
            self.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_timeout_is_taken() {
        let mut device = CaptureDevice {
            node: File::open("/dev/null").unwrap(),
            path: "/dev/null".into(),
            driver: String::new(),
            kind: sys::TYPE_CAPTURE,
            memory: sys::MEMORY_MMAP,
            format: Format::default(),
            buffers: Vec::new(),
            creator: Process::current(),
        };
        for timeout in [Duration::ZERO, Duration::MAX] {
            assert_eq!(device.next_frame(timeout).unwrap_err().errno(), Some(libc::ENOTTY));
        }
    }
}
