//! Why a transfer is refused before anything is posted.

use crate::kind::{ErrorKind, readable_error};
use crate::mr::Access;
use crate::verbs::Opcode;

/// Why a transfer was refused before anything was posted. The connection stays usable.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// A local and a remote block differ in length; a slice is one block.
    #[error(
        "{opcode:?}: block {block} has {local} bytes here but {remote} bytes at the peer: slice both to the same length"
    )]
    LengthMismatch {
        /// The operation.
        opcode: Opcode,
        /// Index of the block, from 0.
        block: usize,
        /// Length of the local block in bytes.
        local: u64,
        /// Length of the remote block in bytes.
        remote: u64,
    },
    /// The local and the remote table differ in their number of blocks.
    #[error(
        "{opcode:?} of {local} local blocks with {remote} blocks of the peer: select as many on both sides"
    )]
    CountMismatch {
        /// The operation.
        opcode: Opcode,
        /// Number of local blocks.
        local: usize,
        /// Number of remote blocks.
        remote: usize,
    },
    /// The peer's memory is not registered for this operation.
    #[error(
        "{opcode:?} needs {needed:?} but the peer registered its memory with {granted:?}: register it there with the missing flag"
    )]
    RemoteAccessMissing {
        /// The operation.
        opcode: Opcode,
        /// The access flag that the operation needs.
        needed: Access,
        /// The access flags in the peer's description.
        granted: Access,
    },
    /// The local memory is not registered for this operation. On iWARP the peer answers a READ by writing.
    #[error(
        "{opcode:?} needs {needed:?} on local memory but the region at byte {offset} of the local slice lacks it{}: register it with that flag",
        on_iwarp(*.needed)
    )]
    LocalAccessMissing {
        /// The operation.
        opcode: Opcode,
        /// The access flag that the operation needs.
        needed: Access,
        /// Offset in the local slice at which that region starts.
        offset: u64,
    },
    /// A local region belongs to another protection domain than the connection.
    #[error(
        "the region at byte {offset} of the local slice is in another protection domain than the connection: register it in the connection's domain"
    )]
    ForeignRegion {
        /// Offset in the local slice at which that region starts.
        offset: u64,
    },
    /// A message needs more scatter/gather elements than a work request has.
    #[error(
        "the message of {length} bytes at offset {offset} of a {opcode:?} needs more than {max_sge} scatter/gather elements: choose a smaller message size on both sides, or a larger max_sge"
    )]
    TooScattered {
        /// The operation.
        opcode: Opcode,
        /// Offset of the message in the slice, in bytes.
        offset: u64,
        /// Length of the message in bytes.
        length: u64,
        /// Elements of a work request of this connection; 1 for an atomic.
        max_sge: u32,
    },
    /// The payload of a notification is longer than a notification carries, or than the device posts inline.
    #[error(
        "a notification carries at most {limit} bytes, not {length}: write longer data into the peer's memory"
    )]
    PayloadTooLong {
        /// Length of the payload in bytes.
        length: usize,
        /// Maximum length in bytes.
        limit: usize,
    },
    /// This side or the peer receives no notifications.
    #[error(
        "{side} receives no notifications: set the option `notifications` of its connection, or of its worker"
    )]
    NoNotifications {
        /// "this side" or "the peer".
        side: &'static str,
    },
    /// The peer has no queue pair for messages beside the one for notifications, but this side has, or the other way
    /// round.
    #[error(
        "the peer has no queue pair for messages: both sides of a connection receive notifications, or neither does, if they are to send messages"
    )]
    NoMessages,
}

readable_error!(RequestError);

impl RequestError {
    /// The kind of the error: misuse.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Misuse
    }
}

fn on_iwarp(needed: Access) -> &'static str {
    if needed == Access::REMOTE_WRITE { ", and on iWARP the peer answers a READ by writing" } else { "" }
}
