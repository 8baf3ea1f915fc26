//! The byte form of a [`RemoteRegion`]: little-endian, with a version and a checksum.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 2 | `dR` |
//! | 2 | 2 | version, 1 |
//! | 4 | 4 | CRC-32 (IEEE) of all other bytes |
//! | 8 | 4 | number of runs, at least 1 |
//! | 12 | 4 | access flags, as in `ibv_access_flags` |
//! | 16 | 8 | the buffer: device |
//! | 24 | 8 | the buffer: inode |
//! | 32 | 20 each | the runs: iova (8), length (8), rkey (4) |
//!
//! One run takes 52 bytes and fits into the 52 bytes of private data that a connection request carries.

use dma_sg::Iova;

use super::{RemoteRegion, RemoteRun, Result};
use crate::dmabuf::BufferId;
use crate::mr::{Access, SliceError};
use crate::verbs::Rkey;

const MAGIC: [u8; 2] = *b"dR";
const VERSION: u16 = 1;
const HEADER: usize = 32;
const RUN: usize = 20;

impl RemoteRegion {
    /// The description in its byte form, which `docs/transfer.md` specifies: 32 bytes and 20 for each run.
    pub fn to_bytes(&self) -> Vec<u8> {
        let runs = self.runs();
        let (device, inode) = self.buffer().parts();
        let mut bytes = Vec::with_capacity(HEADER + RUN * runs.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        // 2^32 runs would need 80 GiB, so the count fits.
        bytes.extend((runs.len() as u32).to_le_bytes());
        bytes.extend(self.access().bits().to_le_bytes());
        bytes.extend(device.to_le_bytes());
        bytes.extend(inode.to_le_bytes());
        for RemoteRun { iova, length, rkey } in runs {
            bytes.extend(iova.0.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(rkey.0.to_le_bytes());
        }
        let checksum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Parses the byte form. The bytes may come from an untrusted peer: parsing never panics, and allocates at most
    /// as much memory as they take.
    ///
    /// # Errors
    /// - [`SliceError::InvalidDescriptor`]: the length, the version or the checksum is wrong.
    /// - Otherwise as [`new`](Self::new), if the runs are impossible.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let invalid = |reason| SliceError::InvalidDescriptor { reason };
        match Self::split_from(bytes)? {
            (region, []) => Ok(region),
            (_, rest) => Err(invalid(format!("{} bytes follow the description", rest.len()))),
        }
    }

    /// Parses a description at the start of `bytes`, and also returns the bytes after it. Use it for private data,
    /// which is padded, and for several descriptions in a row.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes), except that more bytes may follow.
    pub fn split_from(bytes: &[u8]) -> Result<(Self, &[u8])> {
        let invalid = |reason: String| SliceError::InvalidDescriptor { reason };
        let Some((header, runs)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(invalid(format!("{} bytes are fewer than the header's {HEADER}", bytes.len())));
        };
        if header[..2] != MAGIC {
            return Err(invalid(format!("they begin with {:02x?} instead of \"dR\"", &header[..2])));
        }
        let version = u16::from_le_bytes(part(header, 2));
        if version != VERSION {
            return Err(invalid(format!("version {version} is not supported, only version {VERSION}")));
        }
        let count = u32::from_le_bytes(part(header, 8));
        let Some((runs, rest)) = runs.split_at_checked(RUN.saturating_mul(count as usize)) else {
            let have = bytes.len();
            return Err(invalid(format!("{have} bytes are too few for {count} runs")));
        };
        let (bytes, runs) = (&bytes[..bytes.len() - rest.len()], runs.as_chunks::<RUN>().0);
        let (stated, computed) = (u32::from_le_bytes(part(header, 4)), checksum(bytes));
        if stated != computed {
            return Err(invalid(format!("checksum {computed:#010x} instead of {stated:#010x}")));
        }
        let runs = runs.iter().map(|run| RemoteRun {
            iova: Iova(u64::from_le_bytes(part(run, 0))),
            length: u64::from_le_bytes(part(run, 8)),
            rkey: Rkey(u32::from_le_bytes(part(run, 16))),
        });
        let access = Access::from_bits_retain(u32::from_le_bytes(part(header, 12)));
        let device = u64::from_le_bytes(part(header, 16));
        let inode = u64::from_le_bytes(part(header, 24));
        Ok((Self::new(runs, access, BufferId::from_parts(device, inode))?, rest))
    }
}

/// `N` bytes at `offset`, which callers choose inside the array.
pub(in crate::mr) fn part<const N: usize, const M: usize>(bytes: &[u8; M], offset: usize) -> [u8; N] {
    std::array::from_fn(|at| bytes[offset + at])
}

/// CRC-32 of all bytes except the checksum itself.
pub(in crate::mr) fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..4]);
    hasher.update(&bytes[8..]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(runs: &[(u64, u64, u32)]) -> RemoteRegion {
        let runs =
            runs.iter().map(|&(iova, length, rkey)| RemoteRun { iova: Iova(iova), length, rkey: Rkey(rkey) });
        RemoteRegion::new(runs, Access::REMOTE, BufferId::from_parts(13, 0x1234)).unwrap()
    }

    /// The form is stable: peers with other versions of this library read it.
    #[test]
    fn the_byte_form_is_stable() {
        let bytes = region(&[(0x1000, 5 << 30, 0x77)]).to_bytes();
        let mut expected = b"dR\x01\0CRC!\x01\0\0\0\x0f\0\0\0".to_vec();
        expected.extend(b"\x0d\0\0\0\0\0\0\0\x34\x12\0\0\0\0\0\0");
        expected.extend(b"\0\x10\0\0\0\0\0\0\0\0\0\x40\x01\0\0\0\x77\0\0\0");
        expected[4..8].copy_from_slice(&bytes[4..8]);
        assert_eq!(bytes, expected);
        assert_eq!(bytes.len(), 52);
    }

    fn reason(bytes: &[u8]) -> String {
        match RemoteRegion::from_bytes(bytes) {
            Err(SliceError::InvalidDescriptor { reason }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn damage_is_named() {
        let good = region(&[(0x1000, 5 << 30, 0x77), (0, 1, 2)]).to_bytes();
        assert_eq!(reason(&[]), "0 bytes are fewer than the header's 32");
        assert_eq!(reason(&good[..71]), "71 bytes are too few for 2 runs");
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            reason(&bytes)
        };
        assert!(with(0, b'x').starts_with("they begin with"));
        assert!(with(2, 2).starts_with("version 2"));
        assert!(with(40, 1).starts_with("checksum"));
        // Refused before anything is allocated.
        assert!(with(11, 0xff).contains("too few for 42"));
    }

    proptest! {
        #[test]
        fn bytes_parse_to_the_same_description(
            runs in proptest::collection::vec((0..u64::MAX / 2, 1..1_u64 << 50, any::<u32>()), 1..40)
        ) {
            let region = region(&runs);
            prop_assert_eq!(RemoteRegion::from_bytes(&region.to_bytes()).unwrap(), region);
        }

        /// Random bytes, and valid ones with damage, half of them with a correct checksum so that the checks behind it
        /// are reached.
        #[test]
        fn hostile_bytes_are_an_error_or_a_description(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
            damage in proptest::collection::vec((0..92_usize, any::<u8>()), 0..6),
            kind in 0..3,
        ) {
            if kind > 0 {
                bytes = region(&[(0x1000, 5 << 30, 0x77), (0, 1, 2), (9, 9, 9)]).to_bytes();
                for (at, value) in damage {
                    bytes[at] = value;
                }
            }
            if kind > 1 {
                let checksum = checksum(&bytes);
                bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
            }
            if let Ok(region) = RemoteRegion::from_bytes(&bytes) {
                prop_assert_eq!(region.to_bytes(), bytes);
                prop_assert_eq!(region.len(), region.runs().iter().map(|run| run.length).sum::<u64>());
            }
        }
    }
}
