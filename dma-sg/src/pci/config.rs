//! Fields of configuration space: command, BAR registers, port type, ACS.
//!
//! Offsets and bits are those of `include/uapi/linux/pci_regs.h`. An unprivileged user can read the first
//! 64 bytes of the file `config`, root all 256 or 4096. A field that could not be read is `None`, never 0.

/// The readable bytes of configuration space.
#[derive(Debug)]
pub(super) struct Config(pub(super) Vec<u8>);

/// The PCI Express type of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PortType {
    Root,
    Upstream,
    Downstream,
    /// An endpoint, or a bridge to or from conventional PCI.
    Other,
}

const STATUS_HAS_CAPABILITIES: u16 = 1 << 4;
const ID_EXPRESS: u8 = 0x10;
const EXTENDED_ID_ACS: u16 = 0x0d;
const EXTENDED_START: usize = 0x100;
/// Request redirect, completion redirect and egress control: with any of these a port redirects peer-to-peer
/// traffic to the root (`pci_bridge_has_acs_redir` in `drivers/pci/p2pdma.c`).
const ACS_REDIRECTS: u16 = 1 << 2 | 1 << 3 | 1 << 5;

impl Config {
    fn u8(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn u16(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(self.0.get(at..at + 2)?.try_into().ok()?))
    }

    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.0.get(at..at + 4)?.try_into().ok()?))
    }

    /// Whether the function answers. One that is powered down or gone reads as all ones.
    pub(super) fn answers(&self) -> bool {
        self.u32(0).is_some_and(|id| id != u32::MAX)
    }

    /// Whether memory decoding is on.
    pub(super) fn decodes_memory(&self) -> Option<bool> {
        Some(self.u16(4)? & 2 != 0)
    }

    /// The bus address in the BAR registers from `index` on.
    pub(super) fn bar(&self, index: usize, is_64bit: bool) -> Option<u64> {
        let low = self.u32(0x10 + 4 * index)? & !0xf;
        let high = if is_64bit { self.u32(0x14 + 4 * index)? } else { 0 };
        Some(u64::from(high) << 32 | u64::from(low))
    }

    /// The port type in the PCI Express capability.
    pub(super) fn port_type(&self) -> Option<PortType> {
        if self.u16(6)? & STATUS_HAS_CAPABILITIES == 0 {
            return Some(PortType::Other);
        }
        let mut at = self.u8(0x34)? & !3;
        // A capability takes at least 4 bytes, so a longer list is a loop.
        for _ in 0..48 {
            if at < 0x40 {
                return Some(PortType::Other);
            }
            if self.u8(at.into())? == ID_EXPRESS {
                let flags = self.u16(usize::from(at) + 2)?;
                return Some(match flags >> 4 & 0xf {
                    4 => PortType::Root,
                    5 => PortType::Upstream,
                    6 => PortType::Downstream,
                    _ => PortType::Other,
                });
            }
            at = self.u8(usize::from(at) + 1)? & !3;
        }
        Some(PortType::Other)
    }

    /// Whether Access Control Services redirect peer-to-peer traffic to the root. A function without ACS
    /// redirects nothing.
    pub(super) fn redirects(&self) -> Option<bool> {
        if self.0.len() < EXTENDED_START {
            return None;
        }
        if !self.answers() {
            return None;
        }
        let mut at = EXTENDED_START;
        // The extended space holds at most this many headers, so a longer list is a loop.
        for _ in 0..(4096 - EXTENDED_START) / 8 {
            let Some(header) = self.u32(at) else {
                // A conventional PCI function has 256 bytes and no extended capabilities.
                return (self.0.len() == EXTENDED_START).then_some(false);
            };
            if header == 0 || header == u32::MAX {
                return Some(false);
            }
            if header as u16 == EXTENDED_ID_ACS {
                return Some(self.u16(at + 6)? & ACS_REDIRECTS != 0);
            }
            at = (header >> 20) as usize & !3;
            if at < EXTENDED_START {
                return Some(false);
            }
        }
        Some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No input panics or loops forever.
    #[test]
    fn any_bytes_are_parsed() {
        let mut seed = 1_u64;
        let mut random = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as u8
        };
        for round in 0..3000 {
            let length = [0, 1, 5, 63, 64, 65, 128, 255, 256, 257, 260, 4095, 4096][round % 13];
            let mut bytes: Vec<u8> = (0..length).map(|_| random()).collect();
            if round % 3 == 0 {
                // Capability lists that point at themselves.
                bytes
                    .iter_mut()
                    .enumerate()
                    .for_each(|(at, byte)| *byte = if at % 2 == 0 { 0x40 } else { 0x10 });
            }
            let config = Config(bytes);
            let (_, _) = (config.port_type(), config.redirects());
            let (_, _) = (config.decodes_memory(), config.bar(5, true));
        }
    }

    #[test]
    fn unread_fields_are_unknown() {
        let mut bytes = vec![0_u8; 64];
        bytes[6] = 0x10;
        bytes[0x34] = 0x60;
        let config = Config(bytes.clone());
        assert_eq!((config.port_type(), config.redirects()), (None, None));
        assert_eq!(Config(Vec::new()).decodes_memory(), None);
        bytes.resize(256, 0);
        bytes[0x60] = 0x10;
        bytes[0x62] = 0x52;
        let config = Config(bytes.clone());
        assert_eq!((config.port_type(), config.redirects()), (Some(PortType::Upstream), Some(false)));
        // Extended space that ends in the middle of the list.
        bytes.resize(0x104, 0);
        bytes[0x100..0x104].copy_from_slice(&0x1501_0001_u32.to_le_bytes());
        assert_eq!(Config(bytes).redirects(), None);
    }
}
