//! An open device.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use ibverbs_sys as ffi;
use nix::net::if_::if_indextoname;
use rdma_sys_ext::verbs as inline;

use super::QueuePairOptions;
use super::check;
use super::error::{Error, Result};
use super::events::Dispatcher;
use super::fabric::port_rate;
use super::gid::{self, GidEntry, Interface};
use crate::observe::Process;

/// Completes "cannot …".
const READ_GIDS: &str = "read the GID table";

/// An open device. Clones share one `ibv_context`; dropping the last one closes it.
#[derive(Clone)]
#[doc(alias = "ibv_context")]
pub struct Context {
    inner: Arc<Inner>,
}

struct Inner {
    raw: NonNull<ffi::ibv_context>,
    /// The process that opened it; `None` for a context of another library.
    creator: Option<Process>,
    device: Box<str>,
    provider_imports: OnceLock<bool>,
    dispatcher: Dispatcher,
}

// SAFETY: libibverbs contexts may be used from any thread; they lock what they write.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.creator.is_some_and(Process::is_current) {
            return;
        }
        // SAFETY: the context is ours. Every object in it held this one, so all of them are gone.
        if let Err(error) = check(unsafe { ffi::ibv_close_device(self.raw.as_ptr()) }) {
            tracing::warn!(device = %self.device, %error, "cannot close the device");
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.inner.device).finish()
    }
}

/// Limits of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[doc(alias = "ibv_device_attr")]
pub struct Limits {
    /// Largest memory region in bytes.
    pub max_mr_size: u64,
    /// Page sizes that the device maps, as a bit mask: bit 12 stands for 4 KiB.
    pub page_size_cap: u64,
    /// Maximum number of scatter/gather elements in a work request.
    pub max_sge: u32,
    /// Maximum number of work requests in a queue.
    pub max_qp_wr: u32,
    /// Maximum number of entries in a completion queue.
    pub max_cqe: u32,
    /// Maximum number of scatter/gather elements in a READ, at most `max_sge`.
    pub max_sge_read: u32,
    /// Maximum number of READs and atomics that a queue pair serves at once, as the target.
    pub max_rd_atomic: u8,
    /// Maximum number of READs and atomics that a queue pair keeps in flight (`max_qp_init_rd_atom`).
    pub max_init_rd_atomic: u8,
    /// Whether the device executes atomics on its memory for a peer (`atomic_cap` is not `IBV_ATOMIC_NONE`).
    pub atomics: bool,
    /// Number of ports.
    pub ports: u8,
}

impl Limits {
    pub(super) fn of(attr: &ffi::ibv_device_attr) -> Self {
        let depth = |limit: i32| limit.clamp(0, u8::MAX.into()) as u8;
        let max_sge = attr.max_sge as u32;
        Self {
            max_mr_size: attr.max_mr_size,
            page_size_cap: attr.page_size_cap,
            max_sge,
            // Some drivers leave it 0.
            max_sge_read: if attr.max_sge_rd > 0 { max_sge.min(attr.max_sge_rd as u32) } else { max_sge },
            max_qp_wr: attr.max_qp_wr as u32,
            max_cqe: attr.max_cqe as u32,
            max_rd_atomic: depth(attr.max_qp_rd_atom),
            max_init_rd_atomic: depth(attr.max_qp_init_rd_atom),
            atomics: attr.atomic_cap != ffi::IBV_ATOMIC_NONE,
            ports: attr.phys_port_cnt,
        }
    }
}

/// State of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[doc(alias = "ibv_port_attr")]
pub struct Port {
    /// Whether the port carries traffic (`IBV_PORT_ACTIVE`).
    pub active: bool,
    /// Path MTU in bytes: 256 to 4096.
    pub mtu: u32,
    /// Largest message in bytes. soft-RoCE reports 2 GiB and takes one byte less.
    pub max_message_size: u32,
    /// Local identifier; 0 on RoCE.
    pub lid: u16,
    /// Rate in Mbit/s, of all lanes together; 0 if the device reports a width or speed that is not known.
    pub rate: u32,
}

impl Context {
    pub(super) fn opened(raw: NonNull<ffi::ibv_context>, device: &str) -> Self {
        Self::wrap(raw, Some(Process::current()), device.into())
    }

    fn wrap(raw: NonNull<ffi::ibv_context>, creator: Option<Process>, device: Box<str>) -> Self {
        Self {
            inner: Arc::new(Inner {
                raw,
                creator,
                device,
                provider_imports: OnceLock::new(),
                dispatcher: Dispatcher::default(),
            }),
        }
    }

    /// Wraps a context that another library opened. It is never closed here. Its owner reads its asynchronous
    /// events, so [`events`](Self::events) refuses, and connections on it notice a failed device or queue pair only
    /// by their completions and timeouts.
    ///
    /// # Safety
    /// `raw` points to an open `ibv_context` that stays open while a clone of the result, or any object created
    /// from one, lives. Its provider [locks](super#providers-without-locks), or one thread at a time uses them.
    pub unsafe fn from_raw(raw: NonNull<ffi::ibv_context>) -> Self {
        // SAFETY: the caller guarantees an open context, which points to its device.
        let name = unsafe { CStr::from_ptr(ffi::ibv_get_device_name((*raw.as_ptr()).device)) };
        Self::wrap(raw, None, name.to_string_lossy().into())
    }

    /// The libibverbs object, for calls that this crate lacks. Do not close it.
    pub fn as_raw(&self) -> NonNull<ffi::ibv_context> {
        self.inner.raw
    }

    /// The kernel's name of the device.
    pub fn device_name(&self) -> &str {
        &self.inner.device
    }

    /// Queries the limits of the device.
    ///
    /// # Errors
    /// [`Error::Device`], with the errno of the provider.
    #[doc(alias = "ibv_query_device")]
    pub fn limits(&self) -> Result<Limits> {
        let mut attr = ffi::ibv_device_attr::default();
        // SAFETY: the context is open, and `attr` is a local variable for the answer.
        check(unsafe { ffi::ibv_query_device(self.inner.raw.as_ptr(), &mut attr) })
            .map_err(self.failed("query the device"))?;
        Ok(Limits::of(&attr))
    }

    /// Queries the state of port `number`, from 1.
    ///
    /// # Errors
    /// [`Error::Device`]: `EINVAL` if the device has no such port.
    #[doc(alias = "ibv_query_port")]
    pub fn port(&self, number: u8) -> Result<Port> {
        let attr = self.port_attr(number)?;
        // The older field has 8 bits, and 0 for later speeds.
        let speed = if attr.active_speed_ex > 0 { attr.active_speed_ex } else { attr.active_speed.into() };
        Ok(Port {
            active: attr.state == ffi::ibv_port_state::IBV_PORT_ACTIVE,
            // IBV_MTU_256 is 1, IBV_MTU_512 is 2, and so on.
            mtu: 128 << attr.active_mtu.min(5),
            max_message_size: attr.max_msg_sz,
            lid: attr.lid,
            rate: port_rate(attr.active_width, speed),
        })
    }

    /// Number of entries of the P_Key table.
    pub(super) fn pkey_count(&self, number: u8) -> Result<u16> {
        Ok(self.port_attr(number)?.pkey_tbl_len)
    }

    fn port_attr(&self, number: u8) -> Result<ffi::ibv_port_attr> {
        let mut attr = ffi::ibv_port_attr::default();
        // SAFETY: the context is open, and `attr` is a local variable for the answer.
        check(unsafe { inline::query_port(self.inner.raw.as_ptr(), number, &mut attr) })
            .map_err(self.failed(format!("query port {number}")))?;
        Ok(attr)
    }

    /// Reads the GID table of port `number`, from 1, without its empty entries. Choose an entry for
    /// [`QueuePairOptions::gid_index`](super::QueuePairOptions::gid_index).
    ///
    /// # Errors
    /// [`Error::Device`]: the GID table cannot be read; `EMFILE` if no descriptor is free.
    #[doc(alias = "ibv_query_gid_table")]
    pub fn gids(&self, number: u8) -> Result<Vec<GidEntry>> {
        let (entries, _) = self.gids_and_interfaces(number).map_err(self.failed(READ_GIDS))?;
        Ok(entries)
    }

    /// The best GID of port `number` for a peer of which nothing is known: on RoCE one whose interface is up, of
    /// version 2, with a routable address, of IPv4, in this order of importance; on InfiniBand the first. On RoCE
    /// it is one of this process's network namespace: packets of another namespace's GID do not leave.
    ///
    /// # Errors
    /// - [`Error::NoGid`]: the port has no GID, because its network interface has no address, or is in another
    ///   network namespace.
    /// - [`Error::Device`]: as [`gids`](Self::gids).
    pub fn best_gid(&self, number: u8) -> Result<GidEntry> {
        let (entries, interfaces) = self.gids_and_interfaces(number).map_err(self.failed(READ_GIDS))?;
        let here = gid::in_namespace(entries.clone(), &interfaces);
        let none = || match entries.first() {
            Some(elsewhere) => self.no_gid(number, format!("it has {elsewhere}: {}", gid::MOVE)),
            None => self.no_gid(number, "give its network interface an address and bring it up".into()),
        };
        gid::best(&here).cloned().ok_or_else(none)
    }

    /// The best GID of port `number`, from 1, for a peer at `address`, which may also be an address of this port
    /// itself. It is of the address's family, and of RoCE version 2 if there is one: the GID of the address from
    /// which this host's routes send to `address`; else one on the same subnet; else as
    /// [`best_gid`](Self::best_gid). It is one of this process's network namespace.
    ///
    /// # Errors
    /// - [`Error::NoGid`]: the port has no GID of this family in this namespace; on InfiniBand and iWARP GIDs contain
    ///   no IP address.
    /// - [`Error::Device`]: as [`gids`](Self::gids).
    pub fn gid_for(&self, number: u8, address: IpAddr) -> Result<GidEntry> {
        let address = address.to_canonical();
        let read = || {
            let (entries, interfaces) = self.gids_and_interfaces(number)?;
            Ok((entries, interfaces, gid::source_towards(address)?))
        };
        let (entries, interfaces, source) = read().map_err(self.failed(READ_GIDS))?;
        let none = || {
            let has: Vec<_> = entries.iter().map(ToString::to_string).collect();
            let has = if has.is_empty() { "none".into() } else { has.join("; ") };
            self.no_gid(number, format!("none reaches {address}; it has {has}"))
        };
        let here = gid::in_namespace(entries.clone(), &interfaces);
        gid::towards(&here, &interfaces, address, source).cloned().ok_or_else(none)
    }

    /// The GID that the options choose by index, by address or not at all. One of another network namespace is
    /// refused.
    pub(super) fn chosen_gid(&self, options: &QueuePairOptions) -> Result<GidEntry> {
        let QueuePairOptions { port, gid_index, gid_address, .. } = *options;
        if gid_index.is_none() && gid_address.is_none() {
            return self.best_gid(port);
        }
        let (entries, interfaces) = self.gids_and_interfaces(port).map_err(self.failed(READ_GIDS))?;
        let address = gid_address.map(|address| address.to_canonical());
        let is_chosen = |entry: &&GidEntry| {
            gid_index.is_none_or(|index| entry.index == index)
                && address.is_none_or(|address| entry.canonical() == address)
        };
        let best = entries.iter().filter(is_chosen).min_by_key(|entry| gid::rank(entry));
        let Some(entry) = best else {
            let index = gid_index.map(|index| format!("at index {index}"));
            let address = address.map(|address| format!("with the address {address}"));
            let which: Vec<_> = index.into_iter().chain(address).collect();
            let which = which.join(" ");
            return Err(self.no_gid(port, format!("it has none {which} (Context::gids lists them)")));
        };
        match gid::in_namespace(vec![entry.clone()], &interfaces).pop() {
            Some(entry) => Ok(entry),
            None => Err(self.no_gid(port, format!("it has {entry}: {}", gid::MOVE))),
        }
    }

    fn no_gid(&self, port: u8, reason: String) -> Error {
        Error::NoGid { device: self.device_name().into(), port, reason }
    }

    /// The GIDs of a port, and the network interfaces of this namespace.
    fn gids_and_interfaces(&self, port: u8) -> io::Result<(Vec<GidEntry>, Vec<Interface>)> {
        let interfaces = gid::interfaces()?;
        let of_port = |entry: &ffi::ibv_gid_entry| {
            // A queue pair holds the index of its GID in 8 bits.
            let index = u8::try_from(entry.gid_index).ok().filter(|_| entry.port_num == u32::from(port))?;
            // SAFETY: any 16 bytes are a valid value of the union's field `raw`.
            let gid = unsafe { entry.gid.raw };
            // IB_UVERBS_GID_TYPE_IB, _ROCE_V1 and _ROCE_V2 are 0 to 2 (rdma/ib_user_ioctl_verbs.h).
            let roce_version = u8::try_from(entry.gid_type).unwrap_or(u8::MAX);
            let mut found = GidEntry { index, gid, roce_version, netdev: None, up: false };
            if let Ok(name) = if_indextoname(entry.ndev_ifindex) {
                gid::set_netdev(&mut found, &name.to_string_lossy(), &interfaces);
            }
            Some(found)
        };
        let entries = self.gid_table()?.iter().filter_map(of_port).collect();
        Ok((entries, interfaces))
    }

    /// Reads all GIDs of all ports. The kernel returns EINVAL if the table is too small for all of them.
    fn gid_table(&self) -> io::Result<Vec<ffi::ibv_gid_entry>> {
        const MAX_ENTRIES: usize = 1 << 16;
        let mut table = vec![ffi::ibv_gid_entry::default(); 64];
        loop {
            // SAFETY: the context is open, and the table has `table.len()` entries.
            let count = unsafe {
                inline::query_gid_table(self.inner.raw.as_ptr(), table.as_mut_ptr(), table.len(), 0)
            };
            match usize::try_from(count) {
                Ok(count) => {
                    table.truncate(count);
                    return Ok(table);
                }
                Err(_) if -count == libc::EINVAL as isize && table.len() < MAX_ENTRIES => {
                    table.resize(4 * table.len(), ffi::ibv_gid_entry::default());
                }
                Err(_) => return Err(io::Error::from_raw_os_error(-count as i32)),
            }
        }
    }

    /// Whether the device is on iWARP: no GIDs, connections by IP address only.
    pub(crate) fn is_iwarp(&self) -> bool {
        // SAFETY: an open context points to its device.
        let transport = unsafe { (*(*self.inner.raw.as_ptr()).device).transport_type };
        transport == ffi::IBV_TRANSPORT_IWARP
    }

    /// Whether the provider imports dma-bufs. The first call runs `probe` and keeps its result.
    pub(crate) fn provider_imports(&self, probe: impl FnOnce() -> bool) -> bool {
        *self.inner.provider_imports.get_or_init(probe)
    }

    /// The reader of this context's asynchronous events; `None` for a foreign context, whose owner reads them.
    pub(super) fn dispatcher(&self) -> Option<&Dispatcher> {
        self.inner.creator.map(|_| &self.inner.dispatcher)
    }

    /// Reads the asynchronous events that are there for all who listen. Does nothing for a foreign context, and in
    /// a child of `fork`, which would take its parent's events.
    pub(crate) fn dispatch_events(&self) {
        if self.is_own() {
            // SAFETY: the context is open and ours. `events` says that nobody else may read its events.
            unsafe { self.inner.dispatcher.dispatch(self.inner.raw.as_ptr()) };
        }
    }

    /// Whether this process opened it.
    pub(crate) fn is_own(&self) -> bool {
        self.inner.creator.is_some_and(Process::is_current)
    }

    /// Whether this library reads the asynchronous events.
    pub(crate) fn reads_events(&self) -> bool {
        self.inner.creator.is_some()
    }

    /// The descriptor of the asynchronous events.
    pub(crate) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context and its async_fd stay open while `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw((*self.inner.raw.as_ptr()).async_fd) }
    }

    /// The descriptor for uverbs commands.
    pub(crate) fn cmd_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context and its cmd_fd stay open while `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw((*self.inner.raw.as_ptr()).cmd_fd) }
    }

    /// Builds the error of a call on this device from its errno.
    pub(crate) fn failed(&self, operation: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let (device, operation) = (self.device_name().to_owned(), operation.into());
        move |source| Error::Device { device, operation, source }
    }
}

impl AsFd for Context {
    /// The descriptor for uverbs commands (`ibv_context::cmd_fd`).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.cmd_fd()
    }
}
