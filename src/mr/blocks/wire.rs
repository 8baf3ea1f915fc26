//! The byte form of a table in a peer's memory: little-endian, with a version and a checksum.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 2 | `dB` |
//! | 2 | 2 | version, 1 |
//! | 4 | 4 | CRC-32 (IEEE) of all other bytes |
//! | 8 | 4 | remote key of the first run of the memory |
//! | 12 | 4 | fingerprint of the memory: the CRC-32 in its own byte form |
//! | 16 | 4 | kind: 0 strided, 1 offsets, 2 ranges |
//! | 20 | 4 | number of blocks less 1 |
//! | 24 | 8 | strided: offset of the first block |
//! | 32 | 8 | strided: bytes from block to block |
//! | 40 | 8 | strided and offsets: length of a block |
//! | 48 | 8 each | offsets: offset of each block; ranges: offset and length of each block |
//!
//! Offsets are those in the memory that the peer described. A strided table takes 48 bytes.

use super::{Blocks, Layout, Result, SliceError};
use crate::mr::remote::wire::{checksum, part};
use crate::mr::{RemoteRegion, RemoteSlice};

const MAGIC: [u8; 2] = *b"dB";
const VERSION: u16 = 1;
const HEADER: usize = 48;

/// The remote key and the checksum of a description, which tell it from others.
fn identity(region: &RemoteRegion) -> (u32, u32) {
    let bytes = region.to_bytes();
    (region.runs()[0].rkey.0, u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]))
}

fn named((rkey, fingerprint): (u32, u32)) -> String {
    format!("remote key {rkey:#x} and fingerprint {fingerprint:#010x}")
}

impl Blocks<RemoteSlice> {
    /// The table in its byte form, which `docs/transfer.md` specifies: 48 bytes for a strided one, and 8 or 16 more
    /// for each block of another. The description of the memory is not part of it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let start = self.memory.offset();
        let (kind, [base, stride, length]) = match (&self.layout, &self.selection) {
            (Layout::Strided { base, stride, length, .. }, None) => (0_u32, [start + base, *stride, *length]),
            (layout, _) => layout.uniform().map_or((2, [0; 3]), |length| (1, [0, 0, length])),
        };
        let (rkey, fingerprint) = identity(self.memory.region());
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        // A table has at most 2^32 blocks.
        let last = (self.count() - 1) as u32;
        bytes.extend([rkey, fingerprint, kind, last].into_iter().flat_map(u32::to_le_bytes));
        bytes.extend([base, stride, length].into_iter().flat_map(u64::to_le_bytes));
        for index in (0..self.count()).filter(|_| kind != 0) {
            let (offset, length) = self.block(index);
            bytes.extend((start + offset).to_le_bytes());
            if kind == 2 {
                bytes.extend(length.to_le_bytes());
            }
        }
        let checksum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Parses the byte form of a table in this memory of the peer. The bytes may come from an untrusted peer: parsing
    /// never panics, and allocates at most twice as much memory as they take.
    ///
    /// # Errors
    /// - [`SliceError::InvalidDescriptor`]: the length, the version or the checksum is wrong.
    /// - [`SliceError::Stale`]: the table was made for another description.
    /// - Otherwise as [`RemoteSlice::strided`].
    pub fn from_bytes(memory: &RemoteRegion, bytes: &[u8]) -> Result<Self> {
        let invalid = |reason| SliceError::InvalidDescriptor { reason };
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
            return Err(invalid(format!("{} bytes are fewer than the header's {HEADER}", bytes.len())));
        };
        let word = |at| u32::from_le_bytes(part(header, at));
        let long = |at| u64::from_le_bytes(part(header, at));
        if header[..2] != MAGIC {
            return Err(invalid(format!("they begin with {:?} instead of {MAGIC:?}", &header[..2])));
        }
        let version = u16::from_le_bytes(part(header, 2));
        if version != VERSION {
            return Err(invalid(format!(
                "version {version} is not {VERSION}: use the same version of this library"
            )));
        }
        let (expected, actual) = (word(4), checksum(bytes));
        if expected != actual {
            return Err(invalid(format!("checksum {actual:#x} is not {expected:#x}: they are damaged")));
        }
        let (table, region) = ((word(8), word(12)), identity(memory));
        if table != region {
            return Err(SliceError::Stale { table: named(table), region: named(region) });
        }
        let (kind, count) = (word(16), word(20) as usize + 1);
        let size = match kind {
            0 => 0,
            1 => 8,
            2 => 16,
            _ => return Err(invalid(format!("there is no table of kind {kind}"))),
        };
        if count.checked_mul(size).is_none_or(|length| kind != 0 && length != rest.len())
            || (kind == 0 && !rest.is_empty())
        {
            return Err(invalid(format!(
                "{} bytes are not those of {count} blocks of kind {kind}",
                bytes.len()
            )));
        }
        let longs = |bytes: &[u8]| u64::from_le_bytes(std::array::from_fn(|at| bytes[at]));
        let (base, stride, length) = (long(24), long(32), long(40));
        let layout = match kind {
            0 => Layout::Strided { base, stride, length, count },
            1 => Layout::Offsets { length, offsets: rest.chunks_exact(8).map(longs).collect() },
            _ => Layout::Ranges(rest.chunks_exact(16).map(|pair| (longs(pair), longs(&pair[8..]))).collect()),
        };
        Self::new(memory.into(), memory.len(), layout)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mr::Access;
    use crate::mr::tests::fake;

    fn all(blocks: &Blocks<RemoteSlice>) -> Vec<(u64, u64)> {
        (0..blocks.count()).map(|index| blocks.block(index)).collect()
    }

    fn remote(length: u64) -> RemoteRegion {
        fake::region(length, Access::REMOTE).remote()
    }

    #[test]
    fn every_kind_comes_back() {
        let region = remote(1 << 40);
        let part = region.slice(1 << 30..).unwrap();
        let strided = part.strided(16 << 10, 1 << 20, 100_000).unwrap();
        assert_eq!(strided.to_bytes().len(), 48, "a few words, however long");
        let offsets = part.blocks(7, [5, 3, 9]).unwrap();
        let ranges = part.ranges([5..6, 3..30]).unwrap();
        let selected = strided.select([99_999, 0, 5]).unwrap();
        for table in [strided, offsets, ranges, selected, Blocks::from(&region)] {
            let back = Blocks::from_bytes(&region, &table.to_bytes()).unwrap();
            let start = table.memory().offset();
            let expected: Vec<_> = all(&table).into_iter().map(|(at, length)| (start + at, length)).collect();
            assert_eq!((all(&back), back.len()), (expected, table.len()));
        }
    }

    #[test]
    fn a_table_of_other_memory_is_refused() {
        let (region, other) = (remote(1000), remote(2000));
        let bytes = region.slice(..).unwrap().strided(10, 10, 10).unwrap().to_bytes();
        Blocks::from_bytes(&region, &bytes).unwrap();
        let refused = Blocks::from_bytes(&other, &bytes).unwrap_err();
        assert!(matches!(refused, SliceError::Stale { .. }), "{refused:?}");
        assert!(refused.to_string().contains("get both from one registration"), "{refused}");
    }

    #[test]
    fn damage_is_named() {
        let region = remote(1000);
        let good = region.slice(..).unwrap().blocks(10, [0, 10]).unwrap().to_bytes();
        let reason = |bytes: &[u8]| match Blocks::from_bytes(&region, bytes) {
            Err(error) => error.to_string(),
            Ok(table) => panic!("{table:?}"),
        };
        assert!(reason(&good[..47]).contains("47 bytes are fewer than the header's 48"));
        for (at, part) in [(0, "begin with"), (2, "version"), (9, "checksum"), (60, "checksum")] {
            let mut bytes = good.clone();
            bytes[at] ^= 0x40;
            assert!(reason(&bytes).contains(part), "{at}");
        }
        let resealed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            let checksum = checksum(&bytes);
            bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
            reason(&bytes)
        };
        assert!(resealed(&|bytes| bytes[16] = 3).contains("no table of kind 3"));
        assert!(resealed(&|bytes| bytes[20..24].fill(0xff)).contains("are not those of 4294967296 blocks"));
        assert!(resealed(&|bytes| bytes.truncate(56)).contains("are not those of 2 blocks"));
        assert!(resealed(&|bytes| bytes[63] = 1).contains("block 1 is invalid"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), seal: bool) {
            let region = remote(1000);
            let mut bytes = bytes;
            if seal && bytes.len() >= HEADER {
                let (rkey, fingerprint) = identity(&region);
                bytes[..4].copy_from_slice(b"dB\x01\0");
                bytes[8..12].copy_from_slice(&rkey.to_le_bytes());
                bytes[12..16].copy_from_slice(&fingerprint.to_le_bytes());
                (bytes[16], bytes[17], bytes[18], bytes[19]) = (bytes[16] % 4, 0, 0, 0);
                let checksum = checksum(&bytes);
                bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
            }
            if let Ok(table) = Blocks::from_bytes(&region, &bytes) {
                prop_assert!(table.len() > 0);
            }
        }
    }
}
