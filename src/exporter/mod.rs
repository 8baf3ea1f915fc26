//! Who makes dma-bufs: one file or folder an allocator, and two traits.
//!
//! [`Exporter`] makes a buffer. [`Runtime`] says what is under a pointer that somebody else's allocator
//! returned, and exports it; [`Runtimes`] asks all that are loaded. `docs/exporters.md` says which
//! exporter gives what, and how to come from a framework's pointer to a region.

/// Asserts that a result is one exact error of an exporter's.
#[cfg(test)]
macro_rules! assert_error {
    ($result:expr, $error:pat) => {
        match $result {
            Err($crate::Error::Exporters($error)) => {}
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
#[cfg(feature = "gbm")]
pub mod gbm;
#[cfg(feature = "hsa")]
pub mod hsa;
#[cfg(feature = "level-zero")]
pub mod level_zero;
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero", feature = "vulkan"))]
mod library;
pub mod runtime;
pub mod udmabuf;
pub mod v4l2;
pub mod vfio;
#[cfg(feature = "vulkan")]
pub mod vulkan;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

pub use backing::Backing;
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
#[cfg(any(feature = "cuda", feature = "hsa", feature = "level-zero"))]
pub use device_memory::DeviceMemory;
pub use dma_heap::DmaHeap;
#[cfg(feature = "drm")]
pub use drm::DumbBuffers;
#[cfg(feature = "gbm")]
pub use gbm::{Gbm, GbmImage};
#[cfg(feature = "hsa")]
pub use hsa::Hsa;
#[cfg(feature = "level-zero")]
pub use level_zero::LevelZero;
pub use runtime::{Exported, Found, MemoryKind, Piece, Runtime, Runtimes};
pub use udmabuf::{Pages, Udmabuf};
pub use v4l2::CaptureDevice;
pub use vfio::VfioDevice;
#[cfg(feature = "vulkan")]
pub use vulkan::{Vulkan, VulkanBuffer};

use crate::dmabuf::DmaBuf;
use crate::{Error, Result};

/// Something that allocates buffers and exports them as dma-bufs.
pub trait Exporter: fmt::Debug {
    /// What makes the buffers, for messages: `dma-heap system`, `udmabuf`, `drm vgem (card1)`.
    fn name(&self) -> String;

    /// Allocates at least `size` bytes, zeroed, and exports them readable and writable.
    ///
    /// Allocators round up to their page; [`DmaBuf::size`] is what was made.
    ///
    /// # Errors
    /// [`Error::ZeroLength`] for a size of 0, [`Error::SizeTooLarge`] beyond 2^63 - 1; otherwise as the
    /// exporter's own documentation says.
    fn allocate(&self, size: u64) -> Result<Allocation>;
}

/// A new buffer: its dma-buf, and the host pages behind it where they are ours.
#[derive(Debug)]
pub struct Allocation {
    /// The exported buffer.
    pub dmabuf: DmaBuf,
    /// The memfds behind a udmabuf and their mapping; `None` for memory that a driver owns.
    pub backing: Option<Backing>,
}

/// Opens an exporter's device, telling a missing one from a forbidden one.
fn open_device(path: &Path, missing: &str, forbidden: &str) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|source| open_error(path, missing, forbidden, source))
}

fn open_error(path: &Path, missing: &str, forbidden: &str, source: io::Error) -> Error {
    let device = path.display().to_string();
    match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            Error::ExporterNotPermitted { device, remedy: forbidden.into(), source }
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTDIR) => {
            Error::ExporterMissing { device, remedy: missing.into(), source }
        }
        _ => Error::ExporterUnusable { device, source },
    }
}

/// `size` rounded up to whole pages of `page` bytes; refuses 0 and what does not fit.
fn whole_pages(size: u64, page: u64) -> Result<u64> {
    if size == 0 {
        return Err(Error::ZeroLength { offset: 0 });
    }
    let rounded = size.checked_next_multiple_of(page).filter(|size| *size <= i64::MAX as u64);
    rounded.ok_or(Error::SizeTooLarge { size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_and_a_forbidden_one_are_told_apart() {
        let path = Path::new("/dev/no-such-exporter");
        let Err(error) = open_device(path, "load the module", "be root") else { panic!("opened {path:?}") };
        assert!(matches!(error, Error::ExporterMissing { .. }));
        assert_eq!(error.to_string(), "/dev/no-such-exporter is not there: load the module");

        let denied = io::Error::from_raw_os_error(libc::EACCES);
        let error = open_error(path, "load the module", "be root", denied);
        assert!(matches!(error, Error::ExporterNotPermitted { .. }));
        let exhausted = io::Error::from_raw_os_error(libc::EMFILE);
        let exhausted = open_error(path, "load the module", "be root", exhausted);
        assert!(matches!(exhausted, Error::ExporterUnusable { .. }));
        assert_eq!(error.to_string(), "/dev/no-such-exporter may not be opened: be root");
    }

    /// As the crate's documentation says of all types.
    #[test]
    #[cfg(all(feature = "cuda", feature = "hsa", feature = "level-zero", feature = "vulkan"))]
    fn exporters_and_what_they_make_go_to_any_thread() {
        fn any_thread<T: Send + Sync>() {}
        any_thread::<(Cuda, Hsa, LevelZero, Vulkan, VulkanBuffer, DeviceMemory)>();
        #[cfg(feature = "gbm")]
        any_thread::<(Gbm, GbmImage)>();
        any_thread::<(Runtimes, Exported, Found, CaptureDevice, v4l2::Capture)>();
    }

    #[test]
    fn sizes_are_rounded_up_and_checked() {
        assert_eq!(whole_pages(1, 4096).unwrap(), 4096);
        assert_eq!(whole_pages(4096, 4096).unwrap(), 4096);
        assert!(matches!(whole_pages(0, 4096), Err(Error::ZeroLength { .. })));
        assert!(matches!(whole_pages(u64::MAX, 4096), Err(Error::SizeTooLarge { .. })));
        assert!(matches!(whole_pages(1 << 63, 4096), Err(Error::SizeTooLarge { .. })));
    }
}
