//! librdmacm: connections by IP address.
//!
//! The library is loaded by the first call of a function here, so that a program that makes its
//! connections by other means starts without it. Each function gives a pointer or a [`MissingSymbol`].
//!
//! Results are 0, or -1 with errno set, where nothing else is said.
//!
//! Source: `librdmacm/rdma_cma.h` of rdma-core.

use ibverbs_sys::{ibv_ah_attr, ibv_context, ibv_gid, ibv_qp, ibv_qp_attr};
use std::ffi::{CStr, c_int, c_void};

use crate::symbols::{MissingSymbol, Symbol, symbols};

const LIBRDMACM: &CStr = c"librdmacm.so.1";

/// `enum rdma_cm_event_type`.
pub mod event {
    #![allow(missing_docs)] // the names are those of the C constants, without RDMA_CM_EVENT_
    pub const ADDR_RESOLVED: u32 = 0;
    pub const ADDR_ERROR: u32 = 1;
    pub const ROUTE_RESOLVED: u32 = 2;
    pub const ROUTE_ERROR: u32 = 3;
    pub const CONNECT_REQUEST: u32 = 4;
    pub const CONNECT_RESPONSE: u32 = 5;
    pub const CONNECT_ERROR: u32 = 6;
    pub const UNREACHABLE: u32 = 7;
    pub const REJECTED: u32 = 8;
    pub const ESTABLISHED: u32 = 9;
    pub const DISCONNECTED: u32 = 10;
    pub const DEVICE_REMOVAL: u32 = 11;
    pub const ADDR_CHANGE: u32 = 14;
    pub const TIMEWAIT_EXIT: u32 = 15;
}

/// The port space of reliable connections.
pub const RDMA_PS_TCP: u32 = 0x0106;

/// Where events come in. Its descriptor may be polled and be made non-blocking.
#[repr(C)]
#[derive(Debug)]
pub struct rdma_event_channel {
    /// Readable when there is an event.
    pub fd: c_int,
}

/// Two GIDs and a partition key.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rdma_ib_addr {
    /// Of this side.
    pub sgid: ibv_gid,
    /// Of the peer.
    pub dgid: ibv_gid,
    /// Big-endian.
    pub pkey: u16,
}

/// The addresses of both sides. In C the first two are unions with shorter socket addresses.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rdma_addr {
    /// Of this side; family 0 before it is bound.
    pub src_storage: libc::sockaddr_storage,
    /// Of the peer.
    pub dst_storage: libc::sockaddr_storage,
    /// As the fabric has them.
    pub ibaddr: rdma_ib_addr,
}

/// How the peer is reached.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rdma_route {
    /// Both addresses.
    pub addr: rdma_addr,
    /// Paths, null without a resolved route.
    pub path_rec: *mut c_void,
    /// Their number.
    pub num_paths: c_int,
}

/// What a connection or a listener is known by.
#[repr(C)]
pub struct rdma_cm_id {
    /// The device, null until an address is resolved.
    pub verbs: *mut ibv_context,
    /// Where its events go.
    pub channel: *mut rdma_event_channel,
    /// The user's.
    pub context: *mut c_void,
    /// The queue pair, null where the user keeps it to themselves.
    pub qp: *mut ibv_qp,
    /// Addresses and paths.
    pub route: rdma_route,
    /// Port space.
    pub ps: u32,
    /// Port of the device, from 1; 0 until an address is resolved.
    pub port_num: u8,
    /// The last event of a synchronous id.
    pub event: *mut rdma_cm_event,
    /// Objects that librdmacm makes for who lets it.
    pub objects: [*mut c_void; 6],
    /// Type of the queue pair.
    pub qp_type: u32,
}

/// What the two sides tell each other when they connect.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct rdma_conn_param {
    /// Bytes for or from the peer.
    pub private_data: *const c_void,
    /// Their number; what comes from a peer is padded with zeros to what the protocol carries.
    pub private_data_len: u8,
    /// READs and atomics of the peer that are answered at once.
    pub responder_resources: u8,
    /// READs and atomics under way at once.
    pub initiator_depth: u8,
    /// Whether the hardware has flow control.
    pub flow_control: u8,
    /// Tries after a time-out; ignored when accepting.
    pub retry_count: u8,
    /// Tries when the peer has no receive posted.
    pub rnr_retry_count: u8,
    /// Whether the queue pair has a shared receive queue.
    pub srq: u8,
    /// Number of the queue pair, where the id has none.
    pub qp_num: u32,
}

/// What an unreliable peer tells.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rdma_ud_param {
    /// Bytes from the peer.
    pub private_data: *const c_void,
    /// Their number.
    pub private_data_len: u8,
    /// How to reach it.
    pub ah_attr: ibv_ah_attr,
    /// Its queue pair.
    pub qp_num: u32,
    /// Its key.
    pub qkey: u32,
}

/// What comes with an event.
#[repr(C)]
#[derive(Clone, Copy)]
pub union rdma_cm_event_param {
    /// Of a reliable connection.
    pub conn: rdma_conn_param,
    /// Of an unreliable one.
    pub ud: rdma_ud_param,
}

/// An event, to be acknowledged.
#[repr(C)]
pub struct rdma_cm_event {
    /// Whose it is; of a connection request, the new id.
    pub id: *mut rdma_cm_id,
    /// The listener of a connection request.
    pub listen_id: *mut rdma_cm_id,
    /// One of the constants in [`event`].
    pub event: u32,
    /// 0, a negative errno, or the reason of a rejection.
    pub status: c_int,
    /// What comes with it.
    pub param: rdma_cm_event_param,
}

symbols! {
    /// Opens a channel; null with errno set on failure: ENOENT or ENODEV without the module `rdma_ucm`.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_create_event_channel() -> *mut rdma_event_channel, CreateEventChannelFn;

    /// Closes a channel that no id uses any more.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_destroy_event_channel(channel: *mut rdma_event_channel), DestroyEventChannelFn;

    /// Makes an id whose events go to the channel.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_create_id(
        channel: *mut rdma_event_channel, id: *mut *mut rdma_cm_id, context: *mut c_void, ps: u32
    ) -> c_int, CreateIdFn;

    /// Destroys an id; waits until all its events are acknowledged.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int, DestroyIdFn;

    /// Sends the id's events to another channel from now on.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_migrate_id(id: *mut rdma_cm_id, channel: *mut rdma_event_channel) -> c_int, MigrateIdFn;

    /// Binds to an address of this machine, which chooses the device.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_bind_addr(id: *mut rdma_cm_id, addr: *mut libc::sockaddr) -> c_int, BindAddrFn;

    /// Finds the device towards an address; ends in an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_resolve_addr(
        id: *mut rdma_cm_id, src: *mut libc::sockaddr, dst: *mut libc::sockaddr, timeout_ms: c_int
    ) -> c_int, ResolveAddrFn;

    /// Finds the route; ends in an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_resolve_route(id: *mut rdma_cm_id, timeout_ms: c_int) -> c_int, ResolveRouteFn;

    /// Listens at the address that the id is bound to.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int, ListenFn;

    /// Asks the peer for a connection; ends in an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_connect(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int, ConnectFn;

    /// Answers a request with yes; ends in an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_accept(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int, AcceptFn;

    /// Answers a request with no.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_reject(
        id: *mut rdma_cm_id, private_data: *const c_void, private_data_len: u8
    ) -> c_int, RejectFn;

    /// Tells the peer that its answer was received, where the id has no queue pair.
    LIBRDMACM "RDMACM_1.2" "rdma-core 23":
    fn rdma_establish(id: *mut rdma_cm_id) -> c_int, EstablishFn;

    /// What to modify a queue pair with to bring it to the state that `attr` names.
    LIBRDMACM "RDMACM_1.2" "rdma-core 23":
    fn rdma_init_qp_attr(
        id: *mut rdma_cm_id, attr: *mut ibv_qp_attr, mask: *mut c_int
    ) -> c_int, InitQpAttrFn;

    /// Ends a connection; both sides get an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int, DisconnectFn;

    /// Takes an event, waiting for one unless the channel is non-blocking (EAGAIN).
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_get_cm_event(
        channel: *mut rdma_event_channel, event: *mut *mut rdma_cm_event
    ) -> c_int, GetCmEventFn;

    /// Gives an event back. What it points to is gone then.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int, AckCmEventFn;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_is_there_with_its_version() {
        // Debian 12 has librdmacm 44; the list is what the module has.
        rdma_create_event_channel().unwrap();
        rdma_destroy_event_channel().unwrap();
        rdma_create_id().unwrap();
        rdma_destroy_id().unwrap();
        rdma_migrate_id().unwrap();
        rdma_bind_addr().unwrap();
        rdma_resolve_addr().unwrap();
        rdma_resolve_route().unwrap();
        rdma_listen().unwrap();
        rdma_connect().unwrap();
        rdma_accept().unwrap();
        rdma_reject().unwrap();
        rdma_establish().unwrap();
        rdma_init_qp_attr().unwrap();
        rdma_disconnect().unwrap();
        rdma_get_cm_event().unwrap();
        rdma_ack_cm_event().unwrap();
    }
}
