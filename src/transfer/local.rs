//! This side's end of a transfer.

use std::ffi::c_int;
use std::marker::PhantomData;

use ibverbs_sys as ffi;

use crate::error::{AddressError, TransferError};
use crate::mr::{Access, Lkey, MemoryRegion};
use crate::sg::DmaSgList;
use crate::umem::check_range;
use crate::verbs::{Opcode, ProtectionDomain};
use crate::{Error, Result};

/// Longest element: what 32 bits hold, in whole pages, so that the one after it begins at a page too.
const MAX_ELEMENT: u64 = !0xfff_u32 as u64;

/// Registered memory of ours, in the order of its bytes: a region, several, or pieces of one. It borrows
/// its regions.
#[derive(Debug, Clone)]
pub struct LocalRange<'a> {
    pieces: Pieces,
    length: u64,
    regions: PhantomData<&'a MemoryRegion>,
}

/// Bytes that lie together, of one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    addr: u64,
    length: u64,
    lkey: Lkey,
    writable: bool,
    /// Address of the domain's C object, to compare with.
    domain: usize,
}

/// One piece, as most have, without an allocation.
#[derive(Debug, Clone)]
enum Pieces {
    One([Piece; 1]),
    Many(Vec<Piece>),
}

impl Pieces {
    #[inline]
    fn as_slice(&self) -> &[Piece] {
        match self {
            Self::One(pieces) => pieces,
            Self::Many(pieces) => pieces,
        }
    }
}

impl<'a> From<&'a MemoryRegion> for LocalRange<'a> {
    /// All of a region.
    fn from(region: &'a MemoryRegion) -> Self {
        let runs = region.umem().sg().runs();
        let piece = |run: &crate::DmaSg| Piece::of(region, run.addr, run.len);
        let pieces = match runs {
            [run] => Pieces::One([piece(run)]),
            runs => Pieces::Many(runs.iter().map(piece).collect()),
        };
        Self { pieces, length: region.len(), regions: PhantomData }
    }
}

impl Piece {
    fn of(region: &MemoryRegion, addr: u64, length: u64) -> Self {
        let writable = region.access().contains(Access::LOCAL_WRITE);
        let domain = region.domain().as_raw().as_ptr().addr();
        Self { addr, length, lkey: region.lkey(), writable, domain }
    }
}

impl<'a> LocalRange<'a> {
    /// All bytes of several regions, one after the other: the chunks of a buffer that was registered in
    /// parts, or regions of different buffers.
    ///
    /// # Errors
    /// [`Error::ZeroLength`]: no region; [`AddressError::TotalOverflow`]: more bytes than 64 bits count.
    pub fn of(regions: impl IntoIterator<Item = &'a MemoryRegion>) -> Result<Self> {
        let (mut pieces, mut length) = (Vec::new(), 0_u64);
        for region in regions {
            let whole = Self::from(region);
            let sum = length.checked_add(whole.length);
            length = sum.ok_or(AddressError::TotalOverflow { total: length, length: whole.length })?;
            pieces.extend_from_slice(whole.pieces.as_slice());
        }
        if pieces.is_empty() {
            return Err(Error::ZeroLength { offset: 0 });
        }
        Ok(Self { pieces: Pieces::Many(pieces), length, regions: PhantomData })
    }

    /// Pieces of one region, in the list's order: rows of an image, pages of a cache. The list's
    /// addresses are the region's, from its iova on.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`]: an empty list.
    /// - [`Error::OutOfRange`]: a run that is not inside the region.
    pub fn gather(region: &'a MemoryRegion, list: &DmaSgList) -> Result<Self> {
        let start = region.iova().0;
        let piece = |run: &crate::DmaSg| {
            let offset = run.addr.checked_sub(start);
            let outside = || Error::OutOfRange { offset: run.addr, length: run.len, size: region.len() };
            check_range(offset.ok_or_else(outside)?, run.len, region.len())?;
            Ok(Piece::of(region, run.addr, run.len))
        };
        let pieces = list.runs().iter().map(piece).collect::<Result<Vec<_>>>()?;
        if pieces.is_empty() {
            return Err(Error::ZeroLength { offset: 0 });
        }
        Ok(Self { pieces: Pieces::Many(pieces), length: list.total_len(), regions: PhantomData })
    }

    /// `length` bytes of it from `offset`.
    ///
    /// # Errors
    /// [`Error::ZeroLength`], [`Error::OutOfRange`]: the range is empty or not inside it.
    pub fn range(self, offset: u64, length: u64) -> Result<Self> {
        check_range(offset, length, self.length)?;
        let cut = |piece: &Piece, skip: u64, most: u64| {
            let length = (piece.length - skip).min(most);
            Piece { addr: piece.addr + skip, length, ..*piece }
        };
        let pieces = match self.pieces {
            Pieces::One([piece]) => Pieces::One([cut(&piece, offset, length)]),
            Pieces::Many(pieces) => {
                let (mut skip, mut left, mut kept) = (offset, length, Vec::new());
                for piece in &pieces {
                    if skip >= piece.length {
                        skip -= piece.length;
                    } else if left > 0 {
                        let piece = cut(piece, skip, left);
                        (skip, left) = (0, left - piece.length);
                        kept.push(piece);
                    }
                }
                Pieces::Many(kept)
            }
        };
        Ok(Self { pieces, length, regions: PhantomData })
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range cannot be made
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Checks that the connection can use it: its regions are of `domain`, and writable if they are to
    /// be written.
    #[inline]
    pub(super) fn check(&self, opcode: Opcode, domain: &ProtectionDomain, written: bool) -> Result<()> {
        let domain = domain.as_raw().as_ptr().addr();
        let mut offset = 0;
        for piece in self.pieces.as_slice() {
            if piece.domain != domain {
                return Err(TransferError::ForeignRegion { offset }.into());
            }
            if written && !piece.writable {
                return Err(TransferError::LocalWriteMissing { opcode, offset }.into());
            }
            offset += piece.length;
        }
        Ok(())
    }

    /// Whether each message of `message` bytes, the last one shorter, has at most `max_sge` pieces.
    pub(super) fn check_messages(&self, opcode: Opcode, message: u64, max_sge: u32) -> Result<()> {
        let mut cursor = LocalCursor::new(self);
        let mut places = vec![ffi::ibv_sge::default(); max_sge as usize];
        let mut offset = 0;
        while offset < self.length {
            let length = message.min(self.length - offset);
            if cursor.gather(self, length, &mut places).1 < length {
                return Err(TransferError::TooScattered { opcode, offset, length, max_sge }.into());
            }
            offset += length;
        }
        Ok(())
    }
}

/// A place in a range, that moves on: what is left of the piece that it is in.
#[derive(Debug, Clone, Copy)]
pub(super) struct LocalCursor {
    addr: u64,
    left: u64,
    lkey: Lkey,
    /// The piece's.
    number: usize,
}

impl LocalCursor {
    #[inline]
    pub(super) fn new(range: &LocalRange<'_>) -> Self {
        Self::at(range.pieces.as_slice()[0], 0)
    }

    #[inline]
    fn at(Piece { addr, length: left, lkey, .. }: Piece, number: usize) -> Self {
        Self { addr, left, lkey, number }
    }

    /// Elements of the range's next bytes, `most` or as many as the places hold; how many, and of how many
    /// bytes. It moves on by them. There are as many bytes left.
    #[inline(always)]
    pub(super) fn gather(
        &mut self,
        range: &LocalRange<'_>,
        most: u64,
        places: &mut [ffi::ibv_sge],
    ) -> (c_int, u64) {
        match places {
            // Most messages are inside one piece.
            [place, ..] if most <= self.left.min(MAX_ELEMENT) => {
                *place = self.take(range, most);
                (1, most)
            }
            places => {
                // By value, so that the cursor need not be in memory for the usual messages.
                let (cursor, count, bytes) = self.gather_pieces(range, most, places);
                *self = cursor;
                (count, bytes)
            }
        }
    }

    #[inline(never)]
    fn gather_pieces(
        mut self,
        range: &LocalRange<'_>,
        most: u64,
        places: &mut [ffi::ibv_sge],
    ) -> (Self, c_int, u64) {
        let (mut count, mut bytes) = (0, 0);
        for place in places {
            let length = self.left.min(most - bytes).min(MAX_ELEMENT);
            *place = self.take(range, length);
            (count, bytes) = (count + 1, bytes + length);
            if bytes == most {
                break;
            }
        }
        (self, count, bytes)
    }

    /// An element of bytes of this piece.
    #[inline(always)]
    fn take(&mut self, range: &LocalRange<'_>, length: u64) -> ffi::ibv_sge {
        let element = ffi::ibv_sge { addr: self.addr, length: length as u32, lkey: self.lkey.0 };
        (self.addr, self.left) = (self.addr + length, self.left - length);
        if self.left == 0 {
            // Behind the last one there is nothing to be asked for.
            if let Some(next) = range.pieces.as_slice().get(self.number + 1) {
                *self = Self::at(*next, self.number + 1);
            }
        }
        element
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(pieces: &[(u64, u64)]) -> LocalRange<'static> {
        let piece =
            |&(addr, length): &(u64, u64)| Piece { addr, length, lkey: Lkey(1), writable: true, domain: 7 };
        let pieces: Vec<_> = pieces.iter().map(piece).collect();
        let length = pieces.iter().map(|piece| piece.length).sum();
        LocalRange { pieces: Pieces::Many(pieces), length, regions: PhantomData }
    }

    fn bytes(range: &LocalRange<'_>) -> Vec<u64> {
        range.pieces.as_slice().iter().flat_map(|piece| piece.addr..piece.addr + piece.length).collect()
    }

    #[test]
    fn messages_in_too_many_pieces_are_found_before_they_are_posted() {
        let range = range(&[(0, 10), (100, 10), (200, 10), (300, 70)]);
        range.check_messages(Opcode::Send, 50, 4).unwrap();
        match range.check_messages(Opcode::Send, 50, 3) {
            Err(Error::Transfer(TransferError::TooScattered {
                offset: 0, length: 50, max_sge: 3, ..
            })) => {}
            other => panic!("{other:?}"),
        }
        range.check_messages(Opcode::Send, 10, 1).unwrap();
    }

    #[test]
    fn an_element_has_32_bits() {
        let range = range(&[(0, 10 << 30)]);
        let mut cursor = LocalCursor::new(&range);
        let mut places = [ffi::ibv_sge::default(); 4];
        assert_eq!(cursor.gather(&range, 10 << 30, &mut places), (3, 10 << 30));
        let lengths = places.map(|place| u64::from(place.length));
        assert_eq!(lengths, [0xffff_f000, 0xffff_f000, (10 << 30) - 2 * 0xffff_f000, 0]);
    }

    proptest! {
        #[test]
        fn a_range_of_pieces_has_the_bytes_of_the_whole(
            lengths in proptest::collection::vec(1..20_u64, 1..8), from in 0..160_u64, most in 1..160_u64
        ) {
            let pieces: Vec<_> = lengths.iter().enumerate().map(|(at, len)| (1000 * at as u64, *len)).collect();
            let whole = range(&pieces);
            let all = bytes(&whole);
            match whole.clone().range(from, most) {
                Ok(part) => {
                    prop_assert_eq!(part.len(), most);
                    prop_assert_eq!(bytes(&part), &all[from as usize..(from + most) as usize]);
                }
                Err(_) => prop_assert!(from + most > whole.len()),
            }
        }
    }
}
