//! Connections by IP address, through librdmacm.
//!
//! One side makes a [`Listener`] and takes [`Incoming`] requests, the other one resolves an address to an
//! [`Outgoing`] one. Each learns there which device the way goes through, makes a
//! [`Connection`] on it, with its own protection domain and regions, and
//! connects that. Up to 56 bytes go with the request and 196 with the answer: a
//! [`RemoteRegion`](crate::RemoteRegion) of one run fits into either.
//!
//! librdmacm is loaded when it is first needed. Whoever exchanges
//! [`Endpoint`](crate::verbs::Endpoint)s by other means needs none.

mod incoming;
mod outgoing;
mod raw;

pub use incoming::{Incoming, Listener};
pub use outgoing::Outgoing;
pub(crate) use raw::Link;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ibverbs_sys as ffi;

use self::raw::{Event, Id};
use crate::Result;
use crate::error::ConnectError;
use crate::transfer::Connection;
use crate::verbs::QueuePairOptions;

/// Bytes that a request carries, an answer, and a rejection.
const REQUEST_DATA: usize = 56;
const ANSWER_DATA: usize = 196;
const REJECT_DATA: usize = 148;

fn check_data(data: &[u8], limit: usize) -> Result<()> {
    match data.len() {
        length if length > limit => Err(ConnectError::PrivateDataTooLong { length, limit }.into()),
        _ => Ok(()),
    }
}

/// Waits for an event until `limit` after `start`.
fn wait(id: &Id, address: SocketAddr, step: &'static str, until: (Instant, Duration)) -> Result<Event> {
    let (start, limit) = until;
    let left = || limit.checked_sub(start.elapsed());
    let failed = |source| ConnectError::Failed { step, address, source };
    while let Some(left) = left() {
        if let Some(event) = id.next_event(left).map_err(failed)? {
            return Ok(event);
        }
    }
    Err(ConnectError::ConnectTimeout { step, address, limit }.into())
}

/// The error that an event other than the expected one is.
fn refused(event: Event, address: SocketAddr, step: &'static str) -> crate::Error {
    use rdma_sys_ext::rdma_cm::event as kind;
    let source = std::io::Error::from_raw_os_error(event.status.saturating_neg().max(0));
    match event.kind {
        kind::ADDR_ERROR => ConnectError::Address { address, source },
        kind::ROUTE_ERROR => ConnectError::Route { address, source },
        kind::UNREACHABLE => ConnectError::Unreachable { address, source },
        kind::REJECTED => {
            ConnectError::Rejected { address, reason: event.status, private_data: event.private_data }
        }
        kind::DISCONNECTED => {
            let source = std::io::Error::from_raw_os_error(libc::ECONNRESET);
            ConnectError::Failed { step, address, source }
        }
        _ => ConnectError::Failed { step, address, source },
    }
    .into()
}

/// Checks that the connection is on the device and port that the id's way goes through.
fn check_device(id: &Id, address: SocketAddr, connection: &Connection) -> Result<()> {
    let route = (id.device_name(), id.port());
    let made = (connection.domain().context().device_name(), connection.options().port);
    if (route.0.as_str(), route.1) == made {
        return Ok(());
    }
    let named = |(device, port): (&str, u8)| format!("{device}, port {port}");
    let (route, made) = (named((&route.0, route.1)), named(made));
    Err(ConnectError::OtherDevice { address, route, made }.into())
}

/// Brings the queue pair to where it sends and receives, as the id says, in what the options do not.
fn start(id: &Id, address: SocketAddr, connection: &Connection) -> Result<()> {
    use ffi::{ibv_qp_attr_mask as Mask, ibv_qp_state as State};
    // Later bits are the kernel's own, for RoCE, and libibverbs refuses them.
    const KNOWN: u32 = (1 << 21) - 1;
    let failed = |source| ConnectError::Failed { step: "set up", address, source };
    let QueuePairOptions { timeout, retry_count, rnr_retry, .. } = connection.options();
    let rd_atomic = connection.rd_atomic();
    for (state, what) in
        [(State::IBV_QPS_RTR, "to ready to receive"), (State::IBV_QPS_RTS, "to ready to send")]
    {
        let (mut attr, mask) = id.qp_attr(state).map_err(failed)?;
        attr.max_dest_rd_atomic = attr.max_dest_rd_atomic.min(rd_atomic);
        attr.max_rd_atomic = attr.max_rd_atomic.min(rd_atomic);
        // The manager's time-out is of seconds on RoCE, which a lost packet then costs.
        (attr.timeout, attr.retry_cnt, attr.rnr_retry) = (timeout, retry_count, rnr_retry);
        attr.min_rnr_timer = 12; // 0.64 ms
        connection.pair().modify(attr, Mask(mask & KNOWN), what)?;
    }
    Ok(())
}
