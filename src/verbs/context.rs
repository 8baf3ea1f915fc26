//! An open device.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use ibverbs_sys as ffi;
use rdma_sys_ext::verbs as inline;

use super::check;
use crate::{Error, Result};

/// An open device. Clones are the same object, closed with the last of them.
#[derive(Clone)]
pub struct Context {
    inner: Arc<Inner>,
}

struct Inner {
    raw: NonNull<ffi::ibv_context>,
    owned: bool,
    device: Box<str>,
    provider_imports: OnceLock<bool>,
}

// SAFETY: libibverbs contexts may be used from any thread; they lock what they write.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        // SAFETY: the context is ours, and everything made of it held this object and is gone.
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

/// What a device can do at the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Largest memory region in bytes.
    pub max_mr_size: u64,
    /// Page sizes that the device maps, a bit each: bit 12 is 4 KiB.
    pub page_size_cap: u64,
    /// Most scatter/gather elements a work request.
    pub max_sge: u32,
    /// Most work requests a queue.
    pub max_qp_wr: u32,
    /// Most entries a completion queue.
    pub max_cqe: u32,
    /// Most READs and atomics a queue pair answers at once.
    pub max_rd_atomic: u8,
    /// Number of ports.
    pub ports: u8,
}

/// State of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Port {
    /// Whether the port carries traffic.
    pub active: bool,
    /// Path MTU in bytes: 256 to 4096.
    pub mtu: u32,
    /// Largest message in bytes. soft-RoCE says 2 GiB and takes one byte less.
    pub max_message_size: u32,
    /// Local identifier; 0 on RoCE.
    pub lid: u16,
}

impl Context {
    pub(super) fn opened(raw: NonNull<ffi::ibv_context>, device: &str) -> Self {
        crate::observe::watch_forks();
        Self {
            inner: Arc::new(Inner {
                raw,
                owned: true,
                device: device.into(),
                provider_imports: OnceLock::new(),
            }),
        }
    }

    /// Wraps a context that another library opened. It is never closed here.
    ///
    /// # Safety
    /// `raw` is an open `ibv_context` and stays so as long as a clone of the result, or anything made
    /// of one, lives.
    pub unsafe fn from_raw(raw: NonNull<ffi::ibv_context>) -> Self {
        crate::observe::watch_forks();
        // SAFETY: an open context names its device, says the caller.
        let name = unsafe { CStr::from_ptr(ffi::ibv_get_device_name((*raw.as_ptr()).device)) };
        let device = name.to_string_lossy().into();
        Self { inner: Arc::new(Inner { raw, owned: false, device, provider_imports: OnceLock::new() }) }
    }

    /// The libibverbs object, for use with other libraries. It stays this object's to close.
    pub fn as_raw(&self) -> NonNull<ffi::ibv_context> {
        self.inner.raw
    }

    /// Name of the device.
    pub fn device_name(&self) -> &str {
        &self.inner.device
    }

    /// What the device can do at the most.
    ///
    /// # Errors
    /// [`Error::Verbs`].
    #[doc(alias = "ibv_query_device")]
    pub fn limits(&self) -> Result<Limits> {
        let mut attr = ffi::ibv_device_attr::default();
        // SAFETY: the context is open and `attr` is a valid place for the answer.
        check(unsafe { ffi::ibv_query_device(self.inner.raw.as_ptr(), &mut attr) })
            .map_err(self.failed("query the device"))?;
        Ok(Limits {
            max_mr_size: attr.max_mr_size,
            page_size_cap: attr.page_size_cap,
            max_sge: attr.max_sge as u32,
            max_qp_wr: attr.max_qp_wr as u32,
            max_cqe: attr.max_cqe as u32,
            max_rd_atomic: attr.max_qp_rd_atom.clamp(0, u8::MAX.into()) as u8,
            ports: attr.phys_port_cnt,
        })
    }

    /// State of a port; ports count from 1.
    ///
    /// # Errors
    /// [`Error::Verbs`]: `EINVAL` for a port that the device does not have.
    #[doc(alias = "ibv_query_port")]
    pub fn port(&self, number: u8) -> Result<Port> {
        let mut attr = ffi::ibv_port_attr::default();
        // SAFETY: the context is open and `attr` is a valid place for the answer.
        check(unsafe { inline::query_port(self.inner.raw.as_ptr(), number, &mut attr) })
            .map_err(self.failed(format!("query port {number}")))?;
        Ok(Port {
            active: attr.state == ffi::ibv_port_state::IBV_PORT_ACTIVE,
            // IBV_MTU_256 is 1, each next one twice as large.
            mtu: 128 << attr.active_mtu.min(5),
            max_message_size: attr.max_msg_sz,
            lid: attr.lid,
        })
    }

    /// The port's GID for connections, and its index: on RoCE the first version 2 one of an IPv4
    /// address, else of a routable IPv6 address, else any; on InfiniBand the first.
    ///
    /// # Errors
    /// - [`Error::NoGid`]: the port has none (its network interface has no address).
    /// - [`Error::Verbs`].
    #[doc(alias = "ibv_query_gid_table")]
    pub fn best_gid(&self, port: u8) -> Result<(u8, [u8; 16])> {
        let table = self.gid_table().map_err(self.failed("read the GID table"))?;
        // SAFETY: `raw` is the view of the union that any 16 bytes are valid for.
        let gids = table.iter().map(|entry| (entry, unsafe { entry.gid.raw }));
        gids.filter(|(entry, _)| entry.port_num == u32::from(port))
            // A queue pair names its GID in 8 bits.
            .filter_map(|(entry, gid)| Some((u8::try_from(entry.gid_index).ok()?, entry.gid_type, gid)))
            .min_by_key(|(_, gid_type, gid)| gid_rank(*gid_type, gid))
            .map(|(index, _, gid)| (index, gid))
            .ok_or_else(|| Error::NoGid { device: self.device_name().into(), port })
    }

    /// Every GID of every port. The kernel says EINVAL to a table without room for all.
    fn gid_table(&self) -> io::Result<Vec<ffi::ibv_gid_entry>> {
        const MOST: usize = 1 << 16;
        let mut table = vec![ffi::ibv_gid_entry::default(); 64];
        loop {
            // SAFETY: the context is open, and the table has as many entries as stated.
            let count = unsafe {
                inline::query_gid_table(self.inner.raw.as_ptr(), table.as_mut_ptr(), table.len(), 0)
            };
            match usize::try_from(count) {
                Ok(count) => {
                    table.truncate(count);
                    return Ok(table);
                }
                Err(_) if -count == libc::EINVAL as isize && table.len() < MOST => {
                    table.resize(4 * table.len(), ffi::ibv_gid_entry::default());
                }
                Err(_) => return Err(io::Error::from_raw_os_error(-count as i32)),
            }
        }
    }

    /// Whether the provider imports dma-bufs, once `ask` has found out.
    #[inline]
    pub(crate) fn provider_imports(&self, ask: impl FnOnce() -> bool) -> bool {
        *self.inner.provider_imports.get_or_init(ask)
    }

    /// The descriptor that uverbs commands go to.
    #[inline]
    pub(crate) fn cmd_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open, and its cmd_fd with it, as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw((*self.inner.raw.as_ptr()).cmd_fd) }
    }

    /// The error of a call on this device, with its errno.
    pub(super) fn failed(&self, operation: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let (device, operation) = (self.device_name().to_owned(), operation.into());
        move |source| Error::Verbs { device, operation, source }
    }
}

impl AsFd for Context {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.cmd_fd()
    }
}

/// Order in which GIDs are preferred; lower is better.
fn gid_rank(gid_type: u32, gid: &[u8; 16]) -> u8 {
    const ROCE_V2: u32 = 2; // IB_UVERBS_GID_TYPE_ROCE_V2, rdma/ib_user_ioctl_verbs.h
    let mapped_ipv4 = gid[..10] == [0; 10] && gid[10..12] == [0xff; 2];
    let link_local = gid[0] == 0xfe && gid[1] & 0xc0 == 0x80;
    match (gid_type, mapped_ipv4, link_local) {
        (ROCE_V2, true, _) => 0,
        (ROCE_V2, false, false) => 1,
        (ROCE_V2, ..) => 2,
        _ => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roce_v2_gid_of_an_ipv4_address_is_preferred() {
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1];
        let link_local = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let global = [0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let ranks = [(2, mapped), (2, global), (2, link_local), (1, mapped), (0, link_local)]
            .map(|(gid_type, gid)| gid_rank(gid_type, &gid));
        assert_eq!(ranks, [0, 1, 2, 3, 3]);
    }
}
