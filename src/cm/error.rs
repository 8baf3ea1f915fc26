//! Errors of connections by IP address.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::kind::{ErrorKind, readable_error};
use crate::verbs;

/// The result of the functions of this module.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a connection by IP address was not established.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// librdmacm or the kernel's connection manager cannot be used.
    #[error("cannot use the connection manager: {reason}")]
    NoManager {
        /// What is missing, forbidden or exhausted, and what to do.
        reason: String,
        /// The error of the loader, or the errno of the kernel.
        source: io::Error,
    },
    /// The listener cannot be bound to the address.
    #[error("cannot listen on {address}{}", listen_hint(.source))]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The errno of the kernel.
        source: io::Error,
    },
    /// No RDMA device leads to the address.
    #[error("no RDMA device leads to {address}{}", address_hint(.source))]
    Address {
        /// The peer's address.
        address: SocketAddr,
        /// The errno of the kernel.
        source: io::Error,
    },
    /// The fabric has no route to the address.
    #[error("cannot find a route to {address}: check that the fabric is up")]
    Route {
        /// The peer's address.
        address: SocketAddr,
        /// The errno of the kernel.
        source: io::Error,
    },
    /// The peer did not answer.
    #[error("{address} did not answer: check that the host is up and has an RDMA device at that address")]
    Unreachable {
        /// The peer's address.
        address: SocketAddr,
        /// The errno of the kernel.
        source: io::Error,
    },
    /// The peer rejected the connection.
    #[error("{address} rejected the connection: {}", rejection(*.reason))]
    Rejected {
        /// The peer's address.
        address: SocketAddr,
        /// The reason, as the InfiniBand specification numbers them (`include/rdma/ib_cm.h`).
        reason: i32,
        /// The peer's private data, padded with zeros.
        private_data: Vec<u8>,
    },
    /// A step of the connection failed.
    #[error("{address}: cannot {step}")]
    Failed {
        /// The step: "request the connection", "accept the connection", …
        step: &'static str,
        /// The peer's address, or the listener's own.
        address: SocketAddr,
        /// The errno of the kernel.
        source: io::Error,
    },
    /// The timeout expired.
    #[error("{address}: cannot {step} within {timeout:?}")]
    Timeout {
        /// The step: "resolve the address", "receive a reply", …
        step: &'static str,
        /// The peer's address, or the listener's own.
        address: SocketAddr,
        /// The timeout.
        timeout: Duration,
    },
    /// The connection is on another device or port than the route.
    #[error(
        "the route to {address} leads through {route} and the connection was made on {made}: create it on the device and port of the route"
    )]
    OtherDevice {
        /// The peer's address.
        address: SocketAddr,
        /// Device and port of the route.
        route: String,
        /// Device and port of the connection.
        made: String,
    },
    /// The peer's library does not negotiate the MTU and uses one that this side's port does not carry.
    #[error(
        "the route to {address} has an MTU of {route} bytes, this side's port carries {port}, and the peer's library does not negotiate: give the network interfaces of both ends the same MTU (ip link set mtu)"
    )]
    MtuMismatch {
        /// The peer's address.
        address: SocketAddr,
        /// MTU of the route in bytes, which the peer uses.
        route: u32,
        /// MTU of this side's port in bytes.
        port: u32,
    },
    /// More private data than the message carries.
    #[error(
        "{length} bytes of private data are too long for this message, which carries {limit}: send them over the connection"
    )]
    PrivateDataTooLong {
        /// Length of the private data in bytes.
        length: usize,
        /// Maximum number of bytes that the message carries.
        limit: usize,
    },
    /// The queue pair cannot be brought to RTR or RTS.
    #[error(transparent)]
    Verbs(#[from] verbs::Error),
}

readable_error!(Error);

impl Error {
    /// The kind of the error: what a program can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoManager { source, .. } => match ErrorKind::of(source) {
                limit @ (ErrorKind::Limit | ErrorKind::Permission | ErrorKind::OutOfMemory) => limit,
                _ => ErrorKind::NotFound,
            },
            Self::Address { .. } | Self::Route { .. } => ErrorKind::NotFound,
            Self::MtuMismatch { .. } => ErrorKind::Unsupported,
            Self::Unreachable { .. } | Self::Rejected { .. } => ErrorKind::PeerGone,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::OtherDevice { .. } | Self::PrivateDataTooLong { .. } => ErrorKind::Misuse,
            Self::Listen { source, .. } | Self::Failed { source, .. } => ErrorKind::of(source),
            Self::Verbs(error) => error.kind(),
        }
    }
}

fn listen_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => ": another program listens there",
        Some(libc::EADDRNOTAVAIL | libc::ENODEV) => ": no RDMA device has this address",
        _ => "",
    }
}

fn address_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENODEV) => ": the interface on its route has no RDMA device (rdma link)",
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => ": no route (ip route get)",
        Some(libc::ETIMEDOUT) => ": no reply to ARP or neighbour discovery",
        Some(libc::EADDRNOTAVAIL) => ": this host does not have the source address",
        _ => "",
    }
}

/// The common reasons of the InfiniBand specification (`include/rdma/ib_cm.h`).
fn rejection(reason: i32) -> String {
    let words = match reason {
        1 => "it has no queue pair left",
        3 => "it has no resources left",
        4 => "it timed out",
        8 => "no program listens at that port",
        10 => "it has a stale connection with this queue pair number; try again",
        28 => "its program rejected it",
        _ => return format!("reason {reason}"),
    };
    words.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_that_cannot_be_used_has_the_kind_of_its_cause() {
        let kind = |source| Error::NoManager { reason: "why".into(), source }.kind();
        assert_eq!(kind(io::Error::from_raw_os_error(libc::EMFILE)), ErrorKind::Limit);
        assert_eq!(kind(io::Error::from_raw_os_error(libc::EPERM)), ErrorKind::Permission);
        assert_eq!(kind(io::Error::from_raw_os_error(libc::ENODEV)), ErrorKind::NotFound);
        assert_eq!(kind(io::Error::other("no library")), ErrorKind::NotFound);
    }

    #[test]
    fn rejections_are_in_words_and_unknown_ones_survive() {
        assert_eq!(rejection(8), "no program listens at that port");
        assert_eq!(rejection(77), "reason 77");
    }
}
