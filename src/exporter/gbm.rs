//! GBM: linear buffer objects of a DRM card, as compositors and renderers make them.
//!
//! libgbm's own export gives a read-only descriptor, and the first export of a buffer fixes the mode of
//! every later one. So the buffer is exported by its handle here, before libgbm does it.
//!
//! `unsafe` is here for reading libgbm's union of handles.
//!
//! Source: `gbm.h`, `drivers/gpu/drm/drm_prime.c`.

use std::io;
use std::path::Path;

use ::drm::buffer::DrmFourcc;
use ::drm::control::{Device as _, from_u32};
use ::gbm::{BufferObject, BufferObjectFlags};

use super::drm::Card;
use super::{Allocation, DumbBuffers, Exporter, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::umem::page_size;
use crate::{Error, Result};

/// Bytes a pixel of XRGB8888, which every driver takes.
const PIXEL: u64 = 4;
/// Rows are at most this wide: what small drivers take.
const WIDTH: u64 = 1024;

/// The GBM device of one DRM card.
pub struct Gbm {
    device: ::gbm::Device<Card>,
    name: String,
}

/// An image in linear layout.
#[derive(Debug)]
#[non_exhaustive]
pub struct GbmImage {
    /// The buffer. Rows and the buffer itself may be padded: [`DmaBuf::size`] is what was made.
    pub dmabuf: DmaBuf,
    /// Pixels a row, of 4 bytes each.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
}

impl std::fmt::Debug for Gbm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Gbm").field(&self.name).finish()
    }
}

impl Gbm {
    /// Opens the GBM device of a card, such as `/dev/dri/card0`.
    ///
    /// # Errors
    /// As [`DumbBuffers::open`], and [`Error::ExporterUnusable`] when libgbm has no driver for it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(DumbBuffers::open(path)?)
    }

    /// Opens the GBM device of the first card of a driver.
    ///
    /// # Errors
    /// As [`DumbBuffers::by_driver`], and [`Error::ExporterUnusable`] when libgbm has no driver for it.
    pub fn by_driver(driver: &str) -> Result<Self> {
        Self::new(DumbBuffers::by_driver(driver)?)
    }

    fn new(card: DumbBuffers) -> Result<Self> {
        let name = Exporter::name(&card).replacen("drm", "gbm", 1);
        let device = ::gbm::Device::new(card.into_card())
            .map_err(|source| Error::ExporterUnusable { device: name.clone(), source })?;
        Ok(Self { device, name })
    }

    /// Makes an image of `width` times `height` pixels of XRGB8888, readable and writable.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`]: no pixels.
    /// - [`Error::Export`]: `EINVAL` or `ENOSYS` when the driver has no linear images or none so large.
    #[doc(alias = "gbm_bo_create")]
    pub fn image(&self, width: u32, height: u32) -> Result<GbmImage> {
        let size = u64::from(width) * u64::from(height) * PIXEL;
        if size == 0 {
            return Err(Error::ZeroLength { offset: 0 });
        }
        let _span = crate::observe::exporting(|| self.name.clone(), size);
        let failed = |operation| {
            let exporter = self.name.clone();
            move |source: io::Error| Error::Export { exporter, operation, size, source }
        };
        let usage = BufferObjectFlags::LINEAR | BufferObjectFlags::RENDERING;
        let object: BufferObject<()> = self
            .device
            .create_buffer_object(width, height, DrmFourcc::Xrgb8888, usage)
            .map_err(failed("make a linear buffer object"))?;
        // SAFETY: all variants of the union are read as plain numbers; GEM handles are its 32 bits.
        let handle = unsafe { object.handle().u32_ };
        let nothing = || io::Error::from_raw_os_error(libc::ENOENT);
        let handle = from_u32(handle).ok_or_else(nothing).map_err(failed("find its handle"))?;
        let flags = (libc::O_CLOEXEC | libc::O_RDWR) as u32;
        let fd = self.device.buffer_to_prime_fd(handle, flags).map_err(failed("export it over PRIME"))?;
        Ok(GbmImage { dmabuf: DmaBuf::from_fd(fd)?, width, height, stride: object.stride() })
    }
}

impl Exporter for Gbm {
    fn name(&self) -> String {
        self.name.clone()
    }

    /// An image of at least so many bytes: rows of 4 KiB.
    ///
    /// # Errors
    /// As [`image`](Gbm::image).
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let size = whole_pages(size, page_size().max(WIDTH * PIXEL))?;
        let rows = u32::try_from(size / (WIDTH * PIXEL)).map_err(|_| Error::SizeTooLarge { size })?;
        Ok(Allocation { dmabuf: self.image(WIDTH as u32, rows)?.dmabuf, backing: None })
    }
}
