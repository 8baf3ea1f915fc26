//! The description of a queue pair for its peer.

use std::net::IpAddr;

use super::error::{Error, Result};

/// The description of a queue pair that a peer needs to connect. It is plain data: send it by any means (a
/// socket, MPI, a key-value store). The feature `serde` makes it serializable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Endpoint {
    /// Number of the queue pair, 1 to 2^24 - 1.
    pub qp_num: u32,
    /// First packet sequence number that it sends, 24 bits.
    pub psn: u32,
    /// Local identifier of its port; 0 on RoCE.
    pub lid: u16,
    /// GID of its port; on RoCE it contains the IP address of the network interface.
    pub gid: [u8; 16],
    /// Path MTU of its port in bytes: 256, 512, 1024, 2048 or 4096. The connection uses the smaller one of both
    /// ends.
    pub mtu: u32,
    /// READs and atomics that it serves at once. The connection uses the smaller one of both ends.
    pub rd_atomic: u8,
    /// RoCE version of the GID, 1 or 2, which both ends must share; 0 on InfiniBand, or if it is not known.
    #[cfg_attr(feature = "serde", serde(default))]
    pub roce_version: u8,
    /// Number of the second queue pair, for messages, of a [`Connection`](crate::Connection) that receives
    /// notifications; 0 if there is none.
    #[cfg_attr(feature = "serde", serde(default))]
    pub message_qp_num: u32,
}

impl Endpoint {
    /// Length in bytes of the form that [`to_bytes`](Self::to_bytes) returns.
    pub const BYTES: usize = 44;

    /// The IP address in its GID, for [`Context::gid_for`](super::Context::gid_for); `None` if it is not on RoCE.
    pub fn address(&self) -> Option<IpAddr> {
        (self.roce_version != 0).then(|| IpAddr::from(self.gid).to_canonical())
    }

    /// The description in its byte form, little-endian: `dE` (2 bytes), version 2 (2), CRC-32 of all other bytes
    /// (4), `qp_num` (4), `psn` (4), `lid` (2), `rd_atomic` (1), `roce_version` (1), `mtu` (4), `gid` (16),
    /// `message_qp_num` (4).
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let Self { qp_num, psn, lid, gid, mtu, rd_atomic, roce_version, message_qp_num } = *self;
        let mut bytes = [0; Self::BYTES];
        bytes[..2].copy_from_slice(b"dE");
        bytes[2] = 2;
        bytes[8..12].copy_from_slice(&qp_num.to_le_bytes());
        bytes[12..16].copy_from_slice(&psn.to_le_bytes());
        bytes[16..18].copy_from_slice(&lid.to_le_bytes());
        (bytes[18], bytes[19]) = (rd_atomic, roce_version);
        bytes[20..24].copy_from_slice(&mtu.to_le_bytes());
        bytes[24..40].copy_from_slice(&gid);
        bytes[40..].copy_from_slice(&message_qp_num.to_le_bytes());
        let checksum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Parses the byte form. The bytes may come from an untrusted peer.
    ///
    /// # Errors
    /// [`Error::InvalidEndpoint`]: the length, the version or the checksum is wrong, or no queue pair can have this
    /// description.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let invalid = |reason: String| Error::InvalidEndpoint { reason };
        let bytes: &[u8; Self::BYTES] = bytes
            .try_into()
            .map_err(|_| invalid(format!("it has {} bytes instead of {}", bytes.len(), Self::BYTES)))?;
        if bytes[..4] != *b"dE\x02\0" {
            return Err(invalid(format!(
                "it begins with {:02x?} instead of \"dE\" and version 2",
                &bytes[..4]
            )));
        }
        let four = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if four(4) != checksum(bytes) {
            return Err(invalid("its checksum is wrong".into()));
        }
        let mut gid = [0; 16];
        gid.copy_from_slice(&bytes[24..40]);
        let lid = u16::from_le_bytes([bytes[16], bytes[17]]);
        let (rd_atomic, roce_version) = (bytes[18], bytes[19]);
        let endpoint = Self {
            qp_num: four(8),
            psn: four(12),
            lid,
            gid,
            mtu: four(20),
            rd_atomic,
            roce_version,
            message_qp_num: four(40),
        };
        endpoint.check()?;
        Ok(endpoint)
    }

    /// Checks a peer's description before it goes to the kernel.
    pub(super) fn check(&self) -> Result<()> {
        let invalid = |reason: String| Err(Error::InvalidEndpoint { reason });
        let Self { qp_num, psn, lid, gid, mtu, message_qp_num, .. } = *self;
        if message_qp_num >> 24 != 0 {
            return invalid(format!("queue pair number {message_qp_num:#x} is above 0xffffff"));
        }
        if qp_num == 0 || qp_num >> 24 != 0 {
            return invalid(format!("queue pair number {qp_num:#x} is not between 1 and 0xffffff"));
        }
        if psn >> 24 != 0 {
            return invalid(format!("packet sequence number {psn:#x} does not fit in 24 bits"));
        }
        if lid == 0 && gid == [0; 16] {
            return invalid("it has neither a GID nor a LID".into());
        }
        if !matches!(mtu, 256 | 512 | 1024 | 2048 | 4096) {
            return invalid(format!("MTU {mtu} is not 256, 512, 1024, 2048 or 4096 bytes"));
        }
        Ok(())
    }
}

/// CRC-32 of all bytes except the checksum itself.
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
            qp_num in 1..1_u32 << 24, psn in 0..1_u32 << 24, rd_atomic: u8, at in 0..44_usize, damage: u8
        ) {
            let endpoint = Endpoint {
                qp_num, psn, lid: 7, gid: [9; 16], mtu: 1024, rd_atomic, roce_version: 2, message_qp_num: psn,
            };
            let mut bytes = endpoint.to_bytes();
            prop_assert_eq!(Endpoint::from_bytes(&bytes).unwrap(), endpoint);
            prop_assert!(Endpoint::from_bytes(&bytes[..at]).is_err());
            bytes[at] ^= damage;
            // A burst of 8 bits never escapes a CRC-32.
            prop_assert_eq!(Endpoint::from_bytes(&bytes).is_ok(), damage == 0);
        }
    }

    #[test]
    fn impossible_endpoints_are_refused() {
        let good = Endpoint {
            qp_num: 17,
            psn: 0xff_ffff,
            lid: 0,
            gid: [1; 16],
            mtu: 4096,
            rd_atomic: 16,
            roce_version: 2,
            message_qp_num: 0,
        };
        good.check().unwrap();
        for bad in [
            Endpoint { qp_num: 0, ..good },
            Endpoint { qp_num: 1 << 24, ..good },
            Endpoint { message_qp_num: 1 << 24, ..good },
            Endpoint { psn: 1 << 24, ..good },
            Endpoint { gid: [0; 16], ..good },
            Endpoint { mtu: 1500, ..good },
        ] {
            assert!(matches!(bad.check(), Err(Error::InvalidEndpoint { .. })), "{bad:?}");
        }
    }
}
