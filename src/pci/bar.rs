//! The memory of a PCI device: its base address registers, from the sysfs files `resource` and `config`.

use std::fmt;

use super::config::Config;
use super::sysfs::{PciDevice, invalid};
use crate::sg::{DmaSg, DmaSgList};
use crate::{Error, Result};

/// Flags of the third column of `resource` (`include/linux/ioport.h`).
const IO: u64 = 0x100;
const PREFETCHABLE: u64 = 0x2000;
const MEMORY_64: u64 = 0x10_0000;
/// `IORESOURCE_DISABLED` and `IORESOURCE_UNSET`.
const NO_ADDRESS: u64 = 0x1000_0000 | 0x2000_0000;

/// How many base address registers a function has.
const BARS: usize = 6;

/// What a BAR's addresses are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// Memory addresses.
    Memory,
    /// I/O ports, which DMA cannot reach.
    IoPort,
}

/// A base address register: a window into a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bar {
    /// Its number, 0 to 5. One of 64 bits takes the next number as well.
    pub index: u8,
    /// Memory or I/O ports.
    pub kind: BarKind,
    /// Where the CPU sees it: the physical address in /proc/iomem.
    pub cpu_address: u64,
    /// Where another device on the bus sees it: what the register itself holds. On x86 both are equal;
    /// a host bridge with an offset, as on some Arm and POWER machines, makes them differ.
    pub bus_address: u64,
    /// Size in bytes, a power of two, never 0.
    pub size: u64,
    /// Reading it has no side effects, so that it may be read ahead and writes may be combined.
    pub is_prefetchable: bool,
    /// The register has 64 bits, so the window may lie above 4 GiB.
    pub is_64bit: bool,
    /// Firmware or kernel gave it an address; without one, the addresses here mean nothing.
    pub has_address: bool,
}

/// Why DMA cannot go to a BAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BarRefusal {
    /// There is none of that number, or it has 0 bytes.
    Absent {
        /// The numbers of those that there are.
        present: Vec<u8>,
    },
    /// It is of I/O ports.
    IoPort,
    /// Firmware and kernel gave it no address.
    NoAddress,
    /// The device has memory decoding off.
    NotDecoding,
    /// The device does not answer.
    PoweredDown,
}

impl fmt::Display for BarRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent { present } => {
                return write!(f, "is not there or has 0 bytes: there is {present:?}");
            }
            Self::IoPort => "is of I/O ports, which DMA cannot reach: take a memory BAR",
            Self::NoAddress => "was given no address: boot with pci=realloc, or see the firmware's settings",
            Self::NotDecoding => "is off: bind the device's driver, or write 1 to its `enable` in sysfs",
            Self::PoweredDown => "is off with its device: write `on` to its power/control in sysfs",
        })
    }
}

impl Bar {
    /// Its bus addresses, as one run. Behind an IOMMU that translates, a device has to be given IOVAs
    /// instead, which only the kernel can make.
    pub fn sg(&self) -> DmaSgList {
        DmaSgList::single(DmaSg { addr: self.bus_address, len: self.size })
    }
}

impl PciDevice {
    /// All BARs of the device that have a size, switched on or not, in order.
    ///
    /// # Errors
    /// [`AddressError::Sysfs`](crate::error::AddressError::Sysfs): `resource` or `config` cannot be read, or is not of the form that the kernel
    /// gives it (`drivers/pci/pci-sysfs.c`).
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

    /// The memory BAR with this number, which is there and switched on.
    ///
    /// # Errors
    /// - [`AddressError::BarUnusable`](crate::error::AddressError::BarUnusable): it is not there, of size 0, of I/O ports, or the device does not answer
    ///   at it; [`BarRefusal`] says which.
    /// - [`AddressError::Sysfs`](crate::error::AddressError::Sysfs): as for [`bars`](Self::bars).
    pub fn bar(&self, index: u8) -> Result<Bar> {
        let bars = self.bars()?;
        let refused = |refusal| {
            Error::Addresses(crate::error::AddressError::BarUnusable {
                device: self.address(),
                bar: index,
                refusal,
            })
        };
        let Some(bar) = bars.iter().find(|bar| bar.index == index) else {
            return Err(refused(BarRefusal::Absent { present: bars.iter().map(|bar| bar.index).collect() }));
        };
        if bar.kind == BarKind::IoPort {
            return Err(refused(BarRefusal::IoPort));
        }
        if !bar.has_address {
            return Err(refused(BarRefusal::NoAddress));
        }
        // A virtual function has neither registers nor a decode bit: its physical one decodes for it.
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

/// One line of `resource`; `Some(None)` for a BAR that is not there.
fn parse(index: usize, line: &str, config: &Config) -> Option<Option<Bar>> {
    let [start, end, flags] = columns(line)?;
    if flags == 0 || (start, end) == (0, 0) {
        return Some(None);
    }
    let size = end.checked_sub(start)?.checked_add(1)?;
    let is_64bit = flags & MEMORY_64 != 0;
    let kind = if flags & IO != 0 { BarKind::IoPort } else { BarKind::Memory };
    // A virtual function's registers read as 0; then there is the CPU's address to go by.
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
