//! The objects of librdmacm, with one function for each C call.
//!
//! `unsafe` is here for the calls and to read the structs that the library returns.

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
use rdma_sys_ext::symbols::SymbolError;

use crate::observe::Process;
use crate::transfer::Link;
use crate::verbs::Depth;

fn resolved<T>(symbol: Result<T, SymbolError>) -> io::Result<T> {
    Ok(symbol?)
}

fn check(code: c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A non-blocking event channel.
struct Channel {
    raw: NonNull<cm::rdma_event_channel>,
    creator: Process,
}

impl Channel {
    fn new() -> io::Result<Self> {
        // Before the library is loaded: it reports a lack of descriptors as a missing device.
        crate::verbs::absence::descriptors()?;
        let create = resolved(cm::rdma_create_event_channel())?;
        // SAFETY: the function takes no argument.
        let raw = unsafe { create() };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        let channel = Self { raw, creator: Process::current() };
        let flags = OFlag::from_bits_retain(fcntl(channel.fd(), FcntlArg::F_GETFL)?);
        fcntl(channel.fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel stays open while it is borrowed.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if let (true, Ok(destroy)) = (self.creator.is_current(), cm::rdma_destroy_event_channel()) {
            // SAFETY: the channel is ours, and `Id` destroys the id that used it first.
            unsafe { destroy(self.raw.as_ptr()) };
        }
    }
}

/// A connection or a listener, with its own event channel.
pub(super) struct Id {
    raw: NonNull<cm::rdma_cm_id>,
    // Last, so that it is dropped after the id is destroyed.
    channel: Channel,
}

// SAFETY: the objects of librdmacm may be used from any thread.
unsafe impl Send for Id {}
// SAFETY: the library locks what it changes. Fields that are read here without a call are written before the
// id is shared, when it is bound or resolved.
unsafe impl Sync for Id {}

impl Drop for Id {
    fn drop(&mut self) {
        let (true, Ok(destroy)) = (self.is_own(), cm::rdma_destroy_id()) else { return };
        // SAFETY: the id is ours. Every event was acknowledged when it was received, so this does not block.
        if let Err(error) = check(unsafe { destroy(self.raw.as_ptr()) }) {
            tracing::warn!(%error, "cannot destroy a connection manager id");
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
    /// The new id of a connection request. The receiver must take it over with [`Id::of_request`].
    pub request: Option<NonNull<cm::rdma_cm_id>>,
}

// SAFETY: an id may be used from any thread, and that of a request has no other owner.
unsafe impl Send for Event {}
// SAFETY: nothing uses the id through a shared reference: taking it over needs `&mut`.
unsafe impl Sync for Event {}

impl Id {
    pub(super) fn new() -> io::Result<Self> {
        let channel = Channel::new()?;
        let create = resolved(cm::rdma_create_id())?;
        let mut raw = null_mut();
        // SAFETY: the channel is open, and the new id holds it; `raw` is a local variable.
        check(unsafe { create(channel.raw.as_ptr(), &mut raw, null_mut(), cm::RDMA_PS_TCP) })?;
        let raw = NonNull::new(raw).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { raw, channel })
    }

    /// Takes over the id of a connection request, and moves it to its own channel.
    pub(super) fn of_request(raw: NonNull<cm::rdma_cm_id>) -> io::Result<Self> {
        let migrated = Channel::new().and_then(|channel| {
            let migrate = resolved(cm::rdma_migrate_id())?;
            // SAFETY: the event passed its id to us, and the channel is open.
            check(unsafe { migrate(raw.as_ptr(), channel.raw.as_ptr()) })?;
            Ok(channel)
        });
        match migrated {
            Ok(channel) => Ok(Self { raw, channel }),
            Err(error) => {
                if let Ok(destroy) = cm::rdma_destroy_id() {
                    // SAFETY: the id is ours, as above.
                    unsafe { destroy(raw.as_ptr()) };
                }
                Err(error)
            }
        }
    }

    /// Whether this is the process that created the id, and no child of it. The kernel's connection or listener
    /// belongs to that process.
    pub(super) fn is_own(&self) -> bool {
        self.channel.creator.is_current()
    }

    pub(super) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let address = SockaddrStorage::from(address);
        let bind = resolved(cm::rdma_bind_addr())?;
        // SAFETY: the id is live. The call reads the address and does not keep it.
        check(unsafe { bind(self.raw.as_ptr(), address.as_ptr().cast_mut()) })
    }

    pub(super) fn listen(&self, backlog: i32) -> io::Result<()> {
        let listen = resolved(cm::rdma_listen())?;
        // SAFETY: the id is live.
        check(unsafe { listen(self.raw.as_ptr(), backlog) })
    }

    pub(super) fn resolve_address(
        &self,
        source: Option<SocketAddr>,
        address: SocketAddr,
        timeout: Duration,
    ) -> io::Result<()> {
        let resolve = resolved(cm::rdma_resolve_addr())?;
        let (source, address) = (source.map(SockaddrStorage::from), SockaddrStorage::from(address));
        let source = source.as_ref().map_or(null_mut(), |source| source.as_ptr().cast_mut());
        // SAFETY: the id is live. The call reads both addresses and keeps neither; the source may be null.
        check(unsafe {
            resolve(self.raw.as_ptr(), source, address.as_ptr().cast_mut(), milliseconds(timeout))
        })
    }

    /// Sets the type of service of the routes that are resolved from now on.
    pub(super) fn set_traffic_class(&self, mut class: u8) -> io::Result<()> {
        let set = resolved(cm::rdma_set_option())?;
        let value = (&raw mut class).cast();
        // SAFETY: the id is live. The call reads one byte and does not keep it.
        check(unsafe { set(self.raw.as_ptr(), cm::RDMA_OPTION_ID, cm::RDMA_OPTION_ID_TOS, value, 1) })
    }

    pub(super) fn resolve_route(&self, timeout: Duration) -> io::Result<()> {
        let resolve = resolved(cm::rdma_resolve_route())?;
        // SAFETY: the id is live.
        check(unsafe { resolve(self.raw.as_ptr(), milliseconds(timeout)) })
    }

    pub(super) fn connect(&self, qp_num: u32, depth: Depth, data: &[u8]) -> io::Result<()> {
        let connect = resolved(cm::rdma_connect())?;
        let mut param = parameters(qp_num, depth, data);
        // SAFETY: the id is live. The call reads the parameters and their data and keeps neither.
        check(unsafe { connect(self.raw.as_ptr(), &mut param) })
    }

    pub(super) fn accept(&self, qp_num: u32, depth: Depth, data: &[u8]) -> io::Result<()> {
        let accept = resolved(cm::rdma_accept())?;
        let mut param = parameters(qp_num, depth, data);
        // SAFETY: as in `connect`.
        check(unsafe { accept(self.raw.as_ptr(), &mut param) })
    }

    pub(super) fn establish(&self) -> io::Result<()> {
        let establish = resolved(cm::rdma_establish())?;
        // SAFETY: the id is live.
        check(unsafe { establish(self.raw.as_ptr()) })
    }

    pub(super) fn reject(&self, data: &[u8]) -> io::Result<()> {
        let reject = resolved(cm::rdma_reject())?;
        // SAFETY: the id is live. The call reads the data, whose length was checked, and does not keep it.
        check(unsafe { reject(self.raw.as_ptr(), data.as_ptr().cast(), data.len() as u8) })
    }

    pub(super) fn disconnect(&self) -> io::Result<()> {
        let disconnect = resolved(cm::rdma_disconnect())?;
        // SAFETY: the id is live.
        check(unsafe { disconnect(self.raw.as_ptr()) })
    }

    /// The attributes and mask that bring the queue pair to this state.
    pub(super) fn qp_attr(&self, state: u32) -> io::Result<(ffi::ibv_qp_attr, u32)> {
        let init = resolved(cm::rdma_init_qp_attr())?;
        let (mut attr, mut mask) = (ffi::ibv_qp_attr { qp_state: state, ..Default::default() }, 0);
        // SAFETY: the id is live, and both pointers are local variables.
        check(unsafe { init(self.raw.as_ptr(), &mut attr, &mut mask) })?;
        Ok((attr, mask as u32))
    }

    /// Readable when there may be an event.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    /// Sleeps until there may be an event, for at most `timeout`. A signal counts as one.
    pub(super) fn readable(&self, timeout: Duration) -> io::Result<()> {
        let timeout =
            PollTimeout::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.fd(), PollFlags::POLLIN)], timeout) {
            Err(nix::errno::Errno::EINTR) => Ok(()),
            answer => Ok(answer.map(drop)?),
        }
    }

    /// The next event, if there is one.
    pub(super) fn next_event(&self) -> io::Result<Option<Event>> {
        let (get, ack) = (resolved(cm::rdma_get_cm_event())?, resolved(cm::rdma_ack_cm_event())?);
        let mut event = null_mut();
        // SAFETY: the channel is open, and `event` is a local variable.
        match check(unsafe { get(self.channel.raw.as_ptr(), &mut event) }) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            answer => answer?,
        }
        // SAFETY: the library returned an event. Its data is valid until the one acknowledgement below, and
        // its parameters are those of a reliable connection, because the id has RDMA_PS_TCP.
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

    /// The device of the route; empty before it is known.
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

    /// The port of that device.
    pub(super) fn port(&self) -> u8 {
        // SAFETY: the id is live.
        unsafe { (*self.raw.as_ptr()).port_num }
    }

    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        // SAFETY: the id is live, and its addresses are plain data.
        socket_address(unsafe { &(*self.raw.as_ptr()).route.addr.src_storage })
    }

    pub(super) fn peer_address(&self) -> Option<SocketAddr> {
        // SAFETY: as above.
        socket_address(unsafe { &(*self.raw.as_ptr()).route.addr.dst_storage })
    }
}

fn parameters(qp_num: u32, depth: Depth, data: &[u8]) -> cm::rdma_conn_param {
    cm::rdma_conn_param {
        private_data: data.as_ptr().cast(),
        private_data_len: data.len() as u8,
        responder_resources: depth.responder,
        initiator_depth: depth.initiator,
        flow_control: 0,
        retry_count: 7,
        rnr_retry_count: 7,
        srq: 0,
        qp_num,
    }
}

fn milliseconds(timeout: Duration) -> c_int {
    timeout.as_millis().clamp(1, c_int::MAX as u128) as c_int
}

fn socket_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: a sockaddr_storage has the stated length and the alignment of any address.
    let storage = unsafe {
        SockaddrStorage::from_raw((&raw const *storage).cast(), Some(size_of_val(storage) as u32))?
    };
    let v4 = storage.as_sockaddr_in().map(|v4| SocketAddr::V4(SocketAddrV4::from(*v4)));
    v4.or_else(|| storage.as_sockaddr_in6().map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6))))
}

/// An established connection: it detects that the peer disconnects, and disconnects when it is dropped.
pub(super) struct CmLink {
    id: Id,
    disconnected: AtomicBool,
    removed: AtomicBool,
}

impl CmLink {
    pub(super) fn new(id: Id) -> Self {
        Self { id, disconnected: AtomicBool::new(false), removed: AtomicBool::new(false) }
    }
}

impl Link for CmLink {
    /// Whether the peer has disconnected, or the device is being removed.
    fn peer_disconnected(&self) -> bool {
        loop {
            match self.id.next_event() {
                Ok(None) => break,
                Ok(Some(event)) => {
                    if event.kind == kind::DEVICE_REMOVAL {
                        self.removed.store(true, Ordering::Relaxed);
                    }
                    if matches!(event.kind, kind::DISCONNECTED | kind::DEVICE_REMOVAL | kind::TIMEWAIT_EXIT) {
                        self.disconnected.store(true, Ordering::Relaxed);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot read the connection manager's events");
                    self.disconnected.store(true, Ordering::Relaxed);
                    break;
                }
            }
        }
        self.disconnected.load(Ordering::Relaxed)
    }

    fn device_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.id.fd()
    }

    /// Disconnects. An error only means that the peer disconnected first.
    fn disconnect(&self) {
        if !self.id.is_own() {
            return;
        }
        if let Err(error) = self.id.disconnect() {
            tracing::debug!(%error, "disconnected already");
        }
    }
}

impl Drop for CmLink {
    fn drop(&mut self) {
        self.disconnect();
    }
}
