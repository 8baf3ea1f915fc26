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

#[cfg(test)]
mod tests {
    use super::*;

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
