//! Frames of a camera or capture card, as dma-bufs: its own buffers, or buffers of somebody else's that
//! it captures into.
//!
//! Single-planar capture, which most devices on PCI and USB have, and multi-planar capture of formats whose
//! frames are one piece of memory, as cameras on a system's own bus have.
//!
//! Source: `Documentation/userspace-api/media/v4l/dmabuf.rst`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma_sys_ext::v4l2 as sys;

use super::open_error;
use crate::dmabuf::DmaBuf;
use crate::error::ExporterError;
use crate::{Error, Result};

const MISSING: &str = "no such device: v4l2-ctl --list-devices shows those present, `modprobe vivid` makes one without hardware";
const FORBIDDEN: &str = "run as root, or join the group that owns the node (video)";

/// A capture device.
#[derive(Debug)]
pub struct CaptureDevice {
    node: File,
    path: PathBuf,
    driver: String,
    /// Its capture queue.
    kind: u32,
}

/// What a device's frames are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrameFormat {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The pixel format's four characters, such as `YUYV`.
    pub fourcc: [u8; 4],
    /// Bytes from one row to the next.
    pub stride: u32,
    /// Most bytes that a frame takes. Buffers are rounded up to pages.
    pub size: u32,
}

/// A frame that was captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Frame {
    /// The buffer that it is in.
    pub buffer: u32,
    /// Its bytes, from the buffer's first one.
    pub bytes: u32,
    /// Its number since the stream began; a gap is frames that were lost.
    pub sequence: u32,
    /// Whether the device says that it is damaged.
    pub damaged: bool,
}

impl CaptureDevice {
    /// Opens a device by its node, such as `/dev/video0`.
    ///
    /// # Errors
    /// - [`Error::ExporterMissing`], [`Error::ExporterNotPermitted`].
    /// - [`Error::ExporterUnusable`]: the node is no video device.
    /// - [`ExporterError::NotACapture`]: it does not capture, or does not stream.
    #[doc(alias = "VIDIOC_QUERYCAP")]
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // Non-blocking, so that waiting for a frame can have a limit.
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
        let node = opened.map_err(|source| open_error(path, MISSING, FORBIDDEN, source))?;
        let device = path.display().to_string();
        let found = sys::query_capability(node.as_fd())
            .map_err(|source| Error::ExporterUnusable { device: device.clone(), source })?;
        let per_node = found.capabilities & sys::CAP_DEVICE_CAPS != 0;
        let can = if per_node { found.device_caps } else { found.capabilities };
        for (capability, reason) in [
            (sys::CAP_VIDEO_CAPTURE | sys::CAP_VIDEO_CAPTURE_MPLANE, "it has no capture queue"),
            (sys::CAP_STREAMING, "it can only be read, not stream into buffers"),
        ] {
            if can & capability == 0 {
                return Err(ExporterError::NotACapture { device, reason }.into());
            }
        }
        let single = can & sys::CAP_VIDEO_CAPTURE != 0;
        let kind = if single { sys::TYPE_CAPTURE } else { sys::TYPE_CAPTURE_MPLANE };
        let end = found.driver.iter().position(|byte| *byte == 0).unwrap_or(found.driver.len());
        let driver = String::from_utf8_lossy(&found.driver[..end]).into_owned();
        Ok(Self { node, path: path.into(), driver, kind })
    }

    /// Opens the first capture device of a driver: `vivid`, `uvcvideo`, …
    ///
    /// # Errors
    /// [`Error::ExporterMissing`]: there is none.
    pub fn by_driver(driver: &str) -> Result<Self> {
        let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
        let mut numbers: Vec<u32> = entries
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("video")?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let mut forbidden = None;
        for number in numbers {
            match Self::open(format!("/dev/video{number}")) {
                Ok(device) if device.driver == driver => return Ok(device),
                Err(error @ Error::ExporterNotPermitted { .. }) => forbidden = Some(error),
                _ => {}
            }
        }
        Err(forbidden.unwrap_or_else(|| Error::ExporterMissing {
            device: format!("a capture device of driver {driver}"),
            remedy: MISSING.into(),
            source: io::Error::from_raw_os_error(libc::ENODEV),
        }))
    }

    /// The kernel driver's name.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// What the frames are like now.
    ///
    /// # Errors
    /// - [`ExporterError::NotACapture`]: a frame is in several pieces of memory.
    /// - [`Error::Export`].
    #[doc(alias = "VIDIOC_G_FMT")]
    pub fn format(&self) -> Result<FrameFormat> {
        let failed = self.failed("read the format", 0);
        if self.kind == sys::TYPE_CAPTURE {
            let found = sys::get_format(self.node.as_fd()).map_err(failed)?;
            let (width, height, fourcc) = (found.width, found.height, found.pixelformat.to_le_bytes());
            return Ok(FrameFormat {
                width,
                height,
                fourcc,
                stride: found.bytesperline,
                size: found.sizeimage,
            });
        }
        let found = sys::get_format_mplane(self.node.as_fd()).map_err(failed)?;
        if found.num_planes != 1 {
            let reason = "a frame of its format is in several pieces of memory; choose one whose planes lie together (NV12, not NM12): v4l2-ctl --list-formats";
            let device = self.path.display().to_string();
            return Err(ExporterError::NotACapture { device, reason }.into());
        }
        let (width, height, fourcc) = (found.width, found.height, found.pixelformat.to_le_bytes());
        let plane = found.plane_fmt[0];
        Ok(FrameFormat { width, height, fourcc, stride: plane.bytesperline, size: plane.sizeimage })
    }

    /// Starts to capture into `count` buffers that the driver allocates and that are exported here.
    ///
    /// # Errors
    /// As [`format`](Self::format), and
    /// [`Error::Export`]: `EBUSY` when somebody else captures, `ENOMEM`, `ENOTTY` from a driver that does
    /// not export, `EMFILE`.
    #[doc(alias = "VIDIOC_EXPBUF")]
    pub fn capture(self, count: u32) -> Result<Capture> {
        let mut capture = self.request(sys::MEMORY_MMAP, count)?;
        for index in 0..capture.count {
            let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
            let (device, size) = (&capture.device, u64::from(capture.format.size));
            let _span = crate::observe::exporting(|| device.name(), size);
            let fd = sys::export(device.node.as_fd(), device.kind, index, flags)
                .map_err(device.failed("export a buffer", size))?;
            capture.buffers.push(DmaBuf::from_fd(fd)?);
        }
        capture.start()
    }

    /// Starts to capture into buffers of somebody else's, such as registered ones.
    ///
    /// # Errors
    /// - [`Error::OutOfRange`]: a buffer is smaller than a frame.
    /// - [`Error::ReadOnlyBuffer`]: one cannot be written.
    /// - [`Error::Export`]: `EINVAL` or `EFAULT` when the driver cannot reach such memory, `EBUSY`.
    #[doc(alias = "V4L2_MEMORY_DMABUF")]
    pub fn capture_into(self, buffers: Vec<DmaBuf>) -> Result<Capture> {
        let size = u64::from(self.format()?.size);
        for buffer in &buffers {
            crate::umem::check_range(0, size, buffer.size())?;
            if !buffer.is_writable() {
                return Err(Error::ReadOnlyBuffer { access: "write access for capturing".into() });
            }
        }
        let mut capture = self.request(sys::MEMORY_DMABUF, buffers.len() as u32)?;
        capture.buffers = buffers;
        capture.start()
    }

    fn request(self, memory: u32, count: u32) -> Result<Capture> {
        let format = self.format()?;
        let size = u64::from(format.size) * u64::from(count);
        if count == 0 {
            return Err(Error::ZeroLength { offset: 0 });
        }
        let got = sys::request_buffers(self.node.as_fd(), self.kind, memory, count)
            .map_err(self.failed("allocate buffers", size))?;
        // From here on dropping it gives the buffers back. The driver may want more than were asked for;
        // what nobody queues, it does not use.
        let count = if memory == sys::MEMORY_DMABUF { count.min(got) } else { got };
        Ok(Capture { buffers: Vec::with_capacity(count as usize), device: self, format, memory, count })
    }

    fn name(&self) -> String {
        format!("v4l2 {} ({})", self.driver, self.path.display())
    }

    fn failed(&self, operation: &'static str, size: u64) -> impl FnOnce(io::Error) -> Error + use<> {
        let exporter = self.name();
        move |source| Error::Export { exporter, operation, size, source }
    }
}

/// A stream of frames into dma-bufs. Dropping it stops the stream; regions of the buffers live on.
#[derive(Debug)]
pub struct Capture {
    device: CaptureDevice,
    format: FrameFormat,
    memory: u32,
    count: u32,
    buffers: Vec<DmaBuf>,
}

impl Capture {
    /// The buffers, by the number that a [`Frame`] names.
    pub fn buffers(&self) -> &[DmaBuf] {
        &self.buffers
    }

    /// What the frames are like.
    pub fn format(&self) -> &FrameFormat {
        &self.format
    }

    /// Waits for the next frame. Its buffer is the caller's until [`give_back`](Self::give_back).
    ///
    /// # Errors
    /// [`Error::Export`]: `ETIMEDOUT` when none came within `limit`; `EIO` and others from the driver.
    #[doc(alias = "VIDIOC_DQBUF")]
    pub fn next(&mut self, limit: Duration) -> Result<Frame> {
        let end = Instant::now() + limit;
        let failed = || self.device.failed("capture a frame", self.format.size.into());
        loop {
            match sys::dequeue(self.device.node.as_fd(), self.device.kind, self.memory) {
                Ok(got) => {
                    let damaged = got.flags & sys::BUF_FLAG_ERROR != 0;
                    let (buffer, bytes, sequence) = (got.index, got.bytesused, got.sequence);
                    return Ok(Frame { buffer, bytes, sequence, damaged });
                }
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(failed()(error)),
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failed()(io::Error::from_raw_os_error(libc::ETIMEDOUT)));
            }
            // Rounded up: poll(2) counts milliseconds, and 0 would spin.
            let left = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            let mut waiting = [PollFd::new(self.device.node.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waiting, left) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(failed()(error.into())),
            }
        }
    }

    /// Gives a buffer back to the device, to be filled again.
    ///
    /// # Errors
    /// - [`Error::OutOfRange`]: no buffer has that number.
    /// - [`Error::Export`]: `EINVAL` when the device has it already.
    #[doc(alias = "VIDIOC_QBUF")]
    pub fn give_back(&mut self, buffer: u32) -> Result<()> {
        let size = self.buffers.len() as u64;
        let outside = Error::OutOfRange { offset: buffer.into(), length: 1, size };
        let dmabuf = self.buffers.get(buffer as usize).ok_or(outside)?;
        let dmabuf = (self.memory == sys::MEMORY_DMABUF).then(|| dmabuf.as_fd());
        sys::queue(self.device.node.as_fd(), self.device.kind, buffer, dmabuf)
            .map_err(self.device.failed("queue a buffer", self.format.size.into()))
    }

    fn start(mut self) -> Result<Self> {
        for buffer in 0..self.buffers.len() as u32 {
            self.give_back(buffer)?;
        }
        sys::stream_on(self.device.node.as_fd(), self.device.kind)
            .map_err(self.device.failed("start the stream", self.format.size.into()))?;
        Ok(self)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let (node, kind) = (self.device.node.as_fd(), self.device.kind);
        let ended = sys::stream_off(node, kind)
            .and_then(|()| sys::request_buffers(node, kind, self.memory, 0).map(drop));
        if let Err(error) = ended {
            tracing::warn!(%error, device = %self.device.path.display(), "cannot stop capturing");
        }
    }
}
