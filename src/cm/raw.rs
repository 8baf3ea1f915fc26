//! librdmacm's objects, one function a C call.
//!
//! `unsafe` is here for the calls and for reading the structs that the library hands out.

use std::ffi::{CStr, c_int};
use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ibverbs_sys as ffi;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockaddrLike, SockaddrStorage};
use rdma_sys_ext::rdma_cm::{self as cm, event as kind};
use rdma_sys_ext::symbols::MissingSymbol;

fn found<T>(symbol: Result<T, MissingSymbol>) -> io::Result<T> {
    symbol.map_err(io::Error::other)
}

fn check(code: c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Where events come in; non-blocking.
struct Channel(NonNull<cm::rdma_event_channel>);

impl Channel {
    fn new() -> io::Result<Self> {
        let create = found(cm::rdma_create_event_channel())?;
        // SAFETY: it takes no argument.
        let raw = unsafe { create() };
        let channel = Self(NonNull::new(raw).ok_or_else(io::Error::last_os_error)?);
        let flags = OFlag::from_bits_retain(fcntl(channel.fd(), FcntlArg::F_GETFL)?);
        fcntl(channel.fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is open as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw((*self.0.as_ptr()).fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if let Ok(destroy) = cm::rdma_destroy_event_channel() {
            // SAFETY: the channel is ours, and the id that used it is gone: see `Id`.
            unsafe { destroy(self.0.as_ptr()) };
        }
    }
}

/// A connection or a listener, with a channel of its own.
pub(super) struct Id {
    raw: NonNull<cm::rdma_cm_id>,
    // Dropped after the id was destroyed.
    channel: Channel,
}

// SAFETY: librdmacm's objects may be used from any thread.
unsafe impl Send for Id {}
// SAFETY: the library locks what it changes, and what is read here without a call is written before the
// id is shared: when it is bound or resolved.
unsafe impl Sync for Id {}

impl Drop for Id {
    fn drop(&mut self) {
        let Ok(destroy) = cm::rdma_destroy_id() else { return };
        // SAFETY: the id is ours. Every event was acknowledged when it was taken, so this does not wait.
        if let Err(error) = check(unsafe { destroy(self.raw.as_ptr()) }) {
            tracing::warn!(%error, "cannot destroy a connection's id");
        }
    }
}

/// An event, already acknowledged.
#[derive(Debug)]
pub(super) struct Event {
    pub kind: u32,
    pub status: i32,
    pub private_data: Vec<u8>,
    pub responder_resources: u8,
    pub initiator_depth: u8,
    /// Of a connection request: the new id, which somebody has to take over.
    pub request: Option<NonNull<cm::rdma_cm_id>>,
}

// SAFETY: an id may be used from any thread, and nobody else has that of a request.
unsafe impl Send for Event {}

impl Id {
    pub(super) fn new() -> io::Result<Self> {
        let channel = Channel::new()?;
        let create = found(cm::rdma_create_id())?;
        let mut raw = null_mut();
        // SAFETY: the channel is open and will be held; `raw` is a place for the answer.
        check(unsafe { create(channel.0.as_ptr(), &mut raw, null_mut(), cm::RDMA_PS_TCP) })?;
        let raw = NonNull::new(raw).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { raw, channel })
    }

    /// Takes over the id of a connection request, onto a channel of its own.
    pub(super) fn of_request(raw: NonNull<cm::rdma_cm_id>) -> io::Result<Self> {
        let taken = Channel::new().and_then(|channel| {
            let migrate = found(cm::rdma_migrate_id())?;
            // SAFETY: the id came with an event, which gave it to us; the channel is open.
            check(unsafe { migrate(raw.as_ptr(), channel.0.as_ptr()) })?;
            Ok(channel)
        });
        match taken {
            Ok(channel) => Ok(Self { raw, channel }),
            Err(error) => {
                if let Ok(destroy) = cm::rdma_destroy_id() {
                    // SAFETY: as above, and nobody else has it.
                    unsafe { destroy(raw.as_ptr()) };
                }
                Err(error)
            }
        }
    }

    pub(super) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let address = SockaddrStorage::from(address);
        let bind = found(cm::rdma_bind_addr())?;
        // SAFETY: the id is live, and the address is read during the call.
        check(unsafe { bind(self.raw.as_ptr(), address.as_ptr().cast_mut()) })
    }

    pub(super) fn listen(&self, backlog: i32) -> io::Result<()> {
        let listen = found(cm::rdma_listen())?;
        // SAFETY: the id is live.
        check(unsafe { listen(self.raw.as_ptr(), backlog) })
    }

    pub(super) fn resolve_address(
        &self,
        source: Option<SocketAddr>,
        address: SocketAddr,
        limit: Duration,
    ) -> io::Result<()> {
        let resolve = found(cm::rdma_resolve_addr())?;
        let (source, address) = (source.map(SockaddrStorage::from), SockaddrStorage::from(address));
        let source = source.as_ref().map_or(null_mut(), |source| source.as_ptr().cast_mut());
        // SAFETY: the id is live, and both addresses are read during the call; the source may be null.
        check(unsafe { resolve(self.raw.as_ptr(), source, address.as_ptr().cast_mut(), milliseconds(limit)) })
    }

    pub(super) fn resolve_route(&self, limit: Duration) -> io::Result<()> {
        let resolve = found(cm::rdma_resolve_route())?;
        // SAFETY: the id is live.
        check(unsafe { resolve(self.raw.as_ptr(), milliseconds(limit)) })
    }

    pub(super) fn connect(&self, qp_num: u32, rd_atomic: u8, data: &[u8]) -> io::Result<()> {
        let connect = found(cm::rdma_connect())?;
        let mut param = parameters(qp_num, (rd_atomic, rd_atomic), data);
        // SAFETY: the id is live; the parameters and their data are read during the call.
        check(unsafe { connect(self.raw.as_ptr(), &mut param) })
    }

    pub(super) fn accept(&self, qp_num: u32, rd_atomic: (u8, u8), data: &[u8]) -> io::Result<()> {
        let accept = found(cm::rdma_accept())?;
        let mut param = parameters(qp_num, rd_atomic, data);
        // SAFETY: as in `connect`.
        check(unsafe { accept(self.raw.as_ptr(), &mut param) })
    }

    pub(super) fn establish(&self) -> io::Result<()> {
        let establish = found(cm::rdma_establish())?;
        // SAFETY: the id is live.
        check(unsafe { establish(self.raw.as_ptr()) })
    }

    pub(super) fn reject(&self, data: &[u8]) -> io::Result<()> {
        let reject = found(cm::rdma_reject())?;
        // SAFETY: the id is live, and the data is read during the call; its length was checked.
        check(unsafe { reject(self.raw.as_ptr(), data.as_ptr().cast(), data.len() as u8) })
    }

    pub(super) fn disconnect(&self) -> io::Result<()> {
        let disconnect = found(cm::rdma_disconnect())?;
        // SAFETY: the id is live.
        check(unsafe { disconnect(self.raw.as_ptr()) })
    }

    /// What brings the queue pair to this state.
    pub(super) fn qp_attr(&self, state: u32) -> io::Result<(ffi::ibv_qp_attr, u32)> {
        let init = found(cm::rdma_init_qp_attr())?;
        let (mut attr, mut mask) = (ffi::ibv_qp_attr { qp_state: state, ..Default::default() }, 0);
        // SAFETY: the id is live, and both pointers are places for the answer.
        check(unsafe { init(self.raw.as_ptr(), &mut attr, &mut mask) })?;
        Ok((attr, mask as u32))
    }

    /// Waits for an event, for at most `limit`.
    pub(super) fn next_event(&self, limit: Duration) -> io::Result<Option<Event>> {
        let timeout = PollTimeout::try_from(limit.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.channel.fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(None),
            answer => answer?,
        };
        let (get, ack) = (found(cm::rdma_get_cm_event())?, found(cm::rdma_ack_cm_event())?);
        let mut event = null_mut();
        // SAFETY: the channel is open, and `event` is a place for the answer.
        match check(unsafe { get(self.channel.0.as_ptr(), &mut event) }) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            answer => answer?,
        }
        // SAFETY: the library returned an event, whose data is valid until it is acknowledged, and which
        // is for a reliable connection, since the id is. It is acknowledged once.
        unsafe {
            let cm::rdma_cm_event { id, event: event_kind, status, ref param, .. } = *event;
            let conn = param.conn;
            let private_data = match NonNull::new(conn.private_data.cast_mut()) {
                Some(data) => {
                    slice::from_raw_parts(data.cast::<u8>().as_ptr(), conn.private_data_len.into()).to_vec()
                }
                None => Vec::new(),
            };
            let request = (event_kind == kind::CONNECT_REQUEST).then(|| NonNull::new(id)).flatten();
            ack(event);
            Ok(Some(Event {
                kind: event_kind,
                status,
                private_data,
                responder_resources: conn.responder_resources,
                initiator_depth: conn.initiator_depth,
                request,
            }))
        }
    }

    /// Name of the device that the way goes through; empty before it is known.
    pub(super) fn device_name(&self) -> String {
        // SAFETY: the id is live; its context is null or open, and an open context names its device.
        unsafe {
            let context = (*self.raw.as_ptr()).verbs;
            if context.is_null() {
                return String::new();
            }
            CStr::from_ptr(ffi::ibv_get_device_name((*context).device)).to_string_lossy().into_owned()
        }
    }

    /// Port of that device.
    pub(super) fn port(&self) -> u8 {
        // SAFETY: the id is live.
        unsafe { (*self.raw.as_ptr()).port_num }
    }

    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        // SAFETY: the id is live, and its addresses are plain values.
        socket_address(unsafe { &(*self.raw.as_ptr()).route.addr.src_storage })
    }

    pub(super) fn peer_address(&self) -> Option<SocketAddr> {
        // SAFETY: as above.
        socket_address(unsafe { &(*self.raw.as_ptr()).route.addr.dst_storage })
    }
}

fn parameters(qp_num: u32, (responder, initiator): (u8, u8), data: &[u8]) -> cm::rdma_conn_param {
    cm::rdma_conn_param {
        private_data: data.as_ptr().cast(),
        private_data_len: data.len() as u8,
        responder_resources: responder,
        initiator_depth: initiator,
        flow_control: 0,
        retry_count: 7,
        rnr_retry_count: 7,
        srq: 0,
        qp_num,
    }
}

fn milliseconds(limit: Duration) -> c_int {
    limit.as_millis().clamp(1, c_int::MAX as u128) as c_int
}

fn socket_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: a sockaddr_storage is as long as stated and aligned for any address.
    let storage = unsafe {
        SockaddrStorage::from_raw((&raw const *storage).cast(), Some(size_of_val(storage) as u32))?
    };
    let v4 = storage.as_sockaddr_in().map(|v4| SocketAddr::V4(SocketAddrV4::from(*v4)));
    v4.or_else(|| storage.as_sockaddr_in6().map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6))))
}

/// An established connection: it says when the peer leaves, and tells the peer when it goes itself.
pub(crate) struct Link {
    id: Id,
    left: AtomicBool,
}

impl Link {
    pub(super) fn new(id: Id) -> Self {
        Self { id, left: AtomicBool::new(false) }
    }

    /// Whether the peer has disconnected, or the device is going away.
    pub(crate) fn has_left(&self) -> bool {
        while let Ok(Some(event)) = self.id.next_event(Duration::ZERO) {
            if matches!(event.kind, kind::DISCONNECTED | kind::DEVICE_REMOVAL | kind::TIMEWAIT_EXIT) {
                self.left.store(true, Ordering::Relaxed);
            }
        }
        self.left.load(Ordering::Relaxed)
    }

    /// Tells the peer. It is no error when it has left already.
    pub(crate) fn disconnect(&self) {
        if let Err(error) = self.id.disconnect() {
            tracing::debug!(%error, "disconnected already");
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.disconnect();
    }
}
