//! Addresses and waiting times of the commands that connect.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use crate::Result;

/// Timeout for the peer's reply.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for a peer to connect.
pub const ACCEPT_TIMEOUT: Duration = Duration::from_secs(3600);

/// The address of a host by name or number.
pub fn address(host: &str, port: u16) -> Result<SocketAddr> {
    let found = (host, port).to_socket_addrs().map_err(|error| format!("{host}: {error}"))?.next();
    found.ok_or_else(|| format!("{host} has no address").into())
}
