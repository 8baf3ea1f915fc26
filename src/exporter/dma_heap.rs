//! dma-buf heaps: memory that the kernel allocates for sharing, `/dev/dma_heap/*`.
//!
//! Source: `drivers/dma-buf/dma-heap.c`, `drivers/dma-buf/heaps/system_heap.c`.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use super::{Allocation, Exporter, open_device, open_error, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::umem::page_size;
use crate::{Error, Result};

const DIRECTORY: &str = "/dev/dma_heap";
const MISSING: &str = "the kernel lacks this heap (CONFIG_DMABUF_HEAPS_SYSTEM for `system`, Debian from 6.12 on); DmaHeap::list() names those present";
const FORBIDDEN: &str = "run as root, or give your group access to the heap by a udev rule";

/// One dma-buf heap.
#[derive(Debug)]
pub struct DmaHeap {
    name: String,
    device: File,
}

impl DmaHeap {
    /// Names of the heaps of this machine, sorted: `system`, often `default_cma_region`, …
    ///
    /// # Errors
    /// [`Error::ExporterMissing`] or [`Error::ExporterNotPermitted`] for `/dev/dma_heap` itself.
    pub fn list() -> Result<Vec<String>> {
        let failed = |source| open_error(Path::new(DIRECTORY), MISSING, FORBIDDEN, source);
        let mut names = fs::read_dir(DIRECTORY)
            .and_then(|entries| {
                entries
                    .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                    .collect::<io::Result<Vec<_>>>()
            })
            .map_err(failed)?;
        names.sort();
        Ok(names)
    }

    /// Opens a heap by name; `system` is there on most kernels.
    ///
    /// # Errors
    /// [`Error::ExporterMissing`]: no such heap. [`Error::ExporterNotPermitted`]: not for this user.
    pub fn open(name: &str) -> Result<Self> {
        let device = open_device(&Path::new(DIRECTORY).join(name), MISSING, FORBIDDEN)?;
        Ok(Self { name: name.into(), device })
    }
}

impl Exporter for DmaHeap {
    fn name(&self) -> String {
        format!("dma-heap {}", self.name)
    }

    /// # Errors
    /// [`Error::Export`]: `ENOMEM` when the heap has no more.
    #[doc(alias = "DMA_HEAP_IOCTL_ALLOC")]
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let size = whole_pages(size, page_size())?;
        let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
        let fd = rdma_sys_ext::dma_heap::alloc(self.device.as_fd(), size, flags).map_err(|source| {
            Error::Export { exporter: self.name(), operation: "allocate a buffer", size, source }
        })?;
        Ok(Allocation { dmabuf: DmaBuf::from_fd(fd)?, backing: None })
    }
}
