//! Plans the chunks of a range.

/// A part of a set: a range of one of its buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Index of the buffer.
    pub buffer: usize,
    /// Offset in the buffer, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset in the set, in bytes.
    pub start: u64,
}

impl Chunk {
    /// The range in the buffer.
    pub(super) fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + self.length
    }
}

/// Chunks end at multiples of this if that needs no more chunks, because a device maps the largest pages that
/// offset and iova permit.
const HUGE: u64 = 2 << 20;

/// Cuts `length` bytes at `offset` of buffers in a row into chunks of at most `limit` bytes, a multiple of
/// `page_size`. No chunk spans two buffers.
pub(super) fn plan(sizes: &[u64], offset: u64, length: u64, limit: u64, page_size: u64) -> Vec<Chunk> {
    debug_assert!(limit > 0 && limit.is_multiple_of(page_size));
    let (mut chunks, mut before) = (Vec::new(), 0);
    for (buffer, size) in sizes.iter().enumerate() {
        // The intersection of this buffer and the range.
        let from = offset.saturating_sub(before).min(*size);
        let to = (offset + length - before.min(offset + length)).min(*size);
        let mut parts = cut(from, to, limit, page_size);
        if limit >= HUGE && parts.len() > 1 {
            let huge = cut(from, to, limit, HUGE);
            if huge.len() == parts.len() {
                parts = huge;
            }
        }
        chunks.extend(parts.into_iter().map(|(at, length)| {
            let start = before + at - offset;
            Chunk { buffer, offset: at, length, start }
        }));
        before += size;
    }
    chunks
}

/// Ranges of at most `limit` bytes that end at multiples of `align`; the last one ends at `to`.
fn cut(from: u64, to: u64, limit: u64, align: u64) -> Vec<(u64, u64)> {
    let (mut at, mut parts) = (from, Vec::new());
    while at < to {
        let end = if to - at <= limit { to } else { (at + limit) / align * align };
        parts.push((at, end - at));
        at = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn lengths(sizes: &[u64], offset: u64, length: u64, limit: u64) -> Vec<u64> {
        plan(sizes, offset, length, limit, PAGE).iter().map(|chunk| chunk.length).collect()
    }

    #[test]
    fn a_range_within_the_limit_is_one_chunk() {
        assert_eq!(lengths(&[8 << 30], 0, 8 << 30, u64::MAX / PAGE * PAGE), [8 << 30]);
        assert_eq!(lengths(&[8 << 30], 4097, 5, PAGE), [5]);
    }

    #[test]
    fn boundaries_are_huge_if_that_needs_no_more_chunks() {
        const GIB: u64 = 1 << 30;
        assert_eq!(lengths(&[4 * GIB], 0, 4 * GIB, GIB), [GIB; 4]);
        // The first one is shorter, so that the others start at huge pages.
        assert_eq!(lengths(&[4 * GIB], PAGE, 2 * GIB, GIB + HUGE), [GIB + HUGE - PAGE, GIB - HUGE + PAGE]);
        // Huge boundaries would need one more chunk.
        assert_eq!(lengths(&[4 * GIB], PAGE, 2 * GIB, GIB), [GIB; 2]);
        // Chunks start at pages even if the range does not.
        assert_eq!(lengths(&[4 * PAGE], 10, 3 * PAGE, PAGE), [PAGE - 10, PAGE, PAGE, 10]);
    }

    #[test]
    fn a_chunk_ends_with_its_buffer() {
        assert_eq!(
            lengths(&[2 * PAGE, PAGE, 3 * PAGE], PAGE, 4 * PAGE, u64::MAX / PAGE * PAGE),
            [PAGE, PAGE, 2 * PAGE]
        );
    }

    proptest! {
        #[test]
        fn chunks_cover_the_range_once_in_order(
            pages in prop::collection::vec(1..2000_u64, 1..6),
            limit in 1..1500_u64,
            from in 0.0..1.0_f64,
            part in 0.0..1.0_f64,
        ) {
            let sizes: Vec<u64> = pages.iter().map(|n| n * PAGE).collect();
            let total: u64 = sizes.iter().sum();
            let offset = (total as f64 * from) as u64;
            let length = (((total - offset) as f64 * part) as u64).max(1);
            let chunks = plan(&sizes, offset, length, limit * PAGE, PAGE);
            let mut start = 0;
            for chunk in &chunks {
                prop_assert_eq!(chunk.start, start);
                prop_assert!(chunk.length > 0 && chunk.length <= limit * PAGE);
                let before: u64 = sizes[..chunk.buffer].iter().sum();
                prop_assert_eq!(before + chunk.offset, offset + start);
                prop_assert!(chunk.offset + chunk.length <= sizes[chunk.buffer]);
                // Every boundary is at a multiple of the page size.
                prop_assert!(start == 0 || chunk.offset.is_multiple_of(PAGE));
                start += chunk.length;
            }
            prop_assert_eq!(start, length);
        }
    }
}
