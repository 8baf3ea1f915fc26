//! Memory as its peer addresses it.

use std::sync::Arc;

use crate::dmabuf::BufferId;
use crate::error::{AddressError, TransferError};
use crate::mr::{Access, Rkey};
use crate::umem::{Iova, check_range};
use crate::{Error, Result};

/// What a peer must know to read and write memory: the runs that it is addressed by, one for each
/// region, what they permit, and which buffer it is. Plain data, to be sent by any means:
/// [`to_bytes`](Self::to_bytes) is a fixed form, and the feature `serde` makes it serialisable.
///
/// A region gives its own by [`MemoryRegion::remote`](crate::MemoryRegion::remote).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Described", into = "Described"))]
pub struct RemoteRegion {
    runs: Runs,
    length: u64,
    access: Access,
    buffer: BufferId,
}

/// Bytes that lie together at the peer, under one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RemoteRun {
    /// Address of the first byte.
    pub iova: Iova,
    /// Length in bytes, never 0.
    pub length: u64,
    /// The key that permits it.
    pub rkey: Rkey,
}

/// A place in a peer's memory, with the key that permits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddr {
    /// Address at the peer.
    pub addr: u64,
    /// The key.
    pub rkey: Rkey,
}

/// Runs and where each ends; one, as most have, without an allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Runs {
    One([RemoteRun; 1]),
    Many { runs: Arc<[RemoteRun]>, ends: Arc<[u64]> },
}

impl RemoteRegion {
    /// Describes memory by its runs, in order.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`]: no run, or one without bytes.
    /// - [`Error::IovaOverflow`]: a run ends beyond 64 bits.
    /// - [`AddressError::TotalOverflow`]: all together have more bytes than 64 bits count.
    pub fn new(runs: impl IntoIterator<Item = RemoteRun>, access: Access, buffer: BufferId) -> Result<Self> {
        let mut runs = runs.into_iter();
        let first = runs.next().ok_or(Error::ZeroLength { offset: 0 })?;
        let mut length = checked(first, 0)?;
        let Some(second) = runs.next() else {
            return Ok(Self { runs: Runs::One([first]), length, access, buffer });
        };
        let (mut all, mut ends) = (vec![first], vec![length]);
        for run in std::iter::once(second).chain(runs) {
            length = checked(run, length)?;
            all.push(run);
            ends.push(length);
        }
        Ok(Self { runs: Runs::Many { runs: all.into(), ends: ends.into() }, length, access, buffer })
    }

    /// The runs, in order.
    pub fn runs(&self) -> &[RemoteRun] {
        match &self.runs {
            Runs::One(runs) => runs,
            Runs::Many { runs, .. } => runs,
        }
    }

    /// Length in bytes of all runs together.
    #[allow(clippy::len_without_is_empty)] // cannot be made of nothing
    pub fn len(&self) -> u64 {
        self.length
    }

    /// What it is registered for, as its owner says.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The buffer that it is of, as its owner knows it: equal for two descriptions of one buffer.
    pub fn buffer(&self) -> BufferId {
        self.buffer
    }

    /// The place of `length` bytes from `offset`, for a work request, which names one address and key.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::OutOfRange`]: the range is empty or not inside the memory.
    /// - [`TransferError::AcrossRuns`]: it goes over the end of a run.
    pub fn at(&self, offset: u64, length: u64) -> Result<RemoteAddr> {
        check_range(offset, length, self.length)?;
        let (run, inside) = self.find(offset);
        let RemoteRun { iova, length: whole, rkey } = self.runs()[run];
        let left = whole - inside;
        if length > left {
            return Err(TransferError::AcrossRuns { offset, length, left }.into());
        }
        // The end of a run was checked to fit.
        Ok(RemoteAddr { addr: iova.0 + inside, rkey })
    }

    /// A range of it, for a transfer.
    ///
    /// # Errors
    /// [`Error::ZeroLength`], [`Error::OutOfRange`]: the range is empty or not inside the memory.
    pub fn range(&self, offset: u64, length: u64) -> Result<RemoteRange<'_>> {
        check_range(offset, length, self.length)?;
        Ok(RemoteRange { region: self, offset, length })
    }

    /// The run that has the byte at `offset`, which is inside, and how far into the run that is.
    fn find(&self, offset: u64) -> (usize, u64) {
        match &self.runs {
            Runs::One(_) => (0, offset),
            Runs::Many { ends, .. } => {
                let run = ends.partition_point(|end| *end <= offset);
                (run, offset - run.checked_sub(1).map_or(0, |before| ends[before]))
            }
        }
    }
}

/// The bytes of all runs up to and with this one.
fn checked(run: RemoteRun, total: u64) -> Result<u64> {
    let RemoteRun { iova, length, .. } = run;
    if length == 0 {
        return Err(Error::ZeroLength { offset: total });
    }
    // The description came from outside: its sums may overflow, whatever the lengths say.
    iova.0.checked_add(length).ok_or(Error::IovaOverflow { iova, length })?;
    total.checked_add(length).ok_or_else(|| AddressError::TotalOverflow { total, length }.into())
}

/// A range of a peer's memory, checked to lie inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteRange<'a> {
    region: &'a RemoteRegion,
    offset: u64,
    length: u64,
}

impl<'a> RemoteRange<'a> {
    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty range cannot be made
    pub fn len(&self) -> u64 {
        self.length
    }

    /// What the memory is registered for.
    pub fn access(&self) -> Access {
        self.region.access
    }

    /// The place of the byte at `offset`, which is inside.
    pub(super) fn at(&self, offset: u64) -> RemoteAddr {
        let (run, inside) = self.region.find(self.offset + offset);
        let RemoteRun { iova, rkey, .. } = self.region.runs()[run];
        RemoteAddr { addr: iova.0 + inside, rkey }
    }
}

impl<'a> From<&'a RemoteRegion> for RemoteRange<'a> {
    /// All of it.
    fn from(region: &'a RemoteRegion) -> Self {
        Self { region, offset: 0, length: region.length }
    }
}

/// A place in a range, that moves on: what is left of the run that it is in.
#[derive(Debug)]
pub(super) struct RemoteCursor {
    pub place: RemoteAddr,
    pub left: u64,
    /// The run's.
    number: usize,
}

impl RemoteCursor {
    /// Of an operation that names no memory of the peer's: there is always some left.
    pub(super) const NOWHERE: Self =
        Self { place: RemoteAddr { addr: 0, rkey: Rkey(0) }, left: u64::MAX, number: 0 };

    /// At the first byte of a range.
    #[inline]
    pub(super) fn new(range: &RemoteRange<'_>) -> Self {
        let (number, inside) = range.region.find(range.offset);
        Self::at(range.region.runs()[number], number, inside)
    }

    #[inline]
    fn at(RemoteRun { iova, length, rkey }: RemoteRun, number: usize, inside: u64) -> Self {
        Self { place: RemoteAddr { addr: iova.0 + inside, rkey }, left: length - inside, number }
    }

    /// Moves on by `length` bytes, at most as many as are left.
    #[inline(always)]
    pub(super) fn advance(&mut self, range: Option<&RemoteRange<'_>>, length: u64) {
        (self.place.addr, self.left) = (self.place.addr + length, self.left - length);
        if self.left == 0 {
            // Behind the last one there is nothing to be asked for.
            if let Some(next) = range.and_then(|range| range.region.runs().get(self.number + 1)) {
                *self = Self::at(*next, self.number + 1, 0);
            }
        }
    }
}

/// What is serialised: the parts, to be checked again by whoever reads them.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
struct Described {
    runs: Vec<RemoteRun>,
    access: u32,
    buffer: BufferId,
}

#[cfg(feature = "serde")]
impl From<RemoteRegion> for Described {
    fn from(region: RemoteRegion) -> Self {
        Self { runs: region.runs().to_vec(), access: region.access.bits(), buffer: region.buffer }
    }
}

#[cfg(feature = "serde")]
impl TryFrom<Described> for RemoteRegion {
    type Error = Error;

    fn try_from(Described { runs, access, buffer }: Described) -> Result<Self> {
        Self::new(runs, Access::from_bits_retain(access), buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(iova: u64, length: u64, rkey: u32) -> RemoteRun {
        RemoteRun { iova: Iova(iova), length, rkey: Rkey(rkey) }
    }

    fn region(runs: &[RemoteRun]) -> Result<RemoteRegion> {
        RemoteRegion::new(runs.iter().copied(), Access::REMOTE, BufferId::UNKNOWN)
    }

    #[test]
    fn places_lie_inside_the_region() {
        let region = region(&[run(0x1000, 5 << 30, 9)]).unwrap();
        assert_eq!(region.at(1 << 32, 16).unwrap(), RemoteAddr { addr: 0x1_0000_1000, rkey: Rkey(9) });
        assert!(matches!(region.at(5 << 30, 1), Err(Error::OutOfRange { .. })));
        assert!(matches!(region.at(0, 0), Err(Error::ZeroLength { .. })));
        assert!(matches!(region.range(1, 5 << 30), Err(Error::OutOfRange { .. })));
    }

    #[test]
    fn a_place_lies_in_one_run() {
        let region = region(&[run(0x1000, 100, 1), run(0x9000, 50, 2), run(0, 1, 3)]).unwrap();
        assert_eq!(region.len(), 151);
        assert_eq!(region.at(99, 1).unwrap(), RemoteAddr { addr: 0x1063, rkey: Rkey(1) });
        assert_eq!(region.at(100, 50).unwrap(), RemoteAddr { addr: 0x9000, rkey: Rkey(2) });
        assert_eq!(region.at(150, 1).unwrap(), RemoteAddr { addr: 0, rkey: Rkey(3) });
        match region.at(90, 11) {
            Err(Error::Transfer(TransferError::AcrossRuns { offset: 90, length: 11, left: 10 })) => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_cursor_goes_through_the_runs_of_a_range() {
        let region = region(&[run(0x1000, 100, 1), run(0x9000, 50, 2), run(0, 10, 3)]).unwrap();
        let range = region.range(90, 70).unwrap();
        let (mut cursor, mut seen) = (RemoteCursor::new(&range), Vec::new());
        let mut left = range.len();
        while left > 0 {
            let (place, bytes) = (cursor.place, cursor.left.min(left).min(30));
            cursor.advance(Some(&range), bytes);
            left -= bytes;
            seen.push((place.addr, place.rkey.0, bytes));
        }
        assert_eq!(seen, [(0x105a, 1, 10), (0x9000, 2, 30), (0x901e, 2, 20), (0, 3, 10)]);
    }

    #[test]
    fn what_cannot_be_memory_is_refused() {
        assert!(matches!(region(&[]), Err(Error::ZeroLength { offset: 0 })));
        assert!(matches!(region(&[run(0, 7, 1), run(0, 0, 1)]), Err(Error::ZeroLength { offset: 7 })));
        assert!(matches!(region(&[run(u64::MAX, 1, 1)]), Err(Error::IovaOverflow { .. })));
        let most = run(0, u64::MAX, 1);
        match region(&[most, most]) {
            Err(Error::Addresses(AddressError::TotalOverflow { total: u64::MAX, .. })) => {}
            other => panic!("{other:?}"),
        }
    }

    #[cfg(feature = "serde")]
    #[test]
    fn what_was_serialised_is_checked_when_it_is_read() {
        let region = region(&[run(0x1000, 100, 1), run(0x9000, 50, 2)]).unwrap();
        let text = serde_json::to_string(&region).unwrap();
        assert_eq!(serde_json::from_str::<RemoteRegion>(&text).unwrap(), region);
        let hostile = text.replace("\"length\":100", "\"length\":0");
        assert_ne!(hostile, text);
        assert!(serde_json::from_str::<RemoteRegion>(&hostile).is_err());
    }
}
