//! dma-buf heaps, `/dev/dma_heap/*`: memory that the kernel allocates for sharing between devices.
//!
//! Source: `drivers/dma-buf/dma-heap.c`, `drivers/dma-buf/heaps/system_heap.c`.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use dma_sg::page_size;

use super::{Allocation, Error, Exporter, Result, memory, open_device, open_error, whole_pages};
use crate::dmabuf::DmaBuf;

const DIRECTORY: &str = "/dev/dma_heap";
const MISSING: &str = "the kernel lacks this heap (CONFIG_DMABUF_HEAPS_SYSTEM for `system`, Debian from 6.12 on); ls /dev/dma_heap lists those that exist";
/// Whether the kernel charges the memory to the cgroup; older kernels do not have it.
const ACCOUNTING: &str = "/sys/module/dma_heap/parameters/mem_accounting";
const FORBIDDEN: &str = "run as root, or give your group access to the heap by a udev rule";

/// One dma-buf heap.
#[derive(Debug)]
pub struct DmaHeap {
    name: String,
    device: File,
}

impl DmaHeap {
    /// The names of this machine's heaps, sorted: `system`, often `default_cma_region`, …
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NotPermitted`]: `/dev/dma_heap` itself.
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

    /// Opens a heap by name. Most kernels have `system`.
    ///
    /// # Errors
    /// - [`Error::Missing`]: no heap has that name.
    /// - [`Error::NotPermitted`]: this user may not open it. [`Error::Unusable`]: opening failed otherwise.
    pub fn open(name: &str) -> Result<Self> {
        let device = open_device(&Path::new(DIRECTORY).join(name), MISSING, FORBIDDEN)?;
        Ok(Self { name: name.into(), device })
    }
}

impl Exporter for DmaHeap {
    fn name(&self) -> String {
        format!("dma-heap {}", self.name)
    }

    /// The kernel does not charge this memory to the cgroup, so the limits of a container do not count, unless
    /// the parameter `dma_heap.mem_accounting` of a newer kernel is on.
    ///
    /// # Errors
    /// - [`Error::OutOfMemory`]: more than the system has free, swap included. This is checked beforehand,
    ///   because the system heap takes all there is, and then the kernel kills processes.
    /// - [`Error::Allocate`]: `ENOMEM` when the heap is used up.
    #[doc(alias = "DMA_HEAP_IOCTL_ALLOC")]
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let _span = crate::observe::exporting(|| self.name(), size);
        let size = whole_pages(size, page_size())?;
        let charged = fs::read_to_string(ACCOUNTING).is_ok_and(|text| text.starts_with('Y'));
        memory::check(|| self.name(), size, charged)?;
        let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
        let fd = rdma_sys_ext::dma_heap::alloc(self.device.as_fd(), size, flags).map_err(|source| {
            Error::Allocate { exporter: self.name(), operation: "allocate a buffer", size, source }
        })?;
        Ok(Allocation { dmabuf: DmaBuf::from_fd(fd)?, backing: None })
    }
}
