//! Allocators of dma-bufs, and the runtimes that turn a pointer into a dma-buf.
//!
//! An [`Exporter`] allocates a buffer and exports it. A [`Runtime`] looks up a pointer that another allocator
//! returned and exports the memory under it; [`Runtimes`] asks every runtime that is loaded. `docs/exporters.md`
//! compares the exporters and shows how to get from a framework's pointer to a region.
//!
//! Looking up and exporting pointers fails with [`PointerError`], VFIO devices with [`VfioError`],
//! everything else here with [`Error`], which holds the other two.

/// Asserts that a result is one exact error.
#[cfg(test)]
macro_rules! assert_error {
    ($result:expr, $error:pat) => {
        match $result {
            Err($error) => {}
            other => panic!("expected {}, got {other:?}", stringify!($error)),
        }
    };
}

mod backing;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
mod device_memory;
pub mod dma_heap;
#[cfg(feature = "drm")]
pub mod drm;
mod error;
#[cfg(feature = "gbm")]
pub mod gbm;
#[cfg(feature = "hsa")]
pub mod hsa;
#[cfg(feature = "level-zero")]
pub mod level_zero;
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero", feature = "vulkan"))]
mod library;
pub(crate) mod memory;
#[cfg(all(test, feature = "cuda", feature = "hsa", feature = "level-zero", feature = "vulkan"))]
mod own_world;
pub mod runtime;
pub mod udmabuf;
pub mod v4l2;
pub mod vfio;
#[cfg(feature = "vulkan")]
pub mod vulkan;

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use dma_sg::RangeError;
use dma_sg::pci::{self, Location, PciAddress, Sysfs};

pub use backing::Backing;
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
pub use device_memory::DeviceMemory;
pub use dma_heap::DmaHeap;
#[cfg(feature = "drm")]
pub use drm::DumbBuffers;
pub use error::{Error, PointerError, VfioError};
#[cfg(feature = "gbm")]
pub use gbm::Gbm;
#[cfg(feature = "hsa")]
pub use hsa::Hsa;
#[cfg(feature = "level-zero")]
pub use level_zero::LevelZero;
pub use runtime::{ExportOptions, ExportedRange, Extent, MemoryKind, PointerInfo, Runtime, Runtimes};
pub use udmabuf::{PageKind, Udmabuf};
pub use v4l2::CaptureDevice;
pub use vfio::VfioDevice;
#[cfg(feature = "vulkan")]
pub use vulkan::{Vulkan, VulkanBuffer};

pub(crate) use backing::transparent_page_size;

use crate::dmabuf::DmaBuf;

type Result<T, E = Error> = std::result::Result<T, E>;

/// Allocates buffers and exports them as dma-bufs.
pub trait Exporter: fmt::Debug {
    /// The exporter's name, for messages: `dma-heap system`, `udmabuf`, `drm vgem (card1)`.
    fn name(&self) -> String;

    /// Allocates at least `size` bytes, zeroed, and exports them readable and writable.
    ///
    /// Allocators round `size` up to their page; [`DmaBuf::size`] is the result.
    ///
    /// # Errors
    /// - [`Error::Range`]: a size of 0. [`Error::SizeTooLarge`]: more than 2^63 - 1 bytes.
    /// - Otherwise as the exporter documents.
    fn allocate(&self, size: u64) -> Result<Allocation>;
}

/// A new buffer: its dma-buf, and for a udmabuf the host pages behind it.
#[derive(Debug)]
pub struct Allocation {
    /// The exported buffer.
    pub dmabuf: DmaBuf,
    /// The memfds behind a udmabuf, mapped; `None` for memory that a driver owns.
    pub backing: Option<Backing>,
}

/// Opens an exporter's device; a missing device and a forbidden one are different errors.
fn open_device(path: &Path, missing: &str, forbidden: &str) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|source| open_error(path, missing, forbidden, source))
}

fn open_error(path: &Path, missing: &str, forbidden: &str, source: io::Error) -> Error {
    let device = path.display().to_string();
    match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => Error::NotPermitted { device, remedy: forbidden.into(), source },
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTDIR) => {
            Error::Missing { device, remedy: missing.into(), source }
        }
        _ => Error::Unusable { device, source },
    }
}

/// The nodes of a folder with this prefix and a number, in order of the numbers; none without the folder.
fn nodes(folder: &str, prefix: &str) -> Result<Vec<PathBuf>> {
    let unusable = |source| Error::Unusable { device: folder.into(), source };
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(unusable)?,
    };
    let mut nodes: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    nodes.sort();
    Ok(nodes.into_iter().map(|(_, path)| path).collect())
}

/// The PCI address of the device that a node belongs to, if sysfs knows one.
fn pci_device_of(
    node: &Path,
    find: impl FnOnce(&Sysfs, &str) -> pci::Result<Location>,
) -> Option<PciAddress> {
    // A name by udev, such as /dev/dri/by-path/…, is a link to the node.
    let node = fs::canonicalize(node).ok()?;
    let found = find(&Sysfs::new(), node.file_name()?.to_str()?).ok()?;
    found.into_pci().ok().map(|device| device.address())
}

/// Rounds `size` up to whole pages of `page` bytes; refuses 0 and sizes beyond 2^63 - 1.
pub(crate) fn whole_pages(size: u64, page: u64) -> Result<u64> {
    if size == 0 {
        return Err(RangeError::Empty { offset: 0 }.into());
    }
    let rounded = size.checked_next_multiple_of(page).filter(|size| *size <= i64::MAX as u64);
    rounded.ok_or(Error::SizeTooLarge { size })
}

/// The bytes of the aligned 32-bit words inside a range.
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero", feature = "vulkan"))]
fn whole_words(range: std::ops::Range<u64>) -> Result<std::ops::Range<u64>, RangeError> {
    let std::ops::Range { start, end } = range;
    let words = start.checked_next_multiple_of(4).map(|first| first..end - end % 4);
    words.filter(|words| !words.is_empty()).ok_or(RangeError::NoWord { start, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_and_a_forbidden_one_are_different_errors() {
        let path = Path::new("/dev/no-such-exporter");
        let Err(error) = open_device(path, "load the module", "be root") else { panic!("opened {path:?}") };
        assert!(matches!(error, Error::Missing { .. }));
        assert_eq!(error.to_string(), "/dev/no-such-exporter is missing: load the module");

        let error =
            |errno| open_error(path, "load the module", "be root", io::Error::from_raw_os_error(errno));
        let denied = error(libc::EACCES);
        assert!(matches!(denied, Error::NotPermitted { .. }));
        assert_eq!(denied.to_string(), "no permission to open /dev/no-such-exporter: be root");
        assert!(matches!(error(libc::EMFILE), Error::Unusable { .. }));
    }

    /// As the crate's documentation says of all types.
    #[test]
    #[cfg(all(feature = "cuda", feature = "hsa", feature = "level-zero", feature = "vulkan"))]
    fn exporters_and_their_buffers_are_send_and_sync() {
        fn any_thread<T: Send + Sync>() {}
        any_thread::<(Cuda, Hsa, LevelZero, Vulkan, VulkanBuffer, DeviceMemory)>();
        #[cfg(feature = "gbm")]
        any_thread::<Gbm>();
        any_thread::<(Runtimes, ExportedRange, PointerInfo, CaptureDevice, Error)>();
    }

    #[test]
    fn sizes_are_rounded_up_and_checked() {
        assert_eq!(whole_pages(1, 4096).unwrap(), 4096);
        assert_eq!(whole_pages(4096, 4096).unwrap(), 4096);
        assert_error!(whole_pages(0, 4096), Error::Range(RangeError::Empty { .. }));
        assert_error!(whole_pages(u64::MAX, 4096), Error::SizeTooLarge { .. });
        assert_error!(whole_pages(1 << 63, 4096), Error::SizeTooLarge { .. });
    }

    #[test]
    #[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero", feature = "vulkan"))]
    fn only_words_inside_the_range_are_filled() {
        assert_eq!(whole_words(0..8), Ok(0..8));
        assert_eq!(whole_words(1..11), Ok(4..8));
        assert_eq!(whole_words(u64::MAX - 7..u64::MAX), Ok(u64::MAX - 7..u64::MAX - 3));
        for (start, end) in [(0, 3), (4, 7), (5, 8), (5, 7), (0, 0), (u64::MAX - 2, u64::MAX)] {
            assert_eq!(whole_words(start..end), Err(RangeError::NoWord { start, end }));
        }
    }
}
