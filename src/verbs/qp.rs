//! A reliable connected (RC) queue pair.
//!
//! `unsafe` is here for the C structs that a modification or a request is passed in.

use std::fmt;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};

use ibverbs_sys as ffi;
use rdma_sys_ext::verbs as inline;

use super::{CompletionQueue, Endpoint, Opcode, Operation, ProtectionDomain, Sge, check};
use crate::{Error, Result};

/// What a queue pair is made for. The defaults suit one stream of large messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueuePairOptions {
    /// Port of the device, from 1. Default 1.
    pub port: u8,
    /// Index of the GID to use; `None` (the default) takes [`Context::best_gid`](super::Context::best_gid).
    pub gid_index: Option<u8>,
    /// Work requests that may be under way. Default 128.
    pub send_depth: u32,
    /// Receives that may be posted. Default 128.
    pub recv_depth: u32,
    /// Scatter/gather elements a request. Default 4.
    pub max_sge: u32,
    /// READs and atomics under way at once, at most what the device has. Default 16.
    pub rd_atomic: u8,
    /// Time to wait for an acknowledgement: 4.096 µs times 2 to this power, at most 31. Default 14 (67 ms).
    pub timeout: u8,
    /// Tries after such a time-out, at most 7; soft-RoCE takes 7 as for ever. Default 7.
    pub retry_count: u8,
    /// Tries when the peer has no receive posted, 7 meaning for ever. Default 7.
    pub rnr_retry: u8,
}

impl Default for QueuePairOptions {
    fn default() -> Self {
        Self {
            port: 1,
            gid_index: None,
            send_depth: 128,
            recv_depth: 128,
            max_sge: 4,
            rd_atomic: 16,
            timeout: 14,
            retry_count: 7,
            rnr_retry: 7,
        }
    }
}

/// An RC queue pair: made, [connected](Self::connect) to a peer's, then posted to.
///
/// It keeps its protection domain and completion queues alive. Dropping it discards what is under way.
pub struct QueuePair {
    raw: NonNull<ffi::ibv_qp>,
    max_sge: u32,
    // None for a foreign queue pair, which is its owner's to destroy. Dropped after it was destroyed.
    owned: Option<Owned>,
}

struct Owned {
    options: QueuePairOptions,
    gid_index: u8,
    endpoint: Endpoint,
    domain: ProtectionDomain,
    _queues: [CompletionQueue; 2],
}

// SAFETY: libibverbs queue pairs may be posted to from any thread; providers lock their queues.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let Some(owned) = &self.owned else { return };
        // SAFETY: the queue pair is ours and destroyed here only.
        if let Err(error) = check(unsafe { ffi::ibv_destroy_qp(self.raw.as_ptr()) }) {
            let device = owned.domain.context().device_name();
            tracing::warn!(device, %error, "cannot destroy a queue pair");
        }
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair").field("number", &self.number()).finish_non_exhaustive()
    }
}

impl QueuePair {
    /// Creates a queue pair on a port. Requests complete in `send`, receives in `recv`, which may be
    /// the same queue.
    ///
    /// # Errors
    /// - [`Error::Verbs`]: `EINVAL` for a port or depths that the device does not have, `ENOMEM`.
    /// - [`Error::NoGid`]: the port has no address to be reached by.
    /// - [`Error::ContextMismatch`]: a completion queue of another context.
    #[doc(alias = "ibv_create_qp")]
    pub fn new(
        domain: &ProtectionDomain,
        send: &CompletionQueue,
        recv: &CompletionQueue,
        options: QueuePairOptions,
    ) -> Result<Self> {
        let context = domain.context();
        for queue in [send, recv] {
            // The kernel would look its number up in the wrong context.
            if queue.context().as_raw() != context.as_raw() {
                let device = queue.context().device_name().into();
                return Err(Error::ContextMismatch { object: "completion queue", device });
            }
        }
        let port = context.port(options.port)?;
        let rd_atomic = options.rd_atomic.min(context.limits()?.max_rd_atomic);
        let (gid_index, gid) = match options.gid_index {
            Some(index) => (index, gid(domain, options.port, index)?),
            None => context.best_gid(options.port)?,
        };
        let mut init = ffi::ibv_qp_init_attr {
            send_cq: send.as_raw().as_ptr(),
            recv_cq: recv.as_raw().as_ptr(),
            qp_type: ffi::ibv_qp_type::IBV_QPT_RC,
            cap: ffi::ibv_qp_cap {
                max_send_wr: options.send_depth,
                max_recv_wr: options.recv_depth,
                max_send_sge: options.max_sge,
                max_recv_sge: options.max_sge,
                max_inline_data: 0,
            },
            ..Default::default()
        };
        // SAFETY: domain and queues are live and will be held; the attributes are filled in.
        let raw = unsafe { ffi::ibv_create_qp(domain.as_raw().as_ptr(), &mut init) };
        let Some(raw) = NonNull::new(raw) else {
            let QueuePairOptions { send_depth, recv_depth, max_sge, .. } = options;
            let operation = format!(
                "create a queue pair (send depth {send_depth}, receive depth {recv_depth}, {max_sge} elements)"
            );
            return Err(context.failed(operation)(io::Error::last_os_error()));
        };
        // SAFETY: just created.
        let qp_num = unsafe { (*raw.as_ptr()).qp_num };
        let endpoint = Endpoint { qp_num, psn: next_psn(), lid: port.lid, gid, mtu: port.mtu, rd_atomic };
        let queues = [send.clone(), recv.clone()];
        let owned = Owned { options, gid_index, endpoint, domain: domain.clone(), _queues: queues };
        let pair = Self { raw, max_sge: options.max_sge, owned: Some(owned) };
        pair.initialise(options.port)?;
        Ok(pair)
    }

    /// Wraps a queue pair that another library created and connected. It is never destroyed here, and
    /// [`connect`](Self::connect) is its owner's to do.
    ///
    /// # Errors
    /// [`Error::Verbs`]: it cannot be queried.
    ///
    /// # Safety
    /// `raw` is a live `ibv_qp` and stays so as long as the result lives.
    pub unsafe fn from_raw(raw: NonNull<ffi::ibv_qp>) -> Result<Self> {
        let (mut attr, mut init) = (ffi::ibv_qp_attr::default(), ffi::ibv_qp_init_attr::default());
        let mask = ffi::ibv_qp_attr_mask::IBV_QP_CAP.0 as i32;
        // SAFETY: the queue pair is live, says the caller; the others are places for the answer.
        check(unsafe { ffi::ibv_query_qp(raw.as_ptr(), &mut attr, mask, &mut init) }).map_err(|source| {
            Error::Verbs { device: "foreign queue pair".into(), operation: "query it".into(), source }
        })?;
        Ok(Self { raw, max_sge: init.cap.max_send_sge, owned: None })
    }

    /// The libibverbs object, for use with other libraries. It stays this object's to destroy.
    pub fn as_raw(&self) -> NonNull<ffi::ibv_qp> {
        self.raw
    }

    /// The queue pair's number, as completions name it.
    pub fn number(&self) -> u32 {
        // SAFETY: the queue pair is live as long as `self` is.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    /// What the peer must know to connect; `None` for a foreign queue pair.
    pub fn endpoint(&self) -> Option<Endpoint> {
        self.owned.as_ref().map(|owned| owned.endpoint)
    }

    /// Connects to the peer's queue pair, which must connect to this one too. Receives may be posted
    /// before.
    ///
    /// # Errors
    /// - [`Error::InvalidEndpoint`]: the description cannot be a queue pair's.
    /// - [`Error::ForeignQueuePair`]: this one is its owner's to connect.
    /// - [`Error::Verbs`]: no route to the peer's GID, or connected already (`EINVAL`).
    #[doc(alias = "ibv_modify_qp")]
    pub fn connect(&self, peer: &Endpoint) -> Result<()> {
        use ffi::ibv_qp_attr_mask as Mask;
        peer.check()?;
        let Some(owned) = &self.owned else {
            return Err(Error::ForeignQueuePair { qp_num: self.number() });
        };
        let (ours, options) = (owned.endpoint, owned.options);
        let rd_atomic = ours.rd_atomic.min(peer.rd_atomic);
        let mut attr = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTR,
            // IBV_MTU_256 is 1, each next one twice as large.
            path_mtu: ours.mtu.min(peer.mtu).ilog2() - 7,
            dest_qp_num: peer.qp_num,
            rq_psn: peer.psn,
            max_dest_rd_atomic: rd_atomic,
            min_rnr_timer: 12, // 0.64 ms
            ..Default::default()
        };
        attr.ah_attr.port_num = options.port;
        attr.ah_attr.dlid = peer.lid;
        attr.ah_attr.is_global = 1;
        attr.ah_attr.grh.dgid.raw = peer.gid;
        attr.ah_attr.grh.sgid_index = owned.gid_index;
        attr.ah_attr.grh.hop_limit = 64;
        let mask = Mask::IBV_QP_STATE
            | Mask::IBV_QP_AV
            | Mask::IBV_QP_PATH_MTU
            | Mask::IBV_QP_DEST_QPN
            | Mask::IBV_QP_RQ_PSN
            | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | Mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(attr, mask, "to ready to receive (is there a route to the peer's address?)")?;

        let attr = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_RTS,
            sq_psn: ours.psn,
            timeout: options.timeout,
            retry_cnt: options.retry_count,
            rnr_retry: options.rnr_retry,
            max_rd_atomic: rd_atomic,
            ..Default::default()
        };
        let mask = Mask::IBV_QP_STATE
            | Mask::IBV_QP_SQ_PSN
            | Mask::IBV_QP_TIMEOUT
            | Mask::IBV_QP_RETRY_CNT
            | Mask::IBV_QP_RNR_RETRY
            | Mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(attr, mask, "to ready to send")
    }

    /// Stops the queue pair: what is under way or posted completes with WR_FLUSH_ERR, and so does all that
    /// is posted later. It cannot be started again.
    ///
    /// # Errors
    /// [`Error::Verbs`]: the device failed.
    #[doc(alias = "IBV_QPS_ERR")]
    pub fn stop(&self) -> Result<()> {
        let attr = ffi::ibv_qp_attr { qp_state: ffi::ibv_qp_state::IBV_QPS_ERR, ..Default::default() };
        self.modify(attr, ffi::ibv_qp_attr_mask::IBV_QP_STATE, "to a stop")
    }

    /// Forgets all that is posted, without completions: when this returns, the device is done with it.
    pub(crate) fn reset(&self) -> Result<()> {
        let attr = ffi::ibv_qp_attr { qp_state: ffi::ibv_qp_state::IBV_QPS_RESET, ..Default::default() };
        self.modify(attr, ffi::ibv_qp_attr_mask::IBV_QP_STATE, "to reset")
    }

    /// Queues a request. Its completion bears `wr_id`; a request that is not `signaled` completes
    /// silently, with the next one that is, unless it fails.
    ///
    /// # Errors
    /// - [`Error::TooManySge`], [`Error::InvalidAtomic`]: found before the provider sees it.
    /// - [`Error::Post`]: `ENOMEM` when the queue is full, `EINVAL` when it is not connected.
    #[doc(alias = "ibv_post_send")]
    pub fn post(&self, wr_id: u64, operation: Operation, elements: &[Sge<'_>], signaled: bool) -> Result<()> {
        let mut wr = operation.request(elements)?;
        (wr.sg_list, wr.num_sge) = self.list(elements)?;
        wr.wr_id = wr_id;
        if signaled {
            wr.send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        let mut bad = null_mut();
        // SAFETY: the queue pair is live; the request and the list it points to are read during the
        // call only. What the device may do with memory is bounded by the regions behind the elements.
        check(unsafe { inline::post_send(self.raw.as_ptr(), &mut wr, &mut bad) })
            .map_err(|source| Error::Post { opcode: operation.opcode(), source })
    }

    /// Queues a receive: the next SEND's bytes go to these elements. No elements take a message of no
    /// bytes, or the number of a WRITE with one.
    ///
    /// # Errors
    /// - [`Error::TooManySge`]: found before the provider sees it.
    /// - [`Error::Post`]: `ENOMEM` when the queue is full.
    #[doc(alias = "ibv_post_recv")]
    pub fn post_recv(&self, wr_id: u64, elements: &[Sge<'_>]) -> Result<()> {
        let mut wr = ffi::ibv_recv_wr { wr_id, ..Default::default() };
        (wr.sg_list, wr.num_sge) = self.list(elements)?;
        let mut bad = null_mut();
        // SAFETY: as in `post`.
        check(unsafe { inline::post_recv(self.raw.as_ptr(), &mut wr, &mut bad) })
            .map_err(|source| Error::Post { opcode: Opcode::Recv, source })
    }

    /// The elements as the C list: `Sge` is transparent over `ibv_sge`, and the list is only read.
    fn list(&self, elements: &[Sge<'_>]) -> Result<(*mut ffi::ibv_sge, i32)> {
        if elements.len() > self.max_sge as usize {
            return Err(Error::TooManySge { count: elements.len(), limit: self.max_sge });
        }
        Ok((elements.as_ptr().cast_mut().cast(), elements.len() as i32))
    }

    fn initialise(&self, port: u8) -> Result<()> {
        use ffi::{ibv_access_flags as Access, ibv_qp_attr_mask as Mask};
        // What a peer may do is for each region to say.
        let access = Access::IBV_ACCESS_REMOTE_WRITE
            | Access::IBV_ACCESS_REMOTE_READ
            | Access::IBV_ACCESS_REMOTE_ATOMIC;
        let attr = ffi::ibv_qp_attr {
            qp_state: ffi::ibv_qp_state::IBV_QPS_INIT,
            port_num: port,
            qp_access_flags: access.0,
            ..Default::default()
        };
        let mask =
            Mask::IBV_QP_STATE | Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS;
        self.modify(attr, mask, "to initialised")
    }

    pub(crate) fn modify(
        &self,
        mut attr: ffi::ibv_qp_attr,
        mask: ffi::ibv_qp_attr_mask,
        what: &str,
    ) -> Result<()> {
        // SAFETY: the queue pair is live, and the attributes that the mask names are filled in.
        check(unsafe { ffi::ibv_modify_qp(self.raw.as_ptr(), &mut attr, mask.0 as i32) }).map_err(|source| {
            let device = self.owned.as_ref().map_or("", |owned| owned.domain.context().device_name());
            let operation = format!("bring queue pair {} {what}", self.number());
            Error::Verbs { device: device.into(), operation, source }
        })
    }
}

fn gid(domain: &ProtectionDomain, port: u8, index: u8) -> Result<[u8; 16]> {
    let context = domain.context();
    let mut gid = ffi::ibv_gid::default();
    // SAFETY: the context is open and `gid` is a valid place for the answer.
    check(unsafe { ffi::ibv_query_gid(context.as_raw().as_ptr(), port, index.into(), &mut gid) })
        .map_err(context.failed(format!("read GID {index} of port {port}")))?;
    // SAFETY: `raw` is the view of the union that any 16 bytes are valid for.
    Ok(unsafe { gid.raw })
}

/// A first packet sequence number. Each connection takes another, so that a late packet of an earlier
/// one on the same numbers is not taken for one of this.
fn next_psn() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let seed = std::process::id().wrapping_mul(0x9e37_79b9);
    (seed ^ NEXT.fetch_add(0x1_0001, Ordering::Relaxed)) & 0xff_ffff
}
