//! The address of a PCI function.

use std::fmt;
use std::str::FromStr;

use super::{Error, Result};

/// Domain, bus, device and function number of a PCI function: `0000:03:00.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Domain (segment): 0 on most machines, above 0xffff behind some storage controllers.
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// Whether both are functions of the device in one slot.
    pub(super) fn same_slot(&self, other: &Self) -> bool {
        (self.domain, self.bus, self.device) == (other.domain, other.bus, other.device)
    }

    /// Parses `DDDD:BB:DD.F`, or `BB:DD.F` in domain 0.
    pub(super) fn parse(text: &str) -> Option<Self> {
        // from_str_radix would accept a sign.
        let hex = |text: &str, digits: std::ops::RangeInclusive<usize>| {
            let plain = digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(text, 16).ok()).flatten()
        };
        let (rest, function) = text.rsplit_once('.')?;
        let (rest, device) = rest.rsplit_once(':')?;
        let (domain, bus) = rest.split_once(':').unwrap_or(("0000", rest));
        let (domain, bus) = (hex(domain, 4..=8)?, hex(bus, 2..=2)?);
        let (device, function) = (hex(device, 2..=2)?, hex(function, 1..=1)?);
        let valid = device < 32 && function < 8;
        valid.then_some(Self { domain, bus: bus as u8, device: device as u8, function: function as u8 })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = Error;

    /// Parses `0000:03:00.0`, or `03:00.0` as lspci prints it, in domain 0.
    ///
    /// # Errors
    /// [`Error::InvalidPciAddress`]: the text is not a PCI address.
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text).ok_or_else(|| Error::InvalidPciAddress { text: text.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_format_of_sysfs() {
        for text in ["0000:03:00.0", "ffff:ff:1f.7", "10000:e1:00.0"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        assert_eq!("3b:0a.1".parse::<PciAddress>().unwrap().to_string(), "0000:3b:0a.1");
        let broken = [
            "",
            "rxe0",
            "0000:03:00",
            "0000:03:20.0",
            "0000:03:00.8",
            "000:03:00.0",
            "0000:3:00.0",
            "+000:03:00.0",
            "0000:03:00.0 ",
            "0000:03:00.0.0",
            "1:0000:03:00.0",
            "123456789:03:00.0",
            "virtio0",
            "pci0000:00",
        ];
        for text in broken {
            let refused = text.parse::<PciAddress>();
            assert!(matches!(&refused, Err(Error::InvalidPciAddress { text: t }) if t == text), "{text:?}");
        }
    }
}
