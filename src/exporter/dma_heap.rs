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
    /// - [`Error::OutOfMemory`]: more than the system has. The system heap would take what there is and
    ///   have the kernel kill processes for the rest, so this is checked before.
    /// - [`Error::Export`]: `ENOMEM` when the heap has no more.
    #[doc(alias = "DMA_HEAP_IOCTL_ALLOC")]
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let _span = crate::observe::exporting(|| self.name(), size);
        let size = whole_pages(size, page_size())?;
        if let Some(available) = available_memory().filter(|available| size > *available) {
            return Err(Error::OutOfMemory { exporter: self.name(), requested: size, available });
        }
        let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
        let fd = rdma_sys_ext::dma_heap::alloc(self.device.as_fd(), size, flags).map_err(|source| {
            Error::Export { exporter: self.name(), operation: "allocate a buffer", size, source }
        })?;
        Ok(Allocation { dmabuf: DmaBuf::from_fd(fd)?, backing: None })
    }
}

/// Bytes that the system could give, by its own estimate; `None` where it gives none.
fn available_memory() -> Option<u64> {
    available(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn available(meminfo: &str) -> Option<u64> {
    let kib = |key: &str| {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    Some((kib("MemAvailable:")? + kib("SwapFree:")?) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_what_can_be_freed_and_swapped() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   1000 kB\nSwapFree:         24 kB\n";
        assert_eq!(available(text), Some(1024 << 10));
        assert_eq!(available("MemTotal:  1 kB\n"), None);
        assert!(available_memory().is_some_and(|bytes| bytes > 1 << 20));
    }
}
