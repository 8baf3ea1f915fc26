//! Dumb buffers of a DRM card, exported over PRIME.
//!
//! Most modesetting drivers make them. Those of the virtual drivers `vgem` and `virtio_gpu` have struct
//! pages; those of `bochs` are video memory without.
//!
//! Source: `drivers/gpu/drm/drm_prime.c`, `drivers/gpu/drm/drm_dumb_buffers.c`.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use ::drm::buffer::{Buffer as _, DrmFourcc};
use ::drm::control::Device as _;
use dma_sg::page_size;
use dma_sg::pci::{PciAddress, Sysfs};

use super::{Allocation, Error, Exporter, Result, nodes, open_device, pci_device_of, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::kind::ErrorKind;

const MISSING: &str =
    "ls /dev/dri shows the cards of this machine, and `modprobe vgem` makes one without hardware";
const FORBIDDEN: &str = "run as root, or join the group that owns the node (video or render)";

/// Bytes per pixel of XRGB8888, which every driver takes.
const PIXEL: u64 = 4;

/// A DRM card, as an allocator of dumb buffers.
#[derive(Debug)]
pub struct DumbBuffers {
    card: Card,
    path: PathBuf,
    driver: String,
    device: Option<PciAddress>,
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
    /// - [`Error::Missing`]: no such node. [`Error::NotPermitted`]: this user may not open it.
    /// - [`Error::Unusable`]: the node is not a DRM card.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let card = Card(open_device(path, MISSING, FORBIDDEN)?);
        let unusable = |source| Error::Unusable { device: path.display().to_string(), source };
        let driver = ::drm::Device::get_driver(&card).map_err(unusable)?;
        let driver = driver.name().to_string_lossy().into_owned();
        let device = pci_device_of(path, Sysfs::drm_card);
        Ok(Self { card, path: path.into(), driver, device })
    }

    /// Opens the first card of a driver: `vgem`, `virtio_gpu`, `amdgpu`, … Card numbers change from boot to
    /// boot; driver names do not.
    ///
    /// # Errors
    /// - [`Error::Missing`]: no card has that driver. The message lists the drivers of the cards.
    /// - [`Error::NotPermitted`]: this user may not open some cards, and no other has that driver.
    /// - [`Error::Unusable`] (`EMFILE`, `ENFILE`): no descriptor is free.
    pub fn by_driver(driver: &str) -> Result<Self> {
        let mut present = Vec::new();
        let mut forbidden = None;
        for card in nodes("/dev/dri", "card")? {
            match Self::open(card) {
                Ok(card) if card.driver == driver => return Ok(card),
                Ok(card) => present.push(card.driver),
                // This card may have that driver, but so may one of the next.
                Err(error @ Error::NotPermitted { .. }) => forbidden = Some(error),
                Err(error) if error.kind() == ErrorKind::Limit => return Err(error),
                Err(_) => {}
            }
        }
        Err(forbidden.unwrap_or_else(|| Error::Missing {
            device: format!("a DRM card of driver {driver}"),
            remedy: match present.as_slice() {
                [] => "this machine has no DRM card; `modprobe vgem` makes one without hardware".into(),
                present => format!("the cards of this machine have {}", present.join(", ")),
            },
            source: std::io::Error::from_raw_os_error(libc::ENODEV),
        }))
    }

    /// The open card, for GBM.
    #[cfg(feature = "gbm")]
    pub(super) fn into_card(self) -> Card {
        self.card
    }

    /// The kernel driver's name.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// The card's PCI address; `None` for a card that is not on the PCI bus, such as vgem.
    pub fn pci_device(&self) -> Option<PciAddress> {
        self.device
    }
}

impl Exporter for DumbBuffers {
    fn name(&self) -> String {
        format!("drm {} ({})", self.driver, self.path.display())
    }

    /// # Errors
    /// [`Error::Allocate`]: `ENOSYS` if the card has no dumb buffers, `ENOMEM` or `ENOSPC` if its memory is
    /// used up, `EINVAL` or `ERANGE` if the driver does not make buffers so large.
    #[doc(alias = "DRM_IOCTL_PRIME_HANDLE_TO_FD")]
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let _span = crate::observe::exporting(|| self.name(), size);
        let size = whole_pages(size, page_size())?;
        let failed =
            |operation| move |source| Error::Allocate { exporter: self.name(), operation, size, source };
        // A row of one page, which no driver pads.
        let width = (page_size() / PIXEL) as u32;
        let height = u32::try_from(size / page_size())
            .map_err(|_| failed("make a dumb buffer")(std::io::Error::from_raw_os_error(libc::EINVAL)))?;
        let dumb = self
            .card
            .create_dumb_buffer((width, height), DrmFourcc::Xrgb8888, 8 * PIXEL as u32)
            .map_err(failed("make a dumb buffer"))?;
        // The first export fixes the mode of every later one, so this one is writable.
        let flags = (libc::O_CLOEXEC | libc::O_RDWR) as u32;
        let exported =
            self.card.buffer_to_prime_fd(dumb.handle(), flags).map_err(failed("export it over PRIME"));
        // The dma-buf keeps the memory. The handle goes in either case.
        let destroyed = self.card.destroy_dumb_buffer(dumb).map_err(failed("drop the dumb buffer's handle"));
        let dmabuf = DmaBuf::from_fd(exported?)?.with_device(self.device);
        destroyed?;
        Ok(Allocation { dmabuf, backing: None })
    }
}
