//! GBM: linear buffer objects of a DRM card, as compositors and renderers make them.
//!
//! libgbm exports read-only descriptors, and the first export of a buffer fixes the mode of every later one.
//! So this module exports the buffer itself, by its handle.
//!
//! `unsafe` is here for reading libgbm's union of handles.
//!
//! Source: `gbm.h`, `drivers/gpu/drm/drm_prime.c`.

use std::io;
use std::path::Path;

use ::drm::buffer::DrmFourcc;
use ::drm::control::{Device as _, from_u32};
use ::gbm::{BufferObject, BufferObjectFlags};
use dma_sg::pci::PciAddress;
use dma_sg::{RangeError, page_size};

use super::drm::Card;
use super::{Allocation, DumbBuffers, Error, Exporter, Result, whole_pages};
use crate::dmabuf::DmaBuf;

/// Bytes per pixel of XRGB8888, which every driver takes.
const PIXEL: u64 = 4;
/// Pixels per row of a buffer without a shape of its own. Small drivers take no wider rows.
const WIDTH: u64 = 1024;

/// The GBM device of one DRM card.
pub struct Gbm {
    device: ::gbm::Device<Card>,
    name: String,
    /// The card's PCI address.
    card: Option<PciAddress>,
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
    /// As [`DumbBuffers::open`]; also [`Error::Unusable`] if libgbm has no driver for the card.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(DumbBuffers::open(path)?)
    }

    /// Opens the GBM device of the first card of a driver.
    ///
    /// # Errors
    /// As [`DumbBuffers::by_driver`]; also [`Error::Unusable`] if libgbm has no driver for the card.
    pub fn by_driver(driver: &str) -> Result<Self> {
        Self::new(DumbBuffers::by_driver(driver)?)
    }

    fn new(card: DumbBuffers) -> Result<Self> {
        let (name, address) = (Exporter::name(&card).replacen("drm", "gbm", 1), card.pci_device());
        let device = ::gbm::Device::new(card.into_card())
            .map_err(|source| Error::Unusable { device: name.clone(), source })?;
        Ok(Self { device, name, card: address })
    }

    /// Makes a linear image of `width` by `height` pixels of XRGB8888, readable and writable, and returns it
    /// with its stride: the bytes from the start of one row to that of the next.
    ///
    /// The driver may pad rows and the whole buffer; [`DmaBuf::size`] is the result.
    ///
    /// # Errors
    /// - [`Error::Range`]: the image has no pixels. [`Error::SizeTooLarge`]: its bytes do not fit in 64 bits.
    /// - [`Error::Allocate`]: `EINVAL` or `ENOSYS` if the driver makes no linear images, or none so large.
    #[doc(alias = "gbm_bo_create")]
    pub fn image(&self, width: u32, height: u32) -> Result<(DmaBuf, u32)> {
        let pixels = u64::from(width) * u64::from(height);
        let size = pixels.checked_mul(PIXEL).ok_or(Error::SizeTooLarge { size: u64::MAX })?;
        if size == 0 {
            return Err(RangeError::Empty { offset: 0 }.into());
        }
        let _span = crate::observe::exporting(|| self.name.clone(), size);
        let failed = |operation| {
            let exporter = self.name.clone();
            move |source: io::Error| Error::Allocate { exporter, operation, size, source }
        };
        let usage = BufferObjectFlags::LINEAR | BufferObjectFlags::RENDERING;
        let object: BufferObject<()> = self
            .device
            .create_buffer_object(width, height, DrmFourcc::Xrgb8888, usage)
            .map_err(failed("make a linear buffer object"))?;
        // SAFETY: every variant of the union is a plain number; GEM handles are its 32-bit one.
        let handle = unsafe { object.handle().u32_ };
        let nothing = || io::Error::from_raw_os_error(libc::ENOENT);
        let handle = from_u32(handle).ok_or_else(nothing).map_err(failed("find its handle"))?;
        let flags = (libc::O_CLOEXEC | libc::O_RDWR) as u32;
        let fd = self.device.buffer_to_prime_fd(handle, flags).map_err(failed("export it over PRIME"))?;
        Ok((DmaBuf::from_fd(fd)?.with_device(self.card), object.stride()))
    }
}

impl Exporter for Gbm {
    fn name(&self) -> String {
        self.name.clone()
    }

    /// Makes an image of at least `size` bytes, with rows of 4 KiB.
    ///
    /// # Errors
    /// As [`image`](Gbm::image).
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let size = whole_pages(size, page_size().max(WIDTH * PIXEL))?;
        let rows = u32::try_from(size / (WIDTH * PIXEL)).map_err(|_| Error::SizeTooLarge { size })?;
        let (dmabuf, _stride) = self.image(WIDTH as u32, rows)?;
        Ok(Allocation { dmabuf, backing: None })
    }
}
