//! What refuses or ends a transfer.

use std::time::Duration;

use crate::mr::{Access, Rkey};
use crate::umem::Iova;
use crate::verbs::{CompletionStatus, Opcode};

/// Why bytes did not move; [`Error::Transfer`](crate::Error) holds it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    // -- descriptors --------------------------------------------------------------------------
    /// Bytes that are no description of a peer's memory.
    #[error("these bytes do not describe a peer's memory: {reason}")]
    InvalidDescriptor {
        /// What is wrong with them.
        reason: String,
    },
    /// A range that one address and key cannot name.
    #[error(
        "{length} bytes at offset {offset} go over the end of a run of the peer's memory, which has {left} bytes from there: use a transfer, or split the range there"
    )]
    AcrossRuns {
        /// Offset in the peer's memory, in bytes.
        offset: u64,
        /// Length that was asked for, in bytes.
        length: u64,
        /// Bytes from the offset to the end of its run.
        left: u64,
    },

    // -- before anything is posted ------------------------------------------------------------
    /// The two sides of a transfer differ in length.
    #[error("{opcode:?} of {local} local bytes to or from {remote} bytes of the peer: both must be as long")]
    LengthMismatch {
        /// The operation.
        opcode: Opcode,
        /// Bytes of the local range.
        local: u64,
        /// Bytes of the peer's range.
        remote: u64,
    },
    /// The peer's memory is not registered for this.
    #[error("{opcode:?} needs {needed:?} and the peer's memory was registered with {granted:?}")]
    RemoteAccessMissing {
        /// The operation.
        opcode: Opcode,
        /// What it takes.
        needed: Access,
        /// What the peer's description says.
        granted: Access,
    },
    /// A local region that the device may not write.
    #[error("{opcode:?} writes into local memory, and the region at byte {offset} lacks LOCAL_WRITE")]
    LocalWriteMissing {
        /// The operation.
        opcode: Opcode,
        /// Where in the local range that region begins.
        offset: u64,
    },
    /// A local region of another protection domain than the connection's.
    #[error(
        "the region at byte {offset} of the local range is of another protection domain than the connection: register it in the connection's"
    )]
    ForeignRegion {
        /// Where in the local range that region begins.
        offset: u64,
    },
    /// A message whose bytes lie in more pieces than a request takes.
    #[error(
        "the {length} bytes at {offset} of a {opcode:?} lie in more than {max_sge} pieces: both sides cut messages at the same bytes, so choose a smaller message on both, or a connection with more elements"
    )]
    TooScattered {
        /// The operation.
        opcode: Opcode,
        /// Where the message begins in the range.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Elements that the connection was made for.
        max_sge: u32,
    },

    // -- under way ----------------------------------------------------------------------------
    /// A message failed. The connection is of no more use.
    #[error(
        "{opcode:?} of bytes {offset} to {}{} ended with {status}; {done} bytes before had been moved, and the connection is unusable", .offset + .length, at(.remote)
    )]
    Failed {
        /// The operation.
        opcode: Opcode,
        /// Where the message that failed began, or the first that can have.
        offset: u64,
        /// Bytes of that message, or of all that can have failed.
        length: u64,
        /// Where at the peer, for what names an address there.
        remote: Option<(Iova, Rkey)>,
        /// How the request ended.
        status: CompletionStatus,
        /// Bytes that are known to have moved.
        done: u64,
    },
    /// The time was up. The connection is of no more use.
    #[error(
        "{opcode:?} moved {done} of {length} bytes within {limit:?}: is the peer alive and the path up? The rest was called back, and the connection is unusable"
    )]
    TimeLimit {
        /// The operation.
        opcode: Opcode,
        /// Bytes known to have moved.
        done: u64,
        /// Bytes in all.
        length: u64,
        /// The limit that was given.
        limit: Duration,
    },
    /// Somebody called it off.
    #[error("{opcode:?} was cancelled after {done} of {length} bytes; the connection is {}", if *.usable { "usable" } else { "unusable" })]
    Cancelled {
        /// The operation.
        opcode: Opcode,
        /// Bytes known to have moved.
        done: u64,
        /// Bytes in all.
        length: u64,
        /// Whether what was under way ended well, so that the connection can be used on.
        usable: bool,
    },
    /// The peer disconnected.
    #[error(
        "{opcode:?} moved {done} of {length} bytes before the peer disconnected; the connection is unusable"
    )]
    PeerLeft {
        /// The operation.
        opcode: Opcode,
        /// Bytes known to have moved.
        done: u64,
        /// Bytes in all.
        length: u64,
    },
    /// A message of another length than was expected.
    #[error(
        "a message of {received} bytes came where {expected} were expected, at byte {offset}: both sides must send and receive the same lengths with the same message size"
    )]
    UnexpectedMessage {
        /// Where in the range it was to go.
        offset: u64,
        /// Bytes that were to come.
        expected: u64,
        /// Bytes that came.
        received: u64,
    },
    /// The connection ended with an earlier failure.
    #[error("this connection is unusable: {reason}. Make a new one")]
    Unusable {
        /// What ended it.
        reason: String,
    },
}

fn at(remote: &Option<(Iova, Rkey)>) -> String {
    remote.map_or(String::new(), |(iova, rkey)| format!(", at {iova} of the peer with {rkey:?},"))
}
