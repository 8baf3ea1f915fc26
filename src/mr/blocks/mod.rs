//! Tables of blocks: pages of a cache, rows of an image, shards of a tensor.

mod wire;

use std::sync::Arc;

use dma_sg::{RangeError, check_range};

use super::{MemoryRegion, RegionSet, RegionSlice, RemoteRegion, RemoteSlice, SliceError};

type Result<T, E = SliceError> = std::result::Result<T, E>;

/// A table of blocks in local memory (`M` is [`RegionSlice`]) or in a peer's ([`RemoteSlice`]).
///
/// Make one with [`strided`](RegionSlice::strided), [`blocks`](RegionSlice::blocks) or
/// [`ranges`](RegionSlice::ranges) of a slice, which check every block once. Use it for any number of transfers:
/// a [`write`](crate::Connection::write) or [`read`](crate::Connection::read) of two tables transfers block `i` of
/// one to block `i` of the other. [`select`](Self::select) chooses the blocks of one use. A slice of either kind is
/// also a table of one block.
///
/// A table is a handle, cheap to clone, and holds its memory. Its blocks may overlap. If blocks of the destination
/// overlap, which of them the common bytes end up with is not specified.
#[derive(Debug, Clone)]
pub struct Blocks<M> {
    memory: M,
    layout: Layout,
    /// Indices into the layout; `None` stands for all, in order.
    selection: Option<Arc<Vec<u32>>>,
    /// Total length of the blocks in bytes.
    length: u64,
}

/// Offsets are those in the memory.
#[derive(Debug, Clone)]
enum Layout {
    Strided { base: u64, stride: u64, length: u64, count: usize },
    Offsets { length: u64, offsets: Arc<[u64]> },
    Ranges(Arc<[(u64, u64)]>),
}

impl Layout {
    fn count(&self) -> usize {
        match self {
            Self::Strided { count, .. } => *count,
            Self::Offsets { offsets, .. } => offsets.len(),
            Self::Ranges(ranges) => ranges.len(),
        }
    }

    /// Offset and length of a block.
    fn block(&self, index: usize) -> (u64, u64) {
        match self {
            // Cannot overflow: the last block was checked.
            Self::Strided { base, stride, length, .. } => (base + stride * index as u64, *length),
            Self::Offsets { length, offsets } => (offsets[index], *length),
            Self::Ranges(ranges) => ranges[index],
        }
    }

    /// The length of each block, if all have the same.
    fn uniform(&self) -> Option<u64> {
        match self {
            Self::Strided { length, .. } | Self::Offsets { length, .. } => Some(*length),
            Self::Ranges(_) => None,
        }
    }

    /// Checks every block, and returns their total length.
    fn check(&self, size: u64) -> Result<u64> {
        let checked = |index| -> Result<u64> {
            let (offset, length) = self.block(index);
            check_range(offset, length, size).map_err(|source| SliceError::Block { index, source })?;
            Ok(length)
        };
        let count = self.count();
        let last = count.checked_sub(1).ok_or(SliceError::NoBlocks)?;
        if u32::try_from(last).is_err() {
            return Err(SliceError::TooManyBlocks { count });
        }
        match self {
            Self::Strided { base, stride, length, .. } => {
                let end = stride.checked_mul(last as u64).and_then(|offset| base.checked_add(offset));
                let out = RangeError::OutOfRange { offset: u64::MAX, length: *length, size };
                end.ok_or(SliceError::Block { index: last, source: out })?;
                checked(0)?;
                checked(last)?;
                length
                    .checked_mul(count as u64)
                    .ok_or(SliceError::TotalOverflow { total: *length, length: *length })
            }
            _ => (0..count).try_fold(0, |total, index| add(total, checked(index)?)),
        }
    }
}

fn add(total: u64, length: u64) -> Result<u64> {
    total.checked_add(length).ok_or(SliceError::TotalOverflow { total, length })
}

impl<M> Blocks<M> {
    fn new(memory: M, size: u64, layout: Layout) -> Result<Self> {
        let length = layout.check(size)?;
        Ok(Self { memory, layout, selection: None, length })
    }

    /// The table whose only block is all of the memory, which is not empty.
    fn whole(memory: M, length: u64) -> Self {
        let layout = Layout::Strided { base: 0, stride: 0, length, count: 1 };
        Self { memory, layout, selection: None, length }
    }

    /// Number of blocks, at least 1.
    pub fn count(&self) -> usize {
        self.selection.as_ref().map_or_else(|| self.layout.count(), |selection| selection.len())
    }

    /// Total length of the blocks in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty table cannot be made
    pub fn len(&self) -> u64 {
        self.length
    }

    /// The slice that the blocks lie in.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Offset and length in bytes of block `index` in [`memory`](Self::memory); `None` past the last one.
    pub fn get(&self, index: usize) -> Option<(u64, u64)> {
        (index < self.count()).then(|| self.block(index))
    }

    /// The length of each block, if the table was made with one length.
    pub(crate) fn uniform(&self) -> Option<u64> {
        self.layout.uniform()
    }

    /// Offset and length of block `index`, which is in the table.
    pub(crate) fn block(&self, index: usize) -> (u64, u64) {
        self.layout.block(self.selection.as_ref().map_or(index, |selection| selection[index] as usize))
    }
}

impl<M: Clone> Blocks<M> {
    /// The blocks with these indices, in this order. An index may occur several times.
    ///
    /// # Errors
    /// - [`SliceError::NoBlocks`]: there is no index.
    /// - [`SliceError::Index`]: an index is past the last block.
    /// - [`SliceError::TooManyBlocks`]: more than 2^32 indices.
    /// - [`SliceError::TotalOverflow`]: the total length does not fit in 64 bits.
    pub fn select(&self, indices: impl IntoIterator<Item = usize>) -> Result<Self> {
        let count = self.count();
        let mut length = 0;
        let pick = |(position, index): (usize, usize)| {
            if u32::try_from(position).is_err() {
                return Err(SliceError::TooManyBlocks { count: position + 1 });
            }
            if index >= count {
                return Err(SliceError::Index { position, index, count });
            }
            length = add(length, self.block(index).1)?;
            // A table has at most 2^32 blocks.
            Ok(self.selection.as_ref().map_or(index as u32, |selection| selection[index]))
        };
        let indices = indices.into_iter();
        // Each index is copied once. An iterator may claim any length.
        let mut selection = Vec::with_capacity(indices.size_hint().0.min(1 << 20));
        for picked in indices.enumerate().map(pick) {
            selection.push(picked?);
        }
        if selection.is_empty() {
            return Err(SliceError::NoBlocks);
        }
        let (memory, layout) = (self.memory.clone(), self.layout.clone());
        Ok(Self { memory, layout, selection: Some(Arc::new(selection)), length })
    }
}

/// The constructors, which both kinds of slices have.
macro_rules! tables {
    ($slice:ident) => {
        impl $slice {
            /// A table of `count` blocks of `length` bytes, each `stride` bytes after the one before. It takes a few
            /// words, however many blocks it has.
            ///
            /// To start elsewhere than at byte 0, [`slice`](Self::slice) first.
            ///
            /// # Errors
            /// - [`SliceError::Block`]: the first or the last block is empty or not inside the slice.
            /// - [`SliceError::NoBlocks`], [`SliceError::TooManyBlocks`]: `count` is 0, or above 2^32.
            /// - [`SliceError::TotalOverflow`]: the total length does not fit in 64 bits.
            pub fn strided(&self, length: u64, stride: u64, count: usize) -> Result<Blocks<Self>> {
                Blocks::new(self.clone(), self.len(), Layout::Strided { base: 0, stride, length, count })
            }

            /// A table of blocks of `length` bytes at these offsets.
            ///
            /// # Errors
            /// As [`strided`](Self::strided), for any of the blocks.
            pub fn blocks(
                &self,
                length: u64,
                offsets: impl IntoIterator<Item = u64>,
            ) -> Result<Blocks<Self>> {
                let offsets = offsets.into_iter().collect();
                Blocks::new(self.clone(), self.len(), Layout::Offsets { length, offsets })
            }

            /// A table of blocks of different lengths.
            ///
            /// # Errors
            /// As [`strided`](Self::strided), for any of the blocks.
            pub fn ranges(
                &self,
                ranges: impl IntoIterator<Item = std::ops::Range<u64>>,
            ) -> Result<Blocks<Self>> {
                let pair = |(index, range): (usize, std::ops::Range<u64>)| {
                    let length = range.end.checked_sub(range.start);
                    let source = RangeError::Inverted { start: range.start, end: range.end };
                    Ok((range.start, length.ok_or(SliceError::Block { index, source })?))
                };
                let ranges = ranges.into_iter().enumerate().map(pair).collect::<Result<_>>()?;
                Blocks::new(self.clone(), self.len(), Layout::Ranges(ranges))
            }
        }

        impl From<&Blocks<$slice>> for Blocks<$slice> {
            fn from(blocks: &Blocks<$slice>) -> Self {
                blocks.clone()
            }
        }
    };
}

tables!(RegionSlice);
tables!(RemoteSlice);

/// All of what converts into a slice also converts into a table of one block.
macro_rules! one_block {
    ($slice:ident: $($from:ty),*) => {$(
        impl From<$from> for Blocks<$slice> {
            /// A table of one block: all of it.
            fn from(memory: $from) -> Self {
                let memory = $slice::from(memory);
                let length = memory.len();
                Self::whole(memory, length)
            }
        }
    )*};
}

one_block!(RegionSlice: RegionSlice, &RegionSlice, MemoryRegion, &MemoryRegion, RegionSet, &RegionSet);
one_block!(RemoteSlice: RemoteSlice, &RemoteSlice, RemoteRegion, &RemoteRegion);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mr::Access;
    use crate::mr::tests::fake;

    fn memory(length: u64) -> RegionSlice {
        fake::region(length, Access::REMOTE).into()
    }

    fn all<M>(blocks: &Blocks<M>) -> Vec<(u64, u64)> {
        (0..).map_while(|index| blocks.get(index)).collect()
    }

    #[test]
    fn tables_of_every_kind() {
        let slice = memory(1000);
        let strided = slice.slice(100..).unwrap().strided(10, 300, 3).unwrap();
        assert_eq!(all(&strided), [(0, 10), (300, 10), (600, 10)]);
        let offsets = slice.blocks(10, [990, 0, 990]).unwrap();
        assert_eq!(all(&offsets), [(990, 10), (0, 10), (990, 10)]);
        let ranges = slice.ranges([5..6, 0..1000]).unwrap();
        assert_eq!((all(&ranges), ranges.len()), (vec![(5, 1), (0, 1000)], 1001));
        assert_eq!(all(&Blocks::from(&slice)), [(0, 1000)]);
        assert_eq!((strided.count(), strided.len(), strided.memory().len()), (3, 30, 900));
    }

    #[test]
    fn a_selection_of_a_selection() {
        let strided = memory(1000).strided(10, 100, 10).unwrap();
        let odd = strided.select((1..10).step_by(2)).unwrap();
        let two = odd.select([4, 0, 0]).unwrap();
        assert_eq!(all(&two), [(900, 10), (100, 10), (100, 10)]);
        match two.select([0, 3]) {
            Err(SliceError::Index { position: 1, index: 3, count: 3 }) => {}
            other => panic!("{other:?}"),
        }
        assert!(matches!(strided.select([]), Err(SliceError::NoBlocks)));
    }

    #[test]
    fn blocks_outside_are_refused_by_their_index() {
        let slice = memory(1000);
        let index = |refused: Result<Blocks<RegionSlice>>| match refused {
            Err(SliceError::Block { index, .. }) => index,
            other => panic!("{other:?}"),
        };
        assert_eq!(index(slice.strided(10, 100, 11)), 10);
        assert_eq!(index(slice.strided(10, u64::MAX, 3)), 2);
        assert_eq!(index(slice.strided(0, 10, 3)), 0);
        assert_eq!(index(slice.blocks(10, [0, 991, u64::MAX])), 1);
        assert_eq!(index(slice.ranges([0..1, std::ops::Range { start: 5, end: 4 }])), 1);
        assert_eq!(index(slice.ranges([0..1, 1..2, 5..5])), 2);
        // One bad block of a million.
        let offsets = (0..1_000_000).map(|at| if at == 777_777 { 1000 } else { at % 900 });
        assert_eq!(index(slice.blocks(10, offsets)), 777_777);
        assert!(matches!(slice.strided(10, 0, 0), Err(SliceError::NoBlocks)));
        assert!(matches!(slice.strided(1, 0, (1 << 32) + 1), Err(SliceError::TooManyBlocks { .. })));
        let huge = memory(u64::MAX);
        assert!(matches!(huge.strided(u64::MAX, 0, 2), Err(SliceError::TotalOverflow { .. })));
        assert!(matches!(huge.ranges([0..u64::MAX, 0..u64::MAX]), Err(SliceError::TotalOverflow { .. })));
        let whole = Blocks::from(&huge);
        assert!(matches!(whole.select([0, 0]), Err(SliceError::TotalOverflow { .. })));
    }
}
