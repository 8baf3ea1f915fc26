//! What a peer must know to connect.

use crate::{Error, Result};

/// Description of a queue pair for its peer: plain data, to be sent by any means (a socket, MPI, a
/// key-value store). `serde` makes it serialisable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Endpoint {
    /// Number of the queue pair, 24 bits.
    pub qp_num: u32,
    /// First packet sequence number it sends, 24 bits.
    pub psn: u32,
    /// Local identifier of its port; 0 on RoCE.
    pub lid: u16,
    /// GID of its port; on RoCE made of the interface's IP address.
    pub gid: [u8; 16],
    /// Path MTU of its port in bytes; the smaller one of both ends is used.
    pub mtu: u32,
    /// READs and atomics that it answers at once; the smaller one of both ends is used.
    pub rd_atomic: u8,
}

impl Endpoint {
    /// Bytes of the fixed form.
    pub const BYTES: usize = 40;

    /// The description as bytes of a fixed form, little-endian: `dE` (2 bytes), version 1 (2), CRC-32 of
    /// the other bytes (4), `qp_num` (4), `psn` (4), `lid` (2), `rd_atomic` (1), 0 (1), `mtu` (4), `gid`
    /// (16).
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let Self { qp_num, psn, lid, gid, mtu, rd_atomic } = *self;
        let mut bytes = [0; Self::BYTES];
        bytes[..2].copy_from_slice(b"dE");
        bytes[2] = 1;
        bytes[8..12].copy_from_slice(&qp_num.to_le_bytes());
        bytes[12..16].copy_from_slice(&psn.to_le_bytes());
        bytes[16..18].copy_from_slice(&lid.to_le_bytes());
        bytes[18] = rd_atomic;
        bytes[20..24].copy_from_slice(&mtu.to_le_bytes());
        bytes[24..].copy_from_slice(&gid);
        let checksum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The description that these bytes are, from whoever they come.
    ///
    /// # Errors
    /// [`Error::InvalidEndpoint`]: another length or version, damaged, or nothing to connect to.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let invalid = |reason: String| Error::InvalidEndpoint { reason };
        let bytes: &[u8; Self::BYTES] = bytes
            .try_into()
            .map_err(|_| invalid(format!("{} bytes; a description has {}", bytes.len(), Self::BYTES)))?;
        if bytes[..4] != *b"dE\x01\0" {
            return Err(invalid(format!("it begins with {:02x?}, not as version 1 does", &bytes[..4])));
        }
        let four = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if four(4) != checksum(bytes) {
            return Err(invalid("its checksum is wrong".into()));
        }
        let mut gid = [0; 16];
        gid.copy_from_slice(&bytes[24..]);
        let lid = u16::from_le_bytes([bytes[16], bytes[17]]);
        let endpoint = Self { qp_num: four(8), psn: four(12), lid, gid, mtu: four(20), rd_atomic: bytes[18] };
        endpoint.check()?;
        Ok(endpoint)
    }

    /// Checks what came from a peer before the kernel sees it.
    pub(super) fn check(&self) -> Result<()> {
        let invalid = |reason: String| Err(Error::InvalidEndpoint { reason });
        let Self { qp_num, psn, lid, gid, mtu, .. } = *self;
        if qp_num == 0 || qp_num >> 24 != 0 {
            return invalid(format!("{qp_num:#x} is no queue pair number: those have 24 bits and are not 0"));
        }
        if psn >> 24 != 0 {
            return invalid(format!("{psn:#x} is no packet sequence number: those have 24 bits"));
        }
        if lid == 0 && gid == [0; 16] {
            return invalid("it has neither a GID nor a LID, so there is no address to reach it by".into());
        }
        if !matches!(mtu, 256 | 512 | 1024 | 2048 | 4096) {
            return invalid(format!("an MTU of {mtu} bytes; it is one of 256, 512, 1024, 2048, 4096"));
        }
        Ok(())
    }
}

/// Of everything but its own place.
fn checksum(bytes: &[u8; Endpoint::BYTES]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..4]);
    hasher.update(&bytes[8..]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_are_read_as_they_were_written_or_refused(
            qp_num in 1..1_u32 << 24, psn in 0..1_u32 << 24, rd_atomic: u8, at in 0..40_usize, damage: u8
        ) {
            let endpoint = Endpoint { qp_num, psn, lid: 7, gid: [9; 16], mtu: 1024, rd_atomic };
            let mut bytes = endpoint.to_bytes();
            prop_assert_eq!(Endpoint::from_bytes(&bytes).unwrap(), endpoint);
            prop_assert!(Endpoint::from_bytes(&bytes[..at]).is_err());
            bytes[at] ^= damage;
            // A burst of 8 bits never escapes a CRC-32.
            prop_assert_eq!(Endpoint::from_bytes(&bytes).is_ok(), damage == 0);
        }
    }

    #[test]
    fn what_no_queue_pair_can_be_is_refused() {
        let good = Endpoint { qp_num: 17, psn: 0xff_ffff, lid: 0, gid: [1; 16], mtu: 4096, rd_atomic: 16 };
        good.check().unwrap();
        for bad in [
            Endpoint { qp_num: 0, ..good },
            Endpoint { qp_num: 1 << 24, ..good },
            Endpoint { psn: 1 << 24, ..good },
            Endpoint { gid: [0; 16], ..good },
            Endpoint { mtu: 1500, ..good },
        ] {
            assert!(matches!(bad.check(), Err(Error::InvalidEndpoint { .. })), "{bad:?}");
        }
    }
}
