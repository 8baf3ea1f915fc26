//! Connections by IP address, through librdmacm.
//!
//! 1. The passive side binds a [`Listener`] and accepts its [`Incoming`] requests. The active side resolves an
//!    address to an [`Outgoing`].
//! 2. Each side then knows the device and port of the route. It creates a [`Connection`] there, with its own
//!    protection domain and regions, and passes it to [`Incoming::accept`] or [`Outgoing::connect`].
//! 3. A request carries up to 52 bytes of private data and a reply up to 192, and 4 less if the sender's connection or
//!    its [`Worker`](crate::transfer::Worker) has notifications. A [`RemoteRegion`](crate::RemoteRegion) of one run has
//!    52 bytes, and so fits into a request only without notifications.
//!
//! The private data also carries the MTU of each side's port at its end, and the connection uses the
//! smallest. Programs of other libraries use the MTU of the active side's network interface: give both interfaces
//! the same.
//!
//! On iWARP this is the only way to connect. The kernel's connection manager there brings the queue pair up by itself,
//! and no MTU is agreed.
//!
//! librdmacm is loaded at the first use. Programs that exchange [`Endpoint`](crate::verbs::Endpoint)s by other means
//! do not need it.

mod error;
mod incoming;
mod outgoing;
mod raw;
mod statement;

pub use error::Error;
pub use incoming::{Incoming, Listener};
pub use outgoing::Outgoing;

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use ibverbs_sys as ffi;
use ibverbs_sys::{ibv_qp_attr_mask as Mask, ibv_qp_state as State};

use self::error::Result;
use self::raw::{Event, Id};
use self::statement::Statement;
use crate::transfer::{Connection, Peer};
use crate::verbs::absence::{self, System};
use crate::verbs::{Depth, Fabric, QueuePair, QueuePairOptions};

/// Length of the private data in a request, of which the user has all but the last bytes.
const REQUEST: usize = 56;
/// Length of the private data in a reply, as above.
const ANSWER: usize = 196;
/// Maximum number of bytes of private data in a rejection.
const REJECT_DATA: usize = 148;

fn check_data(data: &[u8], limit: usize) -> Result<()> {
    match data.len() {
        length if length > limit => Err(Error::PrivateDataTooLong { length, limit }),
        _ => Ok(()),
    }
}

/// How a call waits for events. Each is written once, as a future, which is [run](block) where it may block.
#[derive(Debug, Clone, Copy)]
enum Wait {
    Block,
    #[cfg(feature = "tokio")]
    Tokio,
}

impl Wait {
    /// Waits until the id may have an event, for at most `left`.
    async fn readable(self, id: &Id, left: Duration) -> io::Result<()> {
        match self {
            Self::Block => id.readable(left),
            #[cfg(feature = "tokio")]
            Self::Tokio => {
                let descriptor = crate::transfer::watch(id.fd())?;
                // Looked at again in either case.
                let _ = tokio::time::timeout(left, descriptor.readable()).await;
                Ok(())
            }
        }
    }

    /// Waits for an event, until the timeout has passed since the start.
    async fn event(
        self,
        id: &Id,
        address: SocketAddr,
        step: &'static str,
        until: (Instant, Duration),
    ) -> Result<Event> {
        let (start, timeout) = until;
        let failed = |source| Error::Failed { step, address, source };
        loop {
            if let Some(event) = id.next_event().map_err(failed)? {
                return Ok(event);
            }
            let left = timeout.checked_sub(start.elapsed());
            let left = left.ok_or(Error::Timeout { step, address, timeout })?;
            self.readable(id, left).await.map_err(failed)?;
        }
    }

    /// Waits for an event of this kind.
    async fn expect(
        self,
        kind: u32,
        id: &Id,
        address: SocketAddr,
        step: &'static str,
        until: (Instant, Duration),
    ) -> Result<()> {
        let event = self.event(id, address, step, until).await?;
        if event.kind == kind { Ok(()) } else { Err(refused(event, address, step)) }
    }
}

/// Runs a future that waits by [blocking](Wait::Block).
fn block<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("it blocks instead"),
    }
}

/// The error of the first step: a new event channel or id.
fn no_manager(source: io::Error) -> Error {
    if absence::is_exhaustion(&source) {
        return Error::NoManager { reason: absence::exhaustion(&source).into(), source };
    }
    if source.raw_os_error().is_none() {
        let reason = "install librdmacm (Debian: librdmacm1) of rdma-core 23 or later".into();
        return Error::NoManager { reason, source };
    }
    let system = System::this();
    // librdmacm answers ENODEV if libibverbs lists no device.
    let no_device = || (source.raw_os_error() == Some(libc::ENODEV)).then(|| system.nothing_listed());
    match system.manager().or_else(no_device) {
        Some(cause) => Error::NoManager { reason: cause.text, source: cause.source.unwrap_or(source) },
        None => Error::NoManager { reason: "librdmacm failed".into(), source },
    }
}

/// The error for an event other than the expected one.
fn refused(event: Event, address: SocketAddr, step: &'static str) -> Error {
    use rdma_sys_ext::rdma_cm::event as kind;
    let source = io::Error::from_raw_os_error(event.status.saturating_neg().max(0));
    match event.kind {
        kind::ADDR_ERROR => Error::Address { address, source },
        kind::ROUTE_ERROR => Error::Route { address, source },
        kind::UNREACHABLE => Error::Unreachable { address, source },
        kind::REJECTED => Error::Rejected { address, reason: event.status, private_data: event.private_data },
        kind::DISCONNECTED => {
            let source = io::Error::from_raw_os_error(libc::ECONNRESET);
            Error::Failed { step, address, source }
        }
        _ => Error::Failed { step, address, source },
    }
}

/// Checks that the connection is on the device and port of the id's route.
fn check_device(id: &Id, address: SocketAddr, connection: &Connection) -> Result<()> {
    let route = (id.device_name(), id.port());
    let actual = (connection.domain().context().device_name(), connection.options().port);
    if (route.0.as_str(), route.1) == actual {
        return Ok(());
    }
    let named = |(device, port): (&str, u8)| format!("{device}, port {port}");
    let (route, made) = (named((&route.0, route.1)), named(actual));
    Err(Error::OtherDevice { address, route, made })
}

/// What this side states.
fn own_statement(connection: &Connection) -> Result<Statement> {
    let mtu = connection.domain().context().port(connection.options().port)?.mtu;
    let message_qp_num = connection.message_queue_pair().map_or(0, QueuePair::number);
    Ok(Statement { mtu, message_qp_num })
}

/// A connection whose queue pair is [started](start), until the connection manager has established it. If it does not,
/// because of an error or a future that is dropped, the connection is unusable.
struct Connecting<'c>(&'c Connection);

impl Connecting<'_> {
    fn established(self) {
        std::mem::forget(self);
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        self.0.fail("its connection was not established");
    }
}

/// Brings the queue pair to INIT, RTR and RTS, with the smallest MTU of the route, this side's port and the peer's; and
/// the one for messages, if both sides have it, to the same but for its peer.
fn start(
    id: &Id,
    address: SocketAddr,
    connection: &Connection,
    (own, peer): (Statement, Option<Statement>),
) -> Result<()> {
    let (own_mtu, peer_mtu) = (own.mtu, peer.map(|peer| peer.mtu));
    let kind = peer.map_or(Peer::Foreign, |peer| Peer::with_messages(peer.message_qp_num));
    let pair = connection.queue_pair();
    let messages = connection.message_queue_pair().zip(peer.filter(|peer| peer.message_qp_num != 0));
    let fabric = *pair.fabric().expect("a connection creates its queue pair");
    let (options, depth) = (connection.options(), connection.depth());
    let own = Own { options, depth, access: pair.remote_access(), fabric };
    bring_up(
        |state| {
            id.qp_attr(state).map_err(|source| Error::Failed {
                step: "set up the queue pair",
                address,
                source,
            })
        },
        own,
        |mut attr, mask, transition| {
            if mask.0 & Mask::IBV_QP_PKEY_INDEX.0 != 0 {
                fabric.check_route(connection.domain().context(), attr.pkey_index)?;
            }
            // iWARP has no path MTU.
            if mask.0 & Mask::IBV_QP_PATH_MTU.0 != 0 {
                let route = statement::bytes(attr.path_mtu);
                let refused = || Error::MtuMismatch { address, route, port: own_mtu };
                let mtu = statement::agree(route, own_mtu, peer_mtu).ok_or_else(refused)?;
                attr.path_mtu = statement::number(mtu).into();
            }
            if let Some((messages, peer)) = messages {
                let attr = ffi::ibv_qp_attr { dest_qp_num: peer.message_qp_num, ..attr };
                messages.modify(attr, mask, transition)?;
            }
            Ok(pair.modify(attr, mask, transition)?)
        },
    )
    .map(|initiator| {
        pair.set_initiator_depth(initiator);
        connection.set_peer(kind);
    })
}

/// What the connection itself decides.
#[derive(Clone, Copy)]
struct Own {
    options: QueuePairOptions,
    depth: Depth,
    /// What the peer may do, as `ibv_access_flags`.
    access: u32,
    fabric: Fabric,
}

/// Carries out each transition. The addresses and the P_Key index come from the connection manager (`attributes`),
/// and so does what the options of the fabric leave open; everything else comes from the connection. Returns the number of READs and atomics that may be in flight.
fn bring_up(
    attributes: impl Fn(u32) -> Result<(ffi::ibv_qp_attr, u32)>,
    own: Own,
    mut modify: impl FnMut(ffi::ibv_qp_attr, Mask, &str) -> Result<()>,
) -> Result<u8> {
    // Later bits are internal to the kernel, for RoCE, and libibverbs refuses them.
    const KNOWN: u32 = (1 << 21) - 1;
    let QueuePairOptions { timeout, retry_count, rnr_retry, .. } = own.options;
    let mut initiator = own.depth.initiator;
    // INIT once more: only the route knows the P_Key index, which is not 0 in a partition of IPoIB.
    let states = [State::IBV_QPS_INIT, State::IBV_QPS_RTR, State::IBV_QPS_RTS];
    for (state, transition) in states.into_iter().zip(["to INIT", "to RTR", "to RTS"]) {
        let (mut attr, mask) = attributes(state)?;
        attr.qp_access_flags = own.access;
        own.fabric.apply(&mut attr.ah_attr);
        attr.max_dest_rd_atomic = attr.max_dest_rd_atomic.min(own.depth.responder);
        attr.max_rd_atomic = attr.max_rd_atomic.min(own.depth.initiator);
        // On RoCE the connection manager proposes a timeout of seconds, which each lost packet would cost.
        (attr.timeout, attr.retry_cnt, attr.rnr_retry) = (timeout, retry_count, rnr_retry);
        attr.min_rnr_timer = 12; // 0.64 ms
        modify(attr, Mask(mask & KNOWN), transition)?;
        // iWARP's connection manager negotiates it by itself.
        if mask & Mask::IBV_QP_MAX_QP_RD_ATOMIC.0 != 0 {
            initiator = attr.max_rd_atomic;
        }
    }
    Ok(initiator)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCESS: u32 = 1 << 1 | 1 << 2;

    /// What the kernel's connection manager fills in (drivers/infiniband/core/cm.c) for a connection in the
    /// partition with P_Key index 3.
    fn attributes(state: u32) -> Result<(ffi::ibv_qp_attr, u32)> {
        let mut attr = ffi::ibv_qp_attr { qp_state: state, ..Default::default() };
        let mask = match state {
            State::IBV_QPS_INIT => {
                (attr.pkey_index, attr.port_num, attr.qp_access_flags) = (3, 2, 0xff);
                Mask::IBV_QP_STATE | Mask::IBV_QP_ACCESS_FLAGS | Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT
            }
            State::IBV_QPS_RTR => {
                (attr.dest_qp_num, attr.max_dest_rd_atomic) = (99, 128);
                Mask::IBV_QP_STATE | Mask::IBV_QP_DEST_QPN | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
            }
            _ => {
                (attr.timeout, attr.max_rd_atomic) = (20, 9);
                Mask::IBV_QP_STATE | Mask::IBV_QP_TIMEOUT | Mask::IBV_QP_MAX_QP_RD_ATOMIC
            }
        };
        // The kernel's own bits, which say that addresses are those of RoCE.
        Ok((attr, mask.0 | 1 << 21 | 1 << 24))
    }

    #[test]
    fn the_route_decides_the_p_key_index_before_rtr() {
        let depth = Depth { responder: 16, initiator: 4 };
        let own = Own {
            options: QueuePairOptions::default().timeout(15),
            depth,
            access: ACCESS,
            fabric: Fabric::default(),
        };
        let mut steps = Vec::new();
        let initiator = bring_up(attributes, own, |attr, mask, transition| {
            steps.push((attr, mask.0, transition.to_owned()));
            Ok(())
        });
        assert_eq!(initiator.unwrap(), 4);
        let names: Vec<_> = steps.iter().map(|(attr, _, name)| (attr.qp_state, name.as_str())).collect();
        assert_eq!(names, [(1, "to INIT"), (2, "to RTR"), (3, "to RTS")]);
        let [(init, init_mask, _), (rtr, rtr_mask, _), (rts, rts_mask, _)] = &steps[..] else { panic!() };
        assert_eq!((init.pkey_index, init.port_num, init.qp_access_flags), (3, 2, ACCESS));
        assert_eq!(*init_mask, 1 | 1 << 3 | 1 << 4 | 1 << 5, "STATE, ACCESS_FLAGS, PKEY_INDEX, PORT");
        assert_eq!((rtr.dest_qp_num, rtr.max_dest_rd_atomic), (99, 16));
        assert_eq!(*rtr_mask, 1 | 1 << 17 | 1 << 20);
        assert_eq!((rts.timeout, rts.max_rd_atomic), (15, 4));
        assert_eq!(*rts_mask, 1 | 1 << 9 | 1 << 13);
    }

    #[test]
    fn a_manager_that_leaves_the_depth_out_leaves_it_to_the_options() {
        let depth = Depth { responder: 16, initiator: 4 };
        let own =
            Own { options: QueuePairOptions::default(), depth, access: ACCESS, fabric: Fabric::default() };
        let iwarp = |state| Ok((ffi::ibv_qp_attr { qp_state: state, ..Default::default() }, 0));
        assert_eq!(bring_up(iwarp, own, |_, _, _| Ok(())).unwrap(), 4);
    }

    #[test]
    fn nothing_follows_a_transition_that_failed() {
        let depth = Depth { responder: 1, initiator: 1 };
        let own =
            Own { options: QueuePairOptions::default(), depth, access: ACCESS, fabric: Fabric::default() };
        let mut count = 0;
        let failed = bring_up(attributes, own, |_, _, _| {
            count += 1;
            Err(Error::PrivateDataTooLong { length: 1, limit: 0 })
        });
        assert!(failed.is_err());
        assert_eq!(count, 1);
    }
}
