//! What refuses a connection by IP address.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Why a connection did not come about; [`Error::Connect`](crate::Error) holds it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The connection manager is not there.
    #[error(
        "no connection manager: librdmacm (Debian: librdmacm1) and the kernel module rdma_ucm are needed, with access to /dev/infiniband/rdma_cm"
    )]
    NoManager {
        /// What the loader or the kernel answered.
        source: io::Error,
    },
    /// The address cannot be listened at.
    #[error("cannot listen at {address}{}", listen_hint(.source))]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the kernel answered.
        source: io::Error,
    },
    /// No RDMA device leads to the address.
    #[error("cannot find an RDMA device towards {address}{}", address_hint(.source))]
    Address {
        /// The peer's address.
        address: SocketAddr,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The address has no route.
    #[error("cannot find a route to {address}: is the fabric up?")]
    Route {
        /// The peer's address.
        address: SocketAddr,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Nobody answered.
    #[error("{address} did not answer: is the host up, and an RDMA device at that address?")]
    Unreachable {
        /// The peer's address.
        address: SocketAddr,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The peer said no.
    #[error("{address} rejected the connection: {}", rejection(*.reason))]
    Rejected {
        /// The peer's address.
        address: SocketAddr,
        /// The reason by its number, after the InfiniBand specification.
        reason: i32,
        /// What the peer has to say to it; padded with zeros.
        private_data: Vec<u8>,
    },
    /// The connection failed on its way.
    #[error("cannot {step} the connection with {address}")]
    Failed {
        /// "ask for", "accept", "establish", …
        step: &'static str,
        /// The peer's address.
        address: SocketAddr,
        /// What the kernel answered.
        source: io::Error,
    },
    /// It took too long.
    #[error("the connection with {address} was not there within {limit:?}: waited to {step}")]
    ConnectTimeout {
        /// "resolve the address", "be accepted", …
        step: &'static str,
        /// The peer's address, or ours for a listener.
        address: SocketAddr,
        /// The limit that was given.
        limit: Duration,
    },
    /// The address leads through another device than the connection was made on.
    #[error(
        "the way to {address} is through {route} and the connection was made on {made}: make it on a protection domain of that device and port"
    )]
    OtherDevice {
        /// The peer's address.
        address: SocketAddr,
        /// Device and port of the way.
        route: String,
        /// Device and port of the connection.
        made: String,
    },
    /// More private data than the protocol carries.
    #[error(
        "{length} bytes of private data, and this message carries {limit}: send them over the connection"
    )]
    PrivateDataTooLong {
        /// Bytes that were given.
        length: usize,
        /// Bytes that fit.
        limit: usize,
    },
}

fn listen_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => ": something else does",
        Some(libc::EADDRNOTAVAIL | libc::ENODEV) => ": no RDMA device has this address",
        _ => "",
    }
}

fn address_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENODEV) => ": the interface that it is routed through has none (rdma link)",
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => ": no route (ip route get)",
        Some(libc::ETIMEDOUT) => ": nobody there answers to ARP or neighbour discovery",
        Some(libc::EADDRNOTAVAIL) => ": the source address is not one of this host",
        _ => "",
    }
}

/// Reasons of the specification (`ib_cm.h`), those that are met.
fn rejection(reason: i32) -> String {
    let words = match reason {
        1 => "it has no queue pair left",
        3 => "it has no resources left",
        4 => "it had waited too long",
        8 => "nobody listens at that port",
        10 => "it takes this for an old connection; try again",
        28 => "its program does not want it",
        _ => return format!("reason {reason}"),
    };
    words.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejections_are_in_words_and_unknown_ones_survive() {
        assert_eq!(rejection(8), "nobody listens at that port");
        assert_eq!(rejection(77), "reason 77");
    }
}
