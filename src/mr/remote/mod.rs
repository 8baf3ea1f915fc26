//! Memory of a peer, as work requests of this side address it.

pub(super) mod wire;

use std::ops::RangeBounds;
use std::sync::Arc;

use dma_sg::{Iova, RangeError, resolve_range};

use super::{Access, SliceError};
use crate::dmabuf::BufferId;
use crate::verbs::{RemoteAddr, Rkey};

type Result<T, E = SliceError> = std::result::Result<T, E>;

/// The description of registered memory that a peer needs to access it: its runs, one for each region, its access
/// flags, and the identity of the buffer. [`MemoryRegion::remote`](crate::MemoryRegion::remote),
/// [`RegionSet::remote`](crate::RegionSet::remote) and [`RegionSlice::remote`](crate::RegionSlice::remote) return
/// one.
///
/// It is plain data: send it by any means. [`to_bytes`](Self::to_bytes) gives a stable byte form, and the feature
/// `serde` makes it serializable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Described", into = "Described"))]
pub struct RemoteRegion {
    runs: Runs,
    length: u64,
    access: Access,
    buffer: BufferId,
}

/// Consecutive bytes of a peer's memory with one remote key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RemoteRun {
    /// Address of the first byte.
    pub iova: Iova,
    /// Length in bytes, never 0.
    pub length: u64,
    /// The remote key.
    pub rkey: Rkey,
}

/// The runs and where each ends. A single run, the usual case, needs no allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Runs {
    One([RemoteRun; 1]),
    Many { runs: Arc<[RemoteRun]>, ends: Arc<[u64]> },
}

impl RemoteRegion {
    /// Describes memory by its runs, in order.
    ///
    /// # Errors
    /// - [`SliceError::Range`]: there is no run, or a run is empty.
    /// - [`SliceError::IovaOverflow`]: the end of a run does not fit in 64 bits.
    /// - [`SliceError::TotalOverflow`]: the total length does not fit in 64 bits.
    pub fn new(runs: impl IntoIterator<Item = RemoteRun>, access: Access, buffer: BufferId) -> Result<Self> {
        let mut runs = runs.into_iter();
        let first = runs.next().ok_or(RangeError::Empty { offset: 0 })?;
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

    /// Total length of the runs in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty description is refused
    pub fn len(&self) -> u64 {
        self.length
    }

    /// The access flags, as the peer states them.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The identity of the buffer at the peer: equal in two descriptions of one buffer.
    pub fn buffer(&self) -> BufferId {
        self.buffer
    }

    /// A byte range of the memory, for a transfer or a work request. It shares this description.
    ///
    /// # Errors
    /// [`RangeError`]: the range is empty, inverted, or not inside the memory.
    pub fn slice(&self, range: impl RangeBounds<u64>) -> Result<RemoteSlice, RangeError> {
        RemoteSlice::from(self).slice(range)
    }

    /// The index of the run with the byte at `offset`, and the offset of that byte in the run.
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

/// Checks a run, and returns the total length including it.
fn checked(run: RemoteRun, total: u64) -> Result<u64> {
    let RemoteRun { iova, length, .. } = run;
    if length == 0 {
        return Err(RangeError::Empty { offset: total }.into());
    }
    // The description may come from an untrusted peer, so either sum may overflow.
    iova.0.checked_add(length).ok_or(SliceError::IovaOverflow { iova, length })?;
    total.checked_add(length).ok_or(SliceError::TotalOverflow { total, length })
}

/// A byte range of a peer's memory, checked to lie inside it. Cheap to clone and to slice again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteSlice {
    region: RemoteRegion,
    offset: u64,
    length: u64,
}

impl RemoteSlice {
    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty slice cannot be made
    pub fn len(&self) -> u64 {
        self.length
    }

    /// The access flags, as the peer states them.
    pub fn access(&self) -> Access {
        self.region.access
    }

    /// A byte range of this slice.
    ///
    /// # Errors
    /// [`RangeError`]: the range is empty, inverted, or not inside the slice.
    pub fn slice(&self, range: impl RangeBounds<u64>) -> Result<Self, RangeError> {
        let range = resolve_range(range, self.length)?;
        let (offset, length) = (self.offset + range.start, range.end - range.start);
        Ok(Self { region: self.region.clone(), offset, length })
    }

    /// The memory that the slice is a range of.
    pub(super) fn region(&self) -> &RemoteRegion {
        &self.region
    }

    /// Offset of the first byte in that memory.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The address and key for a work request.
    ///
    /// # Errors
    /// [`SliceError::AcrossRuns`]: the slice spans several runs, which have different keys.
    pub fn addr(&self) -> Result<RemoteAddr> {
        let RemoteCursor { addr, left, .. } = RemoteCursor::new(self, 0);
        if self.length > left {
            return Err(SliceError::AcrossRuns { length: self.length, left });
        }
        Ok(addr)
    }

    /// The address and key of the byte at `offset`, which is inside the slice.
    pub(crate) fn at(&self, offset: u64) -> RemoteAddr {
        let (run, inside) = self.region.find(self.offset + offset);
        let RemoteRun { iova, rkey, .. } = self.region.runs()[run];
        RemoteAddr { addr: iova.0 + inside, rkey }
    }
}

impl From<RemoteRegion> for RemoteSlice {
    /// The whole memory.
    fn from(region: RemoteRegion) -> Self {
        let length = region.length;
        Self { region, offset: 0, length }
    }
}

impl From<&RemoteRegion> for RemoteSlice {
    /// The whole memory.
    fn from(region: &RemoteRegion) -> Self {
        region.clone().into()
    }
}

impl From<&RemoteSlice> for RemoteSlice {
    fn from(slice: &RemoteSlice) -> Self {
        slice.clone()
    }
}

/// A position in a slice, with the rest of its run.
#[derive(Debug)]
pub(crate) struct RemoteCursor {
    pub addr: RemoteAddr,
    pub left: u64,
    /// Index of the run.
    run: usize,
}

impl RemoteCursor {
    /// The cursor of an operation without remote memory. Its run has no end.
    pub(crate) const NONE: Self =
        Self { addr: RemoteAddr { addr: 0, rkey: Rkey(0) }, left: u64::MAX, run: 0 };

    /// A cursor at the byte at `offset`, which is inside the slice.
    pub(crate) fn new(slice: &RemoteSlice, offset: u64) -> Self {
        let (run, inside) = slice.region.find(slice.offset + offset);
        Self::at(slice.region.runs()[run], run, inside)
    }

    fn at(RemoteRun { iova, length, rkey }: RemoteRun, run: usize, inside: u64) -> Self {
        Self { addr: RemoteAddr { addr: iova.0 + inside, rkey }, left: length - inside, run }
    }

    /// Advances by `length` bytes, at most to the end of the run.
    pub(crate) fn advance(&mut self, slice: Option<&RemoteSlice>, length: u64) {
        (self.addr.addr, self.left) = (self.addr.addr + length, self.left - length);
        if self.left == 0 {
            // After the last run the cursor stays at its end.
            if let Some(next) = slice.and_then(|slice| slice.region.runs().get(self.run + 1)) {
                *self = Self::at(*next, self.run + 1, 0);
            }
        }
    }
}

/// The serialized form. Deserializing checks it again.
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
    type Error = SliceError;

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
    fn addresses_lie_inside_the_region() {
        let region = region(&[run(0x1000, 5 << 30, 9)]).unwrap();
        let addr = region.slice(1 << 32..(1 << 32) + 16).unwrap().addr().unwrap();
        assert_eq!(addr, RemoteAddr { addr: 0x1_0000_1000, rkey: Rkey(9) });
        assert!(matches!(region.slice(5 << 30..=5 << 30), Err(RangeError::OutOfRange { .. })));
        assert!(matches!(region.slice(0..0), Err(RangeError::Empty { .. })));
        let tail = region.slice(100..).unwrap();
        assert_eq!(tail.slice(..=0).unwrap().addr().unwrap().addr, 0x1064);
        assert!(matches!(tail.slice(..5 << 30), Err(RangeError::OutOfRange { .. })));
    }

    #[test]
    fn an_address_lies_in_one_run() {
        let region = region(&[run(0x1000, 100, 1), run(0x9000, 50, 2), run(0, 1, 3)]).unwrap();
        assert_eq!(region.len(), 151);
        let at = |offset, length| region.slice(offset..offset + length).unwrap().addr();
        assert_eq!(at(99, 1).unwrap(), RemoteAddr { addr: 0x1063, rkey: Rkey(1) });
        assert_eq!(at(100, 50).unwrap(), RemoteAddr { addr: 0x9000, rkey: Rkey(2) });
        assert_eq!(at(150, 1).unwrap(), RemoteAddr { addr: 0, rkey: Rkey(3) });
        match at(90, 11) {
            Err(SliceError::AcrossRuns { length: 11, left: 10 }) => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_cursor_goes_through_the_runs_of_a_slice() {
        let region = region(&[run(0x1000, 100, 1), run(0x9000, 50, 2), run(0, 10, 3)]).unwrap();
        let slice = region.slice(90..160).unwrap();
        let (mut cursor, mut seen) = (RemoteCursor::new(&slice, 0), Vec::new());
        let mut left = slice.len();
        while left > 0 {
            let (addr, bytes) = (cursor.addr, cursor.left.min(left).min(30));
            cursor.advance(Some(&slice), bytes);
            left -= bytes;
            seen.push((addr.addr, addr.rkey.0, bytes));
        }
        assert_eq!(seen, [(0x105a, 1, 10), (0x9000, 2, 30), (0x901e, 2, 20), (0, 3, 10)]);
    }

    #[test]
    fn impossible_runs_are_refused() {
        let empty = |offset| SliceError::Range(RangeError::Empty { offset });
        assert_eq!(region(&[]).unwrap_err().to_string(), empty(0).to_string());
        let refused = region(&[run(0, 7, 1), run(0, 0, 1)]).unwrap_err();
        assert_eq!(refused.to_string(), empty(7).to_string());
        assert!(matches!(region(&[run(u64::MAX, 1, 1)]), Err(SliceError::IovaOverflow { .. })));
        let most = run(0, u64::MAX, 1);
        match region(&[most, most]) {
            Err(SliceError::TotalOverflow { total: u64::MAX, .. }) => {}
            other => panic!("{other:?}"),
        }
    }

    #[cfg(feature = "serde")]
    #[test]
    fn deserializing_checks_the_description() {
        let region = region(&[run(0x1000, 100, 1), run(0x9000, 50, 2)]).unwrap();
        let text = serde_json::to_string(&region).unwrap();
        assert_eq!(serde_json::from_str::<RemoteRegion>(&text).unwrap(), region);
        let hostile = text.replace("\"length\":100", "\"length\":0");
        assert_ne!(hostile, text);
        assert!(serde_json::from_str::<RemoteRegion>(&hostile).is_err());
    }
}
