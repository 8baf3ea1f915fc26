//! Dumb buffers of a DRM card, exported over PRIME.
//!
//! Every modesetting driver has them, virtual ones too: `vgem` and `virtio_gpu` give memory with
//! struct pages, `bochs` gives video memory without.
//!
//! Source: `drivers/gpu/drm/drm_prime.c`, `drivers/gpu/drm/drm_dumb_buffers.c`.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use ::drm::buffer::{Buffer as _, DrmFourcc};
use ::drm::control::Device as _;

use super::{Allocation, Exporter, open_device, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::umem::page_size;
use crate::{Error, Result};

const MISSING: &str =
    "no such card: ls /dev/dri shows those present, and `modprobe vgem` makes one without hardware";
const FORBIDDEN: &str = "run as root, or join the group that owns the node (video or render)";

/// Bytes a pixel: the one depth that every driver takes.
const PIXEL: u64 = 4;

/// The dumb buffers of one DRM card.
#[derive(Debug)]
pub struct DumbBuffers {
    card: Card,
    path: PathBuf,
    driver: String,
}

#[derive(Debug)]
pub(super) struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl ::drm::Device for Card {}
impl ::drm::control::Device for Card {}

impl DumbBuffers {
    /// Opens a card by its node, such as `/dev/dri/card0`.
    ///
    /// # Errors
    /// - [`Error::ExporterMissing`]: no such node. [`Error::ExporterNotPermitted`]: not for this user.
    /// - [`Error::ExporterUnusable`]: the node is not a DRM card.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let card = Card(open_device(path, MISSING, FORBIDDEN)?);
        let unusable = |source| Error::ExporterUnusable { device: path.display().to_string(), source };
        let driver = ::drm::Device::get_driver(&card).map_err(unusable)?;
        let driver = driver.name().to_string_lossy().into_owned();
        Ok(Self { card, path: path.into(), driver })
    }

    /// Opens the first card of a driver: `vgem`, `virtio_gpu`, `amdgpu`, … Card numbers change from
    /// boot to boot; names do not.
    ///
    /// # Errors
    /// - [`Error::ExporterMissing`]: no card of that driver; the message names the drivers present.
    /// - [`Error::ExporterNotPermitted`]: no such card among those that may be opened.
    pub fn by_driver(driver: &str) -> Result<Self> {
        let mut present = Vec::new();
        let mut forbidden = None;
        for card in cards() {
            match Self::open(card) {
                Ok(card) if card.driver == driver => return Ok(card),
                Ok(card) => present.push(card.driver),
                // Perhaps that was the one; another may still be.
                Err(error @ Error::ExporterNotPermitted { .. }) => forbidden = Some(error),
                Err(_) => {}
            }
        }
        Err(forbidden.unwrap_or_else(|| Error::ExporterMissing {
            device: format!("a DRM card of driver {driver}"),
            remedy: match present.as_slice() {
                [] => "this machine has no DRM card; `modprobe vgem` makes one without hardware".into(),
                present => format!("the cards present are of {}", present.join(", ")),
            },
            source: std::io::Error::from_raw_os_error(libc::ENODEV),
        }))
    }

    /// The open card.
    #[cfg(feature = "gbm")]
    pub(super) fn into_card(self) -> Card {
        self.card
    }

    /// The kernel driver's name.
    pub fn driver(&self) -> &str {
        &self.driver
    }
}

impl Exporter for DumbBuffers {
    fn name(&self) -> String {
        format!("drm {} ({})", self.driver, self.path.display())
    }

    /// # Errors
    /// [`Error::Export`]: `ENOSYS` when the card has no dumb buffers, `ENOMEM` or `ENOSPC` when its
    /// memory is used up, `EINVAL` or `ERANGE` when it is larger than the driver takes.
    #[doc(alias = "DRM_IOCTL_PRIME_HANDLE_TO_FD")]
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let _span = crate::observe::exporting(|| self.name(), size);
        let size = whole_pages(size, page_size())?;
        let failed =
            |operation| move |source| Error::Export { exporter: self.name(), operation, size, source };
        // One page a row, so that no driver pads it.
        let width = (page_size() / PIXEL) as u32;
        let height = u32::try_from(size / page_size())
            .map_err(|_| failed("make a dumb buffer")(std::io::Error::from_raw_os_error(libc::EINVAL)))?;
        let dumb = self
            .card
            .create_dumb_buffer((width, height), DrmFourcc::Xrgb8888, 8 * PIXEL as u32)
            .map_err(failed("make a dumb buffer"))?;
        // The first export fixes the mode of every later one, so it is asked for writing here.
        let flags = (libc::O_CLOEXEC | libc::O_RDWR) as u32;
        let exported =
            self.card.buffer_to_prime_fd(dumb.handle(), flags).map_err(failed("export it over PRIME"));
        // The dma-buf holds the memory; the handle is needed no more, whether that worked or not.
        let destroyed = self.card.destroy_dumb_buffer(dumb).map_err(failed("drop the dumb buffer's handle"));
        let dmabuf = DmaBuf::from_fd(exported?)?;
        destroyed?;
        Ok(Allocation { dmabuf, backing: None })
    }
}

/// The card nodes of this machine, in order of their numbers.
fn cards() -> Vec<PathBuf> {
    let entries = fs::read_dir("/dev/dri").into_iter().flatten().flatten();
    let mut cards: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("card")?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    cards.sort();
    cards.into_iter().map(|(_, path)| path).collect()
}
