//! Checks a byte range against the length of what it selects from.

use std::ops::{Bound, Range, RangeBounds};

/// Why a byte range was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The range or the run has 0 bytes.
    #[error("the range at offset {offset} has 0 bytes: select at least one")]
    Empty {
        /// Offset of the range in bytes.
        offset: u64,
    },
    /// The range ends past the end, or its end does not fit in 64 bits.
    #[error("{length} bytes at offset {offset} do not lie within {size} bytes: choose a range inside")]
    OutOfRange {
        /// Offset of the range in bytes.
        offset: u64,
        /// Length of the range in bytes.
        length: u64,
        /// Bytes there are.
        size: u64,
    },
    /// The range ends before it starts.
    #[error("the range {start}..{end} ends before it starts: swap its ends")]
    Inverted {
        /// Offset of the first byte.
        start: u64,
        /// Offset past the last byte.
        end: u64,
    },
    /// The range contains no aligned 32-bit word, the unit in which devices fill memory.
    #[error("the range {start}..{end} contains no aligned word of 4 bytes: widen it to multiples of 4")]
    NoWord {
        /// Offset of the first byte.
        start: u64,
        /// Offset past the last byte.
        end: u64,
    },
}

/// Resolves `range` within `size` bytes: `..` selects all; `a..b`, `a..=b`, `a..` and `..b` select a part.
///
/// # Errors
/// - [`RangeError::Empty`]: the range selects no byte.
/// - [`RangeError::OutOfRange`]: it ends past `size`.
/// - [`RangeError::Inverted`]: it ends before it starts.
///
/// ```
/// # use dma_sg::{RangeError, resolve_range};
/// assert_eq!(resolve_range(4096.., 8192), Ok(4096..8192));
/// assert_eq!(resolve_range(0..0, 8192), Err(RangeError::Empty { offset: 0 }));
/// ```
#[inline]
pub fn resolve_range(range: impl RangeBounds<u64>, size: u64) -> Result<Range<u64>, RangeError> {
    let start = match range.start_bound() {
        Bound::Included(&start) => Some(start),
        Bound::Excluded(&before) => before.checked_add(1),
        Bound::Unbounded => Some(0),
    };
    let end = match range.end_bound() {
        Bound::Included(&last) => last.checked_add(1),
        Bound::Excluded(&end) => Some(end),
        Bound::Unbounded => Some(size),
    };
    let too_far = |offset| RangeError::OutOfRange { offset, length: u64::MAX - offset, size };
    let start = start.ok_or(too_far(u64::MAX))?;
    let end = end.ok_or(too_far(start))?;
    match end.checked_sub(start) {
        // `size..` is empty, and `size + 1..` out of range; neither is inverted.
        _ if matches!(range.end_bound(), Bound::Unbounded) && start >= size => match start == size {
            true => Err(RangeError::Empty { offset: start }),
            false => Err(RangeError::OutOfRange { offset: start, length: 0, size }),
        },
        None => Err(RangeError::Inverted { start, end }),
        Some(length) => check_range(start, length, size).map(|()| start..end),
    }
}

/// Checks that `length` bytes at `offset` lie within `size` bytes, and that `length` is not 0.
///
/// # Errors
/// - [`RangeError::Empty`]: `length` is 0.
/// - [`RangeError::OutOfRange`]: the range ends past `size`.
#[inline]
pub fn check_range(offset: u64, length: u64, size: u64) -> Result<(), RangeError> {
    if length == 0 {
        return Err(RangeError::Empty { offset });
    }
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(RangeError::OutOfRange { offset, length, size }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_at_both_ends() {
        assert!(check_range(0, 4096, 4096).is_ok());
        assert!(check_range(4095, 1, 4096).is_ok());
        assert_eq!(check_range(7, 0, 4096), Err(RangeError::Empty { offset: 7 }));
        assert!(matches!(check_range(4096, 1, 4096), Err(RangeError::OutOfRange { .. })));
        assert!(matches!(check_range(0, 4097, 4096), Err(RangeError::OutOfRange { length: 4097, .. })));
        assert!(matches!(check_range(u64::MAX, 2, 4096), Err(RangeError::OutOfRange { .. })));
    }

    #[test]
    fn every_kind_of_range_selects_its_bytes() {
        assert_eq!(resolve_range(.., 100), Ok(0..100));
        assert_eq!(resolve_range(10..20, 100), Ok(10..20));
        assert_eq!(resolve_range(10..=19, 100), Ok(10..20));
        assert_eq!(resolve_range(..=99, 100), Ok(0..100));
        assert_eq!(resolve_range(99.., 100), Ok(99..100));
        assert_eq!(resolve_range((Bound::Excluded(9), Bound::Unbounded), 100), Ok(10..100));
        assert_eq!(resolve_range(100.., 100), Err(RangeError::Empty { offset: 100 }));
        assert!(matches!(resolve_range(101.., 100), Err(RangeError::OutOfRange { offset: 101, .. })));
        let (five, three) = (5, 3);
        assert_eq!(resolve_range(five..three, 100), Err(RangeError::Inverted { start: 5, end: 3 }));
        assert!(matches!(resolve_range(0..=u64::MAX, 100), Err(RangeError::OutOfRange { offset: 0, .. })));
        assert!(matches!(resolve_range(.., 0), Err(RangeError::Empty { offset: 0 })));
        let past = (Bound::Excluded(u64::MAX), Bound::Unbounded);
        assert!(matches!(resolve_range(past, u64::MAX), Err(RangeError::OutOfRange { .. })));
    }
}
