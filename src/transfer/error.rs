//! Errors of transfers.

use std::time::Duration;

use dma_sg::Iova;

use crate::kind::{ErrorKind, readable_error};
use crate::mr::RegisterError;
use crate::verbs::{self, AsyncEvent, CompletionStatus, Opcode, Rkey, vendor};

use super::RequestError;
use super::shared::{NOT_CONNECTED, port_name};

/// The result of the functions of this module.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a transfer was refused or failed.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The transfer was refused before anything was posted. The connection stays usable.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The memory for the payloads of notifications cannot be registered.
    #[error(transparent)]
    Memory(#[from] Box<RegisterError>),
    /// libibverbs failed, or the provider refused a work request.
    #[error(transparent)]
    Verbs(#[from] verbs::Error),
    /// The port of the connection is down. Nothing was posted.
    #[error(
        "{} is down: bring its network interface up (ip link set … up) or check the cable, then try again",
        port_name(.device, *.port, .interface.as_deref())
    )]
    PortDown {
        /// Name of the device.
        device: String,
        /// Port number, from 1.
        port: u8,
        /// The network interface of the port, on RoCE.
        interface: Option<String>,
    },
    /// An earlier receive timed out, was cancelled or was dropped before its first message, and is still posted.
    #[error(
        "an earlier receive of {length} bytes is still posted: it timed out, was cancelled or was dropped before its first message. Call recv with the same memory and message size, or create a new connection"
    )]
    ReceivePosted {
        /// Length of the posted receive in bytes.
        length: u64,
    },
    /// A message completed with an error. The connection is unusable.
    #[error(
        "{opcode:?} of bytes {offset}..{}{} completed with {status}{}{}; {done} bytes were transferred, and the connection is unusable",
        .offset.saturating_add(*.length), at(.remote), vendor(*.vendor_err), after_colon(.hint)
    )]
    Failed {
        /// The operation.
        opcode: Opcode,
        /// Offset of the failed message in the slice, in bytes.
        offset: u64,
        /// Length of the failed message in bytes.
        length: u64,
        /// Address and key at the peer, for an operation on remote memory.
        remote: Option<(Iova, Rkey)>,
        /// The status of the completion.
        status: CompletionStatus,
        /// The vendor's error code (syndrome) of the completion; 0 if the device gives none.
        vendor_err: u32,
        /// What else is known: options that decided, such as `timeout` and `retry_count`, and a port that is down.
        hint: String,
        /// Bytes transferred for certain.
        done: u64,
    },
    /// The timeout or the stall timeout expired.
    #[error(
        "{opcode:?} timed out after {timeout:?} with {done} of {length} bytes transferred{}; {}", after_colon(.hint), timed_out(*.opcode, *.usable)
    )]
    Timeout {
        /// The operation.
        opcode: Opcode,
        /// Bytes transferred for certain.
        done: u64,
        /// Length of the transfer in bytes.
        length: u64,
        /// The timeout that expired.
        timeout: Duration,
        /// A port that is down; else empty.
        hint: String,
        /// Whether the connection stays usable: a receive timed out before its first message and stays posted, or
        /// nothing of another transfer was posted.
        usable: bool,
    },
    /// The caller cancelled the transfer.
    #[error("{opcode:?} was cancelled after {done} of {length} bytes; the connection is {}", if *.usable { "usable" } else { "unusable" })]
    Cancelled {
        /// The operation.
        opcode: Opcode,
        /// Bytes transferred for certain.
        done: u64,
        /// Length of the transfer in bytes.
        length: u64,
        /// Whether the connection stays usable: all messages in flight completed, or a receive was cancelled before
        /// its first message and stays posted.
        usable: bool,
    },
    /// The peer disconnected. The connection is unusable.
    #[error(
        "the peer disconnected after {done} of {length} bytes of a {opcode:?}; the connection is unusable"
    )]
    PeerDisconnected {
        /// The operation.
        opcode: Opcode,
        /// Bytes transferred for certain.
        done: u64,
        /// Length of the transfer in bytes.
        length: u64,
    },
    /// Fewer notifications than awaited came in time. The connection is usable.
    #[error("{came} of {count} notifications{} came within {timeout:?}; none was taken{}", of_id(*.id), and_others(*.others))]
    NotificationTimeout {
        /// The id; `None` for any.
        id: Option<u32>,
        /// How many were awaited.
        count: u64,
        /// How many came.
        came: u64,
        /// How many of other ids wait to be taken.
        others: u64,
        /// The timeout.
        timeout: Duration,
    },
    /// The connection ended before the notifications came.
    #[error("{came} of {count} notifications{} came, and no more will: {reason}", of_id(*.id))]
    NotificationsEnded {
        /// The id; `None` for any.
        id: Option<u32>,
        /// How many were awaited.
        count: u64,
        /// How many came.
        came: u64,
        /// Why the connection is unusable.
        reason: String,
        /// Whether the peer disconnected.
        peer_gone: bool,
    },
    /// The device reported that it, the queue pair or a queue of it has failed, or the connection manager that the device
    /// is being removed. The connection is unusable.
    #[error(
        "{device}: {event}; {done} of {length} bytes of a {opcode:?} were transferred, and the connection is unusable"
    )]
    DeviceEvent {
        /// Name of the device.
        device: String,
        /// The event.
        event: AsyncEvent,
        /// The operation.
        opcode: Opcode,
        /// Bytes transferred for certain.
        done: u64,
        /// Length of the transfer in bytes.
        length: u64,
    },
    /// A message of another length than expected arrived. The connection is unusable.
    #[error(
        "a message of {received} bytes arrived at offset {offset} instead of {expected} bytes: send and receive the same lengths with the same message size. The connection is unusable"
    )]
    UnexpectedMessage {
        /// Offset of the message in the slice, in bytes.
        offset: u64,
        /// Expected length in bytes.
        expected: u64,
        /// Received length in bytes.
        received: u64,
    },
    /// The connection failed in an earlier transfer or in its other direction, was disconnected, or is not connected
    /// yet.
    #[error("{}", unusable(.reason))]
    Unusable {
        /// Why it is unusable: the first reason.
        reason: String,
        /// Bytes of this transfer that were transferred for certain.
        done: u64,
    },
}

readable_error!(Error);

impl Error {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Request(error) => error.kind(),
            Self::ReceivePosted { .. } | Self::UnexpectedMessage { .. } => ErrorKind::Misuse,
            Self::PortDown { .. } => ErrorKind::NotFound,
            Self::Unusable { reason, .. } if reason == NOT_CONNECTED => ErrorKind::Misuse,
            Self::Unusable { .. } => ErrorKind::Transport,
            Self::Memory(error) => error.kind(),
            Self::Verbs(error) => error.kind(),
            Self::Failed { status, .. } => status.kind(),
            Self::Timeout { .. } | Self::NotificationTimeout { .. } => ErrorKind::Timeout,
            Self::NotificationsEnded { peer_gone: true, .. } => ErrorKind::PeerGone,
            Self::NotificationsEnded { .. } => ErrorKind::Transport,
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            Self::PeerDisconnected { .. } => ErrorKind::PeerGone,
            Self::DeviceEvent { event: AsyncEvent::DeviceFatal, .. } => ErrorKind::DeviceGone,
            Self::DeviceEvent { .. } => ErrorKind::Transport,
        }
    }
}

fn and_others(others: u64) -> String {
    if others == 0 { String::new() } else { format!(", and {others} of other ids wait to be taken") }
}

fn of_id(id: Option<u32>) -> String {
    id.map_or(String::new(), |id| format!(" of id {id}"))
}

fn after_colon(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!(": {hint}") }
}

fn unusable(reason: &str) -> String {
    match reason {
        NOT_CONNECTED => "the connection is not connected: connect it first".into(),
        _ => format!("the connection is unusable, so create a new one: {reason}"),
    }
}

fn timed_out(opcode: Opcode, usable: bool) -> &'static str {
    match (opcode, usable) {
        (Opcode::Recv, true) => "the receive stays posted, and the connection is usable",
        (_, true) => "nothing of it was posted, and the connection is usable",
        (_, false) => {
            "the rest was flushed, and the connection is unusable: check that the peer is alive and has receives posted, and that the path is up"
        }
    }
}

fn at(remote: &Option<(Iova, Rkey)>) -> String {
    remote.map_or(String::new(), |(iova, rkey)| format!(" (at iova {iova} of the peer, {rkey:?})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_all_that_is_known() {
        let failed = |status, vendor_err, hint: &str| Error::Failed {
            opcode: Opcode::Write,
            offset: 4096,
            length: u64::MAX,
            remote: Some((Iova(7), Rkey(9))),
            status,
            vendor_err,
            hint: hint.into(),
            done: 4096,
        };
        let message = failed(CompletionStatus::RETRY_EXC_ERR, 0x81, "retry_count 6").to_string();
        for part in ["Write of bytes 4096..", "iova 0x7", "up), vendor error 0x81: retry_count 6; 4096 bytes"]
        {
            assert!(message.contains(part), "{message}");
        }
        let message = failed(CompletionStatus::WR_FLUSH_ERR, 0, "").to_string();
        assert!(message.contains("error state); 4096 bytes"), "{message}");
        assert!(!message.contains("earlier"), "{message}");
    }
}
