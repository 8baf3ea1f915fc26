//! Errors of descriptions of a peer's memory, ranges of it, and tables of blocks.

use dma_sg::{Iova, RangeError};

use crate::kind::{ErrorKind, readable_error};

/// Why a description of a peer's memory, a range of it, or a table of blocks is invalid.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum SliceError {
    /// The range does not fit the memory, or a run is empty.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The bytes do not describe a peer's memory.
    #[error("the bytes do not describe a peer's memory: {reason}")]
    InvalidDescriptor {
        /// What is wrong with them.
        reason: String,
    },
    /// The end of a run does not fit in 64 bits.
    #[error("a run of {length} bytes at iova {iova} ends beyond 64 bits: the description is wrong")]
    IovaOverflow {
        /// Address of the run's first byte.
        iova: Iova,
        /// Length of the run in bytes.
        length: u64,
    },
    /// The total length of the runs or blocks does not fit in 64 bits.
    #[error("{total} bytes plus {length} do not fit in 64 bits: the lengths of the runs or blocks are wrong")]
    TotalOverflow {
        /// Bytes of the runs or blocks before.
        total: u64,
        /// Length of the run or block in bytes.
        length: u64,
    },
    /// A table of blocks, or a selection, without a block.
    #[error("a table needs at least one block")]
    NoBlocks,
    /// A block is empty or not inside its memory.
    #[error("block {index} is invalid")]
    Block {
        /// Index of the block, from 0.
        index: usize,
        /// What is wrong with it.
        source: RangeError,
    },
    /// An index of a selection is past the last block.
    #[error("index {index}, number {position} of the selection, is past the last of {count} blocks")]
    Index {
        /// Position of the index in the selection, from 0.
        position: usize,
        /// The index.
        index: usize,
        /// Blocks of the table.
        count: usize,
    },
    /// More blocks than a table can have.
    #[error("{count} blocks are more than the 2^32 of a table: use several tables")]
    TooManyBlocks {
        /// Number of the blocks.
        count: usize,
    },
    /// The table was made for another description of the peer's memory: the peer has registered it anew since, or it
    /// is other memory.
    #[error(
        "the table belongs to memory with {table}, and this description is of memory with {region}: get both from one registration"
    )]
    Stale {
        /// The remote key and the fingerprint that the table names.
        table: String,
        /// Those of the description.
        region: String,
    },
    /// A range that spans several runs, which one address and key cannot name.
    #[error(
        "{length} bytes cross the end of a run of the peer's memory after {left} bytes: use a transfer, or split the range there"
    )]
    AcrossRuns {
        /// Length of the range in bytes.
        length: u64,
        /// Bytes from the range's start to the end of the run.
        left: u64,
    },
}

readable_error!(SliceError);

impl SliceError {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Range(_)
            | Self::AcrossRuns { .. }
            | Self::NoBlocks
            | Self::Block { .. }
            | Self::Index { .. }
            | Self::TooManyBlocks { .. } => ErrorKind::Misuse,
            Self::InvalidDescriptor { .. }
            | Self::IovaOverflow { .. }
            | Self::TotalOverflow { .. }
            | Self::Stale { .. } => ErrorKind::InvalidData,
        }
    }
}
