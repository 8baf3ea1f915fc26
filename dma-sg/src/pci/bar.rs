//! The base address registers (BARs) of a PCI device, from the sysfs files `resource` and `config`.

use std::fmt;

use super::config::Config;
use super::sysfs::{PciDevice, invalid};
use super::{Error, Result};
use crate::{DmaSg, DmaSgList};

/// Flags in the third column of `resource` (`include/linux/ioport.h`).
const IO: u64 = 0x100;
const PREFETCHABLE: u64 = 0x2000;
const MEMORY_64: u64 = 0x10_0000;
/// `IORESOURCE_DISABLED` and `IORESOURCE_UNSET`.
const NO_ADDRESS: u64 = 0x1000_0000 | 0x2000_0000;

/// Base address registers per function.
const BARS: usize = 6;

/// The address space of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// Memory.
    Memory,
    /// I/O ports, which DMA cannot reach.
    IoPort,
}

/// A base address register (BAR): a window into a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bar {
    /// Number of the BAR, 0 to 5. A 64-bit BAR also takes the next number.
    pub index: u8,
    /// Memory or I/O ports.
    pub kind: BarKind,
    /// Address for the CPU: the physical address in /proc/iomem.
    pub cpu_address: u64,
    /// Address for another device on the bus: the value of the register. On x86 both addresses are equal;
    /// behind a host bridge with an offset, as on some Arm and POWER machines, they differ.
    pub bus_address: u64,
    /// Size in bytes, a power of two; never 0.
    pub size: u64,
    /// Reads have no side effects, so bridges may prefetch reads and combine writes.
    pub is_prefetchable: bool,
    /// The register has 64 bits, so the window can lie above 4 GiB.
    pub is_64bit: bool,
    /// Firmware or kernel assigned an address. Otherwise both addresses are meaningless.
    pub has_address: bool,
}

/// Why a BAR cannot be a target of DMA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BarRefusal {
    /// The device has no BAR of this number, or it has 0 bytes.
    Absent {
        /// Numbers of the BARs that the device has.
        present: Vec<u8>,
    },
    /// It is a window of I/O ports.
    IoPort,
    /// Neither firmware nor kernel assigned an address.
    NoAddress,
    /// Memory decoding is off in the command register.
    NotDecoding,
    /// The device does not answer.
    PoweredDown,
}

impl fmt::Display for BarRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent { present } => {
                return write!(f, "does not exist or has 0 bytes: choose one of {present:?}");
            }
            Self::IoPort => "is a window of I/O ports, which DMA cannot reach: choose a memory BAR",
            Self::NoAddress => {
                "has no address: boot with pci=realloc, or enable above-4G decoding in the firmware"
            }
            Self::NotDecoding => {
                "is off: bind the device's driver, or write 1 to `enable` in its sysfs folder"
            }
            Self::PoweredDown => {
                "is off because its device is powered down: write `on` to `power/control` in its sysfs folder"
            }
        })
    }
}

impl Bar {
    /// The bus addresses of the BAR, as one run.
    ///
    /// A device behind a translating IOMMU needs IOVAs instead, which only the kernel can assign.
    ///
    /// # Errors
    /// Address or size were changed to those of no BAR:
    /// - [`RangeError::Empty`](crate::RangeError::Empty): `size` is 0.
    /// - [`Error::AddressOverflow`](crate::Error::AddressOverflow): the end does not fit in 64 bits.
    pub fn sg(&self) -> crate::Result<DmaSgList> {
        DmaSgList::from_runs([DmaSg { addr: self.bus_address, len: self.size }])
    }
}

impl PciDevice {
    /// All BARs of the device that have a size, enabled or not, by number.
    ///
    /// # Errors
    /// [`Error::Sysfs`]: `resource` or `config` cannot be read, or `resource` does not have the kernel's
    /// format (`InvalidData`; `drivers/pci/pci-sysfs.c`).
    pub fn bars(&self) -> Result<Vec<Bar>> {
        let config = self.config()?;
        let path = self.path().join("resource");
        let text = self.read("resource")?;
        let mut bars = Vec::new();
        for (index, line) in text.lines().take(BARS).enumerate() {
            let bar =
                parse(index, line, &config).ok_or_else(|| invalid(&path, "three hexadecimal columns"))?;
            bars.extend(bar);
        }
        Ok(bars)
    }

    /// The memory BAR with this number, ready for DMA.
    ///
    /// # Errors
    /// - [`Error::BarUnusable`]: DMA cannot reach it; the error's [`BarRefusal`] says why.
    /// - [`Error::Sysfs`]: see [`bars`](Self::bars).
    pub fn bar(&self, index: u8) -> Result<Bar> {
        let bars = self.bars()?;
        let refused = |refusal| Error::BarUnusable { device: self.address(), bar: index, refusal };
        let Some(bar) = bars.iter().find(|bar| bar.index == index) else {
            return Err(refused(BarRefusal::Absent { present: bars.iter().map(|bar| bar.index).collect() }));
        };
        if bar.kind == BarKind::IoPort {
            return Err(refused(BarRefusal::IoPort));
        }
        if !bar.has_address {
            return Err(refused(BarRefusal::NoAddress));
        }
        // A virtual function has neither registers nor a decode bit; its physical function decodes for it.
        let config = self.config()?;
        match (config.answers(), config.decodes_memory()) {
            _ if self.path().join("physfn").exists() => Ok(*bar),
            (false, _) => Err(refused(BarRefusal::PoweredDown)),
            (true, Some(true)) => Ok(*bar),
            (true, _) => Err(refused(BarRefusal::NotDecoding)),
        }
    }
}

fn columns(line: &str) -> Option<[u64; 3]> {
    let mut words = line.split_ascii_whitespace();
    let mut next = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    Some([next()?, next()?, next()?])
}

/// Parses one line of `resource`; `Some(None)` for a BAR that does not exist.
fn parse(index: usize, line: &str, config: &Config) -> Option<Option<Bar>> {
    let [start, end, flags] = columns(line)?;
    if flags == 0 || (start, end) == (0, 0) {
        return Some(None);
    }
    let size = end.checked_sub(start)?.checked_add(1)?;
    start.checked_add(size)?;
    let is_64bit = flags & MEMORY_64 != 0;
    let kind = if flags & IO != 0 { BarKind::IoPort } else { BarKind::Memory };
    // The registers of a virtual function read as 0; the CPU's address is the best guess then.
    let register = match kind {
        BarKind::Memory => config.bar(index, is_64bit && index + 1 < BARS).filter(|address| *address != 0),
        BarKind::IoPort => None,
    };
    let bus_address = register.filter(|address| address.checked_add(size).is_some()).unwrap_or(start);
    Some(Some(Bar {
        index: index as u8,
        kind,
        cpu_address: start,
        bus_address,
        size,
        is_prefetchable: flags & PREFETCHABLE != 0,
        is_64bit,
        has_address: flags & NO_ADDRESS == 0,
    }))
}
