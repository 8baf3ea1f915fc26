//! librdmacm: connections by IP address.
//!
//! The first lookup here loads the library, so a program that connects by other means starts without
//! it. Each function returns a function pointer or a [`SymbolError`](crate::symbols::SymbolError).
//!
//! Unless stated otherwise, the C functions return 0, or -1 with errno set.
//!
//! Source: `librdmacm/rdma_cma.h` of rdma-core.

use ibverbs_sys::{ibv_ah_attr, ibv_context, ibv_gid, ibv_qp, ibv_qp_attr};
use std::ffi::{CStr, c_int, c_void};

use crate::symbols::{Symbol, symbols};

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

/// The level of options of an id.
pub const RDMA_OPTION_ID: c_int = 0;
/// The type of service, one byte: the traffic class of the route.
pub const RDMA_OPTION_ID_TOS: c_int = 0;

/// Receives events. The descriptor may be polled and set non-blocking.
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
    /// GID of this side.
    pub sgid: ibv_gid,
    /// GID of the peer.
    pub dgid: ibv_gid,
    /// Partition key, big-endian.
    pub pkey: u16,
}

/// The addresses of both sides. In C the first two fields are unions with shorter socket addresses.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rdma_addr {
    /// Address of this side; family 0 until the id is bound.
    pub src_storage: libc::sockaddr_storage,
    /// Address of the peer.
    pub dst_storage: libc::sockaddr_storage,
    /// The addresses on the fabric.
    pub ibaddr: rdma_ib_addr,
}

/// The route to the peer.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rdma_route {
    /// Both addresses.
    pub addr: rdma_addr,
    /// Paths; null until the route is resolved.
    pub path_rec: *mut c_void,
    /// Number of paths.
    pub num_paths: c_int,
}

/// Identifies a connection or a listener.
#[repr(C)]
pub struct rdma_cm_id {
    /// The device; null until an address is resolved.
    pub verbs: *mut ibv_context,
    /// Receives the events of this id.
    pub channel: *mut rdma_event_channel,
    /// For the caller's use.
    pub context: *mut c_void,
    /// The queue pair; null if the caller made it without librdmacm.
    pub qp: *mut ibv_qp,
    /// Addresses and paths.
    pub route: rdma_route,
    /// Port space.
    pub ps: u32,
    /// Port of the device, counted from 1; 0 until an address is resolved.
    pub port_num: u8,
    /// The last event of a synchronous id.
    pub event: *mut rdma_cm_event,
    /// Objects that librdmacm creates on request (channels, completion queues, SRQ, PD).
    pub objects: [*mut c_void; 6],
    /// Type of the queue pair.
    pub qp_type: u32,
}

/// Connection parameters that the two sides exchange.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct rdma_conn_param {
    /// Private data for or from the peer.
    pub private_data: *const c_void,
    /// Bytes of private data. Data from the peer is zero-padded to the size that the protocol carries.
    pub private_data_len: u8,
    /// READs and atomics of the peer that this side serves at once.
    pub responder_resources: u8,
    /// READs and atomics that this side keeps in flight.
    pub initiator_depth: u8,
    /// Whether the hardware has flow control.
    pub flow_control: u8,
    /// Retries after a timeout; ignored when accepting.
    pub retry_count: u8,
    /// Retries when the peer has no receive posted.
    pub rnr_retry_count: u8,
    /// Whether the queue pair has a shared receive queue.
    pub srq: u8,
    /// Number of the queue pair, if [`rdma_cm_id::qp`] is null.
    pub qp_num: u32,
}

/// Parameters from an unreliable-datagram peer.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rdma_ud_param {
    /// Private data from the peer.
    pub private_data: *const c_void,
    /// Bytes of private data.
    pub private_data_len: u8,
    /// Address vector of the peer.
    pub ah_attr: ibv_ah_attr,
    /// The peer's queue pair.
    pub qp_num: u32,
    /// The peer's queue key.
    pub qkey: u32,
}

/// Parameters of an event.
#[repr(C)]
#[derive(Clone, Copy)]
pub union rdma_cm_event_param {
    /// For a reliable connection.
    pub conn: rdma_conn_param,
    /// For unreliable datagrams.
    pub ud: rdma_ud_param,
}

/// An event. Acknowledge it with [`rdma_ack_cm_event`].
#[repr(C)]
pub struct rdma_cm_event {
    /// The id that the event is for; for a connection request, the new id.
    pub id: *mut rdma_cm_id,
    /// The listener of a connection request.
    pub listen_id: *mut rdma_cm_id,
    /// One of the constants in [`event`].
    pub event: u32,
    /// 0, a negative errno, or the reason of a rejection.
    pub status: c_int,
    /// Parameters of the event.
    pub param: rdma_cm_event_param,
}

symbols! {
    /// Opens a channel. On failure the result is null with errno set; ENOENT or ENODEV: the module
    /// `rdma_ucm` is not loaded.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_create_event_channel() -> *mut rdma_event_channel, CreateEventChannelFn;

    /// Closes a channel. No id may use it any more.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_destroy_event_channel(channel: *mut rdma_event_channel), DestroyEventChannelFn;

    /// Creates an id that reports its events to `channel`.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_create_id(
        channel: *mut rdma_event_channel, id: *mut *mut rdma_cm_id, context: *mut c_void, ps: u32
    ) -> c_int, CreateIdFn;

    /// Destroys an id. Blocks until all its events are acknowledged.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int, DestroyIdFn;

    /// Moves the id to another event channel.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_migrate_id(id: *mut rdma_cm_id, channel: *mut rdma_event_channel) -> c_int, MigrateIdFn;

    /// Binds to a local address, which selects the device.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_bind_addr(id: *mut rdma_cm_id, addr: *mut libc::sockaddr) -> c_int, BindAddrFn;

    /// Resolves an address to a device. The result arrives as an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_resolve_addr(
        id: *mut rdma_cm_id, src: *mut libc::sockaddr, dst: *mut libc::sockaddr, timeout_ms: c_int
    ) -> c_int, ResolveAddrFn;

    /// Resolves the route. The result arrives as an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_resolve_route(id: *mut rdma_cm_id, timeout_ms: c_int) -> c_int, ResolveRouteFn;

    /// Listens on the address that the id is bound to.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int, ListenFn;

    /// Sends a connection request to the peer. The result arrives as an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_connect(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int, ConnectFn;

    /// Accepts a connection request. The result arrives as an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_accept(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int, AcceptFn;

    /// Rejects a connection request.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_reject(
        id: *mut rdma_cm_id, private_data: *const c_void, private_data_len: u8
    ) -> c_int, RejectFn;

    /// Acknowledges the peer's response, if the id has no queue pair.
    LIBRDMACM "RDMACM_1.2" "rdma-core 23":
    fn rdma_establish(id: *mut rdma_cm_id) -> c_int, EstablishFn;

    /// Fills in the attributes that move a queue pair to the state in `attr`.
    LIBRDMACM "RDMACM_1.2" "rdma-core 23":
    fn rdma_init_qp_attr(
        id: *mut rdma_cm_id, attr: *mut ibv_qp_attr, mask: *mut c_int
    ) -> c_int, InitQpAttrFn;

    /// Sets an option of an id, of `optlen` bytes. [`RDMA_OPTION_ID_TOS`] of [`RDMA_OPTION_ID`] counts for routes that
    /// are resolved later.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_set_option(
        id: *mut rdma_cm_id, level: c_int, optname: c_int, optval: *mut c_void, optlen: usize
    ) -> c_int, SetOptionFn;

    /// Disconnects; both sides get an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int, DisconnectFn;

    /// Takes the next event. Blocks until there is one; on a non-blocking channel fails with EAGAIN.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_get_cm_event(
        channel: *mut rdma_event_channel, event: *mut *mut rdma_cm_event
    ) -> c_int, GetCmEventFn;

    /// Acknowledges and frees an event.
    LIBRDMACM "RDMACM_1.0" "librdmacm 1.0":
    fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int, AckCmEventFn;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbols::SymbolError;

    /// Compared with the installed librdmacm, if there is one. Debian 12 has librdmacm 44.
    #[test]
    fn every_symbol_exists_in_its_version() {
        let errors = [
            rdma_create_event_channel().err(),
            rdma_destroy_event_channel().err(),
            rdma_create_id().err(),
            rdma_destroy_id().err(),
            rdma_migrate_id().err(),
            rdma_bind_addr().err(),
            rdma_resolve_addr().err(),
            rdma_resolve_route().err(),
            rdma_listen().err(),
            rdma_connect().err(),
            rdma_accept().err(),
            rdma_reject().err(),
            rdma_establish().err(),
            rdma_init_qp_attr().err(),
            rdma_set_option().err(),
            rdma_disconnect().err(),
            rdma_get_cm_event().err(),
            rdma_ack_cm_event().err(),
        ];
        for error in errors.into_iter().flatten() {
            assert!(matches!(error, SymbolError::NotLoaded { errno: None, .. }), "{error}");
        }
    }
}
