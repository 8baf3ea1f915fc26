//! What a runtime reports about an address.

use std::fmt;

use dma_sg::pci::{self, P2pRoute, PciAddress, Sysfs, nearest};
use dma_sg::{RangeError, check_range};

use super::Result;
use crate::exporter::PointerError;

/// What a runtime reports about an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointerInfo {
    /// The runtime's name.
    pub runtime: &'static str,
    /// The address that was looked up.
    pub address: u64,
    /// First byte of the allocation; of [`MemoryKind::Virtual`], of the addresses that were reserved for mappings.
    pub base: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where the memory is.
    pub kind: MemoryKind,
    /// The number of this allocation, which is never used again in this process; `None` if there is none. Of
    /// [`MemoryKind::Virtual`], it is the number of one mapping.
    pub id: Option<u64>,
    /// The PCI device that the memory belongs to; `None` for host memory, and if the runtime does not say. The
    /// instances of a divided GPU (MIG) have the address of the GPU.
    pub device: Option<PciAddress>,
}

/// Where memory of a runtime is, and how it was allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryKind {
    /// In the device.
    Device,
    /// In the device, mapped into reserved addresses that may hold many mappings: `cuMemMap`, PyTorch's expandable
    /// segments, `hipMemMap`.
    Virtual,
    /// In the device, from a stream-ordered pool: `cudaMallocAsync`, memory nodes of graphs.
    Pool,
    /// In the device, allocated by another process and opened here: `hipIpcOpenMemHandle`. CUDA does not tell it from
    /// [`Device`](Self::Device).
    Imported,
    /// In the host: allocated, registered or locked by the runtime, or not known to any.
    Host,
    /// Managed: the runtime moves it to where it is used.
    Managed,
}

impl MemoryKind {
    /// What to use instead of memory that is not exported.
    pub(in crate::exporter) fn instead(self) -> &'static str {
        match self {
            Self::Host => {
                "which has no dma-buf: put the data into a memfd and make a udmabuf of it (exporter::Udmabuf), or register it with ibv_reg_mr"
            }
            Self::Managed => {
                "which moves between host and device: allocate device memory and copy the data there"
            }
            Self::Imported => {
                "which another process allocated: export it there, and send the descriptor over a Unix socket"
            }
            Self::Device | Self::Virtual | Self::Pool => {
                "which is not exported: allocate other device memory"
            }
        }
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device memory",
            Self::Virtual => "memory mapped into reserved addresses",
            Self::Pool => "memory of a stream-ordered pool",
            Self::Imported => "imported device memory",
            Self::Host => "host memory",
            Self::Managed => "managed memory",
        })
    }
}

impl PointerInfo {
    /// Checks that `length` bytes from the address can be exported, before the runtime is asked.
    ///
    /// # Errors
    /// - [`PointerError::WrongKind`]: host and managed memory is not exported.
    /// - [`PointerError::InvalidAnswer`]: the runtime's numbers cannot be true.
    /// - [`PointerError::Range`], [`PointerError::PastAllocation`]: `length` is 0, or too long.
    pub fn check(&self, length: u64) -> Result<()> {
        let Self { runtime, address, base, size, kind, .. } = *self;
        if matches!(kind, MemoryKind::Host | MemoryKind::Managed) {
            return Err(PointerError::WrongKind { runtime: Some(runtime), address, kind });
        }
        let Some(offset) = address.checked_sub(base).filter(|offset| *offset < size) else {
            return Err(self.impossible(base, size));
        };
        match check_range(offset, length, size) {
            Ok(()) if address.checked_add(length).is_some() => Ok(()),
            Err(empty @ RangeError::Empty { .. }) => Err(empty.into()),
            _ => Err(self.past(length, base, size)),
        }
    }

    /// The RDMA devices on the PCI bus, nearest to the memory first; empty if the runtime does not report the
    /// memory's device.
    ///
    /// # Errors
    /// As [`Sysfs::device`] and [`nearest`].
    pub fn nearest_nics(&self, sysfs: &Sysfs) -> Result<Vec<P2pRoute>, pci::Error> {
        let Some(device) = self.device else { return Ok(Vec::new()) };
        nearest(&sysfs.device(device)?, &sysfs.rdma_pci_devices()?)
    }

    /// The error for a range that does not lie in the allocation of `size` bytes from `base`.
    pub(in crate::exporter) fn past(&self, length: u64, base: u64, size: u64) -> PointerError {
        let (runtime, address) = (self.runtime, self.address);
        PointerError::PastAllocation { runtime, address, length, base, size }
    }

    /// The error for an allocation that does not contain the address for which the runtime reported it.
    pub(in crate::exporter) fn impossible(&self, base: u64, size: u64) -> PointerError {
        let what = format!("{size} bytes from {base:#x} as the allocation around {:#x}", self.address);
        PointerError::InvalidAnswer { runtime: self.runtime, call: "the look-up", what }
    }

    /// Checks that a second look-up of the address still finds the same allocation.
    #[cfg(any(test, feature = "cuda", feature = "hsa", feature = "level-zero"))]
    pub(in crate::exporter) fn check_alive(&self, now: Option<Self>) -> Result<()> {
        match now {
            Some(now) if now == *self => Ok(()),
            _ => Err(PointerError::Freed { runtime: self.runtime, address: self.address }),
        }
    }
}
