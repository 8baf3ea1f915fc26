//! Errors of verbs objects and work requests.

use std::io;
use std::time::Duration;

use dma_sg::RangeError;

use super::{CompletionStatus, Opcode};
use crate::kind::{ErrorKind, readable_error};

/// The result of the functions of this module.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a verbs object could not be created or used, or a work request failed.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// libibverbs could not list the devices.
    #[error("cannot list the RDMA devices: {reason}")]
    ListDevices {
        /// What is missing or forbidden, and what to do.
        reason: String,
        /// The errno of libibverbs or the kernel.
        source: io::Error,
    },
    /// No device has this name.
    #[error("no RDMA device is named {name:?}; {}", listed(.present, .reason))]
    UnknownDevice {
        /// The requested name.
        name: String,
        /// The devices that libibverbs lists.
        present: Vec<String>,
        /// Why libibverbs lists no device, or not this one; empty if the kernel has others only.
        reason: String,
    },
    /// libibverbs or the kernel failed an operation on a device, a protection domain, a queue or a queue pair.
    #[error("{device}: cannot {operation}")]
    Device {
        /// Name of the device.
        device: String,
        /// The operation with its arguments.
        operation: String,
        /// The errno of libibverbs or the kernel.
        source: io::Error,
    },
    /// An operation that this libibverbs, kernel, device or connection does not have.
    #[error("{device} has no {operation}: it needs {needs}")]
    Unavailable {
        /// Name of the device.
        device: String,
        /// The C function, or what it would create.
        operation: &'static str,
        /// The versions, devices or options that have it.
        needs: &'static str,
        /// The missing symbol, or the errno of the kernel or the provider; `None` if the library's own check failed.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The port has no GID, or none that serves.
    #[error("{device} port {port} has no usable GID: {reason}")]
    NoGid {
        /// Name of the device.
        device: String,
        /// Port number, from 1.
        port: u8,
        /// What it has instead, or what to do.
        reason: String,
    },
    /// A peer's endpoint that no queue pair can have, or that this one can never reach.
    #[error("cannot connect to the peer's endpoint: {reason}")]
    InvalidEndpoint {
        /// What is wrong with it.
        reason: String,
    },
    /// An option beyond its range, or one that the device does not have.
    #[error("{device}: {option} cannot be {value}: it is {}", .allowed)]
    InvalidOption {
        /// Name of the device.
        device: String,
        /// Name of the option.
        option: &'static str,
        /// Its value.
        value: String,
        /// The values that it can have.
        allowed: String,
    },
    /// An object belongs to another context or protection domain than the one that it is used with.
    #[error("{device}: the {object} belongs to another {parent} than the {user}: both need one {parent}")]
    ContextMismatch {
        /// "completion queue", "DMA handle" or "scatter/gather element".
        object: &'static str,
        /// What it is used with: "protection domain" or "queue pair".
        user: &'static str,
        /// What both need in common: "context" or "protection domain".
        parent: &'static str,
        /// The device of the user.
        device: String,
    },
    /// The range is empty or not inside the region.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// More scatter/gather elements or inline bytes than the queue pair has room for, or more bytes than one element
    /// holds.
    #[error("{count} {what} are too many, since at most {limit} fit: {remedy}")]
    RequestTooLarge {
        /// "scatter/gather elements", "inline bytes" or "bytes in one scatter/gather element".
        what: &'static str,
        /// How many they are.
        count: u64,
        /// How many fit.
        limit: u64,
        /// What to do: split the request, or raise an option of the queue pair.
        remedy: &'static str,
    },
    /// An atomic on other than 8 bytes at a multiple of 8.
    #[error(
        "{opcode:?} at address {addr:#x} with {length} local bytes: an atomic needs 8 bytes and an address that is a multiple of 8"
    )]
    InvalidAtomic {
        /// The operation.
        opcode: Opcode,
        /// Address at the peer.
        addr: u64,
        /// Local bytes.
        length: u64,
    },
    /// The provider refused to post a work request.
    #[error("cannot post {opcode:?}{}", post_hint(.source))]
    Post {
        /// The operation.
        opcode: Opcode,
        /// The errno of the provider.
        source: io::Error,
    },
    /// A chain of work requests was refused, or posted only in part.
    #[error("request {refused} of the chain was refused, and {}", posted_before(*.posted))]
    Chain {
        /// Index of the refused request, from 0.
        refused: usize,
        /// How many requests were posted: 0, or all before the refused one.
        posted: usize,
        /// Why it was refused.
        source: Box<Error>,
    },
    /// A work request completed with an error.
    #[error("work request {wr_id} completed with {status}{}", vendor(*.vendor_err))]
    Completion {
        /// The identifier of the work request.
        wr_id: u64,
        /// The status of its completion.
        status: CompletionStatus,
        /// The vendor's error code (syndrome); 0 if the device gives none.
        vendor_err: u32,
    },
    /// No completion came within the timeout.
    #[error(
        "no completion within {timeout:?}: check that the peer is alive and that a signaled work request is posted"
    )]
    Timeout {
        /// The timeout.
        timeout: Duration,
    },
}

readable_error!(Error);

impl Error {
    /// More bytes than one scatter/gather element holds.
    pub(crate) fn sge_too_long(count: u64, limit: u64) -> Self {
        let what = "bytes in one scatter/gather element";
        Self::RequestTooLarge { what, count, limit, remedy: "split the range (RegionSlice::sges does)" }
    }

    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownDevice { .. } | Self::NoGid { .. } => ErrorKind::NotFound,
            Self::Unavailable { .. } => ErrorKind::Unsupported,
            Self::InvalidEndpoint { .. } => ErrorKind::InvalidData,
            Self::InvalidOption { .. }
            | Self::ContextMismatch { .. }
            | Self::Range(_)
            | Self::RequestTooLarge { .. }
            | Self::InvalidAtomic { .. } => ErrorKind::Misuse,
            Self::Chain { source, .. } => source.kind(),
            Self::Completion { status, .. } => status.kind(),
            Self::Timeout { .. } => ErrorKind::Timeout,
            // No system call failed: libibverbs left the devices out.
            Self::ListDevices { source, .. } if source.raw_os_error().is_none() => ErrorKind::NotFound,
            Self::Device { source, .. } | Self::Post { source, .. } | Self::ListDevices { source, .. } => {
                ErrorKind::of(source)
            }
        }
    }
}

/// The vendor's error code of a failed completion, in words.
pub(crate) fn vendor(code: u32) -> String {
    if code == 0 { String::new() } else { format!(", vendor error {code:#x}") }
}

fn listed(names: &[String], reason: &str) -> String {
    match (names, reason) {
        ([], reason) => reason.into(),
        (names, "") => format!("present: {}", names.join(", ")),
        (names, reason) => format!("present: {}; {reason}", names.join(", ")),
    }
}

fn posted_before(count: usize) -> String {
    match count {
        0 => "nothing was posted".into(),
        1 => "the one before it was posted".into(),
        count => format!("the {count} before it were posted"),
    }
}

fn post_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOMEM) => ": the queue is full, so poll completions first",
        Some(libc::EINVAL) => {
            ": the queue pair does not permit the length or the number of elements, or is not in RTS (is it connected?)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_lists_those_present_and_says_why_it_is_not_among_them() {
        let named = |present: &[&str], reason: &str| {
            let present = present.iter().map(ToString::to_string).collect();
            Error::UnknownDevice { name: "mlx5_9".into(), present, reason: reason.into() }.to_string()
        };
        assert!(named(&["rxe0", "mlx5_0"], "").ends_with("; present: rxe0, mlx5_0"));
        assert!(named(&["rxe0"], "its node is missing").ends_with("; present: rxe0; its node is missing"));
        assert!(named(&[], "there is none").ends_with("\"mlx5_9\"; there is none"));
    }

    #[test]
    fn a_list_that_failed_has_the_kind_of_its_cause() {
        let kind = |source| Error::ListDevices { reason: "why".into(), source }.kind();
        assert_eq!(kind(io::Error::from_raw_os_error(libc::EMFILE)), ErrorKind::Limit);
        assert_eq!(kind(io::Error::from_raw_os_error(libc::EACCES)), ErrorKind::Permission);
        assert_eq!(kind(io::Error::other("libibverbs lists no device")), ErrorKind::NotFound);
    }
}
