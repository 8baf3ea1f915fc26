//! A reliable connected (RC) queue pair.
//!
//! `unsafe` is here to pass C structs to libibverbs.

use std::fmt;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use ibverbs_sys as ffi;

use super::error::{Error, Result};
use super::transition::{self, Depth};
use super::{
    CompletionQueue, Context, DomainId, Endpoint, Fabric, ProtectionDomain, QueuePairOptions,
    SharedReceiveQueue, check, gid,
};
use crate::observe::Process;

/// A reliable connected (RC) queue pair: create it, [`connect`](Self::connect) it to the peer's, then
/// [`post`](Self::post) work requests.
///
/// It holds its protection domain and completion queues. Dropping it discards work requests in flight without
/// completions, except in a child of `fork`, where it does nothing.
#[doc(alias = "ibv_qp")]
pub struct QueuePair {
    raw: NonNull<ffi::ibv_qp>,
    /// `None` if the queue pair has no domain, as some kinds of other libraries.
    pub(super) domain: Option<DomainId>,
    pub(super) max_sge: u32,
    pub(super) max_sge_read: u32,
    /// Most bytes of an inline work request.
    pub(super) max_inline: u32,
    remote_access: u32,
    /// Most READs and atomics in flight. Before it is connected, what the device can do.
    pub(super) initiator_depth: AtomicU8,
    creator: Process,
    /// `None` for a foreign queue pair, which its owner destroys.
    owned: Option<Owned>,
    pub(super) context: Context,
}

struct Owned {
    options: QueuePairOptions,
    gid_index: u8,
    endpoint: Endpoint,
    depth: Depth,
    fabric: Fabric,
    srq: Option<SharedReceiveQueue>,
    _domain: ProtectionDomain,
    _queues: [CompletionQueue; 2],
}

// SAFETY: libibverbs queue pairs may be posted to from any thread: the provider locks its queues, or the caller of
// `from_raw` ensured one thread at a time.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl Drop for QueuePair {
    fn drop(&mut self) {
        if self.owned.is_none() || !self.is_own() {
            return;
        }
        // SAFETY: the queue pair is ours and is destroyed only here. Its domain and queues are still held.
        if let Err(error) = check(unsafe { ffi::ibv_destroy_qp(self.raw.as_ptr()) }) {
            let device = self.context.device_name();
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
    /// Creates a queue pair on a port and brings it to INIT, so that receives can be posted. Work requests
    /// complete in `send` and receives in `recv`, which may be the same queue.
    ///
    /// # Errors
    /// - [`Error::InvalidOption`]: an option is beyond its range; the port has no such P_Key, or no such rate.
    /// - [`Error::Device`]: `EINVAL` for a port, a depth or `max_inline` beyond the device's limits; `ENOMEM`.
    /// - [`Error::Unavailable`] (`EOPNOTSUPP`): the device has no reliable connected queue pairs, such as efa.
    /// - [`Error::NoGid`]: the port has no GID, or none at [`QueuePairOptions::gid_index`] or with
    ///   [`QueuePairOptions::gid_address`], or it belongs to another network namespace.
    /// - [`Error::ContextMismatch`]: a completion queue belongs to another context than `domain`.
    #[doc(alias = "ibv_create_qp")]
    pub fn new(
        domain: &ProtectionDomain,
        send: &CompletionQueue,
        recv: &CompletionQueue,
        options: QueuePairOptions,
    ) -> Result<Self> {
        Self::with_srq(domain, [send, recv], None, options)
    }

    /// Like [`new`](Self::new); it takes its receives from a shared queue of the same domain, if there is one.
    pub(crate) fn with_srq(
        domain: &ProtectionDomain,
        [send, recv]: [&CompletionQueue; 2],
        srq: Option<&SharedReceiveQueue>,
        options: QueuePairOptions,
    ) -> Result<Self> {
        let context = domain.context();
        for queue in [send, recv] {
            // The kernel would look up the queue's handle in the wrong context.
            if queue.context().as_raw() != context.as_raw() {
                let (object, user) = ("completion queue", "protection domain");
                let device = context.device_name().into();
                return Err(Error::ContextMismatch { object, user, parent: "context", device });
            }
        }
        let port = context.port(options.port)?;
        let fabric = Fabric::check(context, &port, &options)?;
        let limits = context.limits()?;
        let depth = Depth::new(options.rd_atomic, &limits);
        let (gid_index, gid, roce_version) = match context.is_iwarp() {
            // Its GIDs name no address, and no endpoint connects it.
            true => (0, [0; 16], 0),
            false => context.chosen_gid(&options)?.parts(),
        };
        let mut init = ffi::ibv_qp_init_attr {
            send_cq: send.as_raw().as_ptr(),
            recv_cq: recv.as_raw().as_ptr(),
            srq: srq.map_or(null_mut(), |srq| srq.as_raw().as_ptr()),
            qp_type: ffi::ibv_qp_type::IBV_QPT_RC,
            cap: ffi::ibv_qp_cap {
                max_send_wr: options.send_depth,
                max_recv_wr: options.recv_depth,
                max_send_sge: options.max_sge,
                max_recv_sge: options.max_sge,
                max_inline_data: options.max_inline,
            },
            ..Default::default()
        };
        // SAFETY: the domain and all queues are live, and the new queue pair holds them.
        let raw = unsafe { ffi::ibv_create_qp(domain.as_raw().as_ptr(), &mut init) };
        let Some(raw) = NonNull::new(raw) else {
            return Err(not_created(context, &options, io::Error::last_os_error()));
        };
        // SAFETY: the queue pair was just created.
        let qp_num = unsafe { (*raw.as_ptr()).qp_num };
        let (psn, lid, mtu) = (next_psn(), port.lid, port.mtu);
        let rd_atomic = depth.responder;
        let endpoint = Endpoint { qp_num, psn, lid, gid, mtu, rd_atomic, roce_version, message_qp_num: 0 };
        let queues = [send.clone(), recv.clone()];
        let (srq, _domain) = (srq.cloned(), domain.clone());
        let owned = Owned { options, gid_index, endpoint, depth, fabric, srq, _domain, _queues: queues };
        let pair = Self {
            raw,
            domain: Some(domain.id()),
            max_sge: options.max_sge,
            max_sge_read: options.max_sge.min(limits.max_sge_read),
            // What the device permits, which may be more.
            max_inline: init.cap.max_inline_data,
            remote_access: transition::remote_access(&limits),
            initiator_depth: depth.initiator.into(),
            creator: Process::current(),
            owned: Some(owned),
            context: context.clone(),
        };
        let (attr, mask) = transition::init(options.port, pair.remote_access, fabric.pkey_index.unwrap_or(0));
        pair.modify(attr, mask, "to INIT")?;
        Ok(pair)
    }

    /// Wraps a queue pair that another library created and connected. It is never destroyed here, and
    /// [`connect`](Self::connect) refuses it.
    ///
    /// # Errors
    /// - [`Error::Unavailable`]: it is of another type than RC.
    /// - [`Error::Device`]: the queue pair cannot be queried.
    ///
    /// # Safety
    /// `raw` points to a live `ibv_qp` of an open context. Both stay so while the result lives. Its
    /// provider [locks](super#providers-without-locks), or one thread at a time uses it.
    pub unsafe fn from_raw(raw: NonNull<ffi::ibv_qp>) -> Result<Self> {
        // SAFETY: the caller guarantees a live queue pair, which points to its open context and its live domain.
        let (context, domain, qp_type) = unsafe {
            let ffi::ibv_qp { context, pd, qp_type, .. } = *raw.as_ptr();
            let context = Context::from_raw(NonNull::new(context).expect("an ibv_qp has a context"));
            (context, NonNull::new(pd).map(|pd| DomainId::of(pd)), qp_type)
        };
        // Of a datagram, a provider follows the pointer to its address handle, which no request here has.
        if qp_type != ffi::ibv_qp_type::IBV_QPT_RC {
            return Err(Error::Unavailable {
                device: context.device_name().into(),
                operation: "work requests for this type of queue pair",
                needs: "a reliable connected (RC) queue pair",
                source: None,
            });
        }
        let limits = context.limits()?;
        let (mut attr, mut init) = (ffi::ibv_qp_attr::default(), ffi::ibv_qp_init_attr::default());
        let mask = ffi::ibv_qp_attr_mask::IBV_QP_CAP.0 as i32;
        // SAFETY: the caller guarantees a live queue pair; the other pointers are local variables.
        check(unsafe { ffi::ibv_query_qp(raw.as_ptr(), &mut attr, mask, &mut init) })
            .map_err(context.failed("query a queue pair of another library"))?;
        let max_sge = init.cap.max_send_sge;
        Ok(Self {
            raw,
            domain,
            max_sge,
            max_sge_read: max_sge.min(limits.max_sge_read),
            max_inline: init.cap.max_inline_data,
            remote_access: transition::remote_access(&limits),
            // Its owner may connect it later.
            initiator_depth: u8::MAX.into(),
            creator: Process::current(),
            owned: None,
            context,
        })
    }

    /// The libibverbs object, for calls that this crate lacks. Do not destroy it.
    pub fn as_raw(&self) -> NonNull<ffi::ibv_qp> {
        self.raw
    }

    /// Whether this is the process that created or wrapped the queue pair, and no child of it. A child must neither
    /// change the queue pair nor poll its queues, which it may share with its parent.
    pub(crate) fn is_own(&self) -> bool {
        self.creator.is_current()
    }

    /// The number of the queue pair, as in [`Completion::qp_num`](super::Completion::qp_num).
    pub fn number(&self) -> u32 {
        // SAFETY: the queue pair is live while `self` is.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    /// The description that the peer needs to connect; `None` for a foreign queue pair. On iWARP it has no address,
    /// and no peer takes it.
    pub fn endpoint(&self) -> Option<Endpoint> {
        self.owned.as_ref().map(|owned| owned.endpoint)
    }

    /// Makes this the second queue pair of a connection, with the sequence numbers of the first. Both are in INIT.
    pub(crate) fn set_second_of(&mut self, first: &mut Self) {
        if let (Some(first), Some(second)) = (&mut first.owned, &mut self.owned) {
            second.endpoint.psn = first.endpoint.psn;
            first.endpoint.message_qp_num = second.endpoint.qp_num;
        }
    }

    /// Whether it takes its receives from a shared queue.
    pub(crate) fn shares_receives(&self) -> bool {
        self.owned.as_ref().is_some_and(|owned| owned.srq.is_some())
    }

    /// Maximum number of bytes in an inline work request.
    pub(crate) fn max_inline(&self) -> u32 {
        self.max_inline
    }

    /// The index of its GID; `None` for a foreign queue pair.
    pub(crate) fn gid_index(&self) -> Option<u8> {
        self.owned.as_ref().map(|owned| owned.gid_index)
    }

    /// Queries the state: a value of `ibv_qp_state`.
    pub(crate) fn state(&self) -> Result<u32> {
        let (mut attr, mut init) = (ffi::ibv_qp_attr::default(), ffi::ibv_qp_init_attr::default());
        let mask = ffi::ibv_qp_attr_mask::IBV_QP_STATE.0 as i32;
        // SAFETY: the queue pair is live; the other pointers are local variables.
        check(unsafe { ffi::ibv_query_qp(self.raw.as_ptr(), &mut attr, mask, &mut init) })
            .map_err(self.failed(format!("query queue pair {}", self.number())))?;
        Ok(attr.qp_state)
    }

    /// Connects to the peer's queue pair, and brings this one to RTR and RTS. The peer must connect to this one
    /// too. Receives may be posted before.
    ///
    /// # Errors
    /// - [`Error::InvalidEndpoint`]: no queue pair can have this description, or this one can never reach it: the GIDs
    ///   are of different RoCE versions or IP families.
    /// - [`Error::Unavailable`]: another library created this queue pair; or the device is on iWARP, where only
    ///   [`cm`](crate::cm) connects.
    /// - [`Error::Device`]: `EINVAL` if it is connected or stopped already; `ENETUNREACH` or `ETIMEDOUT` if the
    ///   kernel finds no route to the peer's GID.
    #[doc(alias = "ibv_modify_qp")]
    pub fn connect(&self, peer: &Endpoint) -> Result<()> {
        if self.context.is_iwarp() {
            return Err(Error::Unavailable {
                device: self.context.device_name().into(),
                operation: "connection by Endpoint",
                needs: "InfiniBand or RoCE; on iWARP connect by IP address (cm::Listener, cm::Outgoing)",
                source: None,
            });
        }
        peer.check()?;
        let Some(owned) = &self.owned else {
            return Err(Error::Unavailable {
                device: self.context.device_name().into(),
                operation: "connection of a foreign queue pair",
                needs: "a queue pair of QueuePair::new; the library that created another connects it",
                source: None,
            });
        };
        let (ours, options) = (owned.endpoint, owned.options);
        if let Some(reason) = gid::mismatch(&ours, peer) {
            return Err(Error::InvalidEndpoint { reason });
        }
        let (attr, mask) = transition::rtr(&ours, peer, options.port, owned.gid_index, &owned.fabric);
        self.modify(attr, mask, "to RTR").map_err(|error| match error {
            Error::Device { device, operation, source } => {
                let reason = gid::unreachable(&ours, peer, source.raw_os_error());
                Error::Device { device, operation: format!("{operation}: {reason}"), source }
            }
            other => other,
        })?;

        let initiator = owned.depth.initiator.min(peer.rd_atomic);
        let (attr, mask) = transition::rts(ours.psn, &options, initiator);
        self.modify(attr, mask, "to RTS")?;
        self.set_initiator_depth(initiator);
        Ok(())
    }

    /// What the connection may use, of the two figures that both sides exchanged.
    pub(crate) fn set_initiator_depth(&self, depth: u8) {
        self.initiator_depth.store(depth, Ordering::Relaxed);
    }

    /// The READs and atomics of a connection that another party sets up; `None` for a foreign queue pair.
    pub(crate) fn depth(&self) -> Option<Depth> {
        self.owned.as_ref().map(|owned| owned.depth)
    }

    /// The options that packets carry; `None` for a foreign queue pair.
    pub(crate) fn fabric(&self) -> Option<&Fabric> {
        self.owned.as_ref().map(|owned| &owned.fabric)
    }

    /// What a peer may do, as `ibv_access_flags`.
    pub(crate) fn remote_access(&self) -> u32 {
        self.remote_access
    }

    /// Brings the queue pair to the error state for good: work requests and receives in flight, and all posted
    /// later, complete with WR_FLUSH_ERR.
    ///
    /// # Errors
    /// [`Error::Device`], with the errno of the kernel or the provider.
    #[doc(alias = "IBV_QPS_ERR")]
    pub fn stop(&self) -> Result<()> {
        let attr = ffi::ibv_qp_attr { qp_state: ffi::ibv_qp_state::IBV_QPS_ERR, ..Default::default() };
        self.modify(attr, ffi::ibv_qp_attr_mask::IBV_QP_STATE, "to the error state")
    }

    /// Discards everything posted, without completions. When this returns, the device is done with it.
    pub(crate) fn reset(&self) -> Result<()> {
        let attr = ffi::ibv_qp_attr { qp_state: ffi::ibv_qp_state::IBV_QPS_RESET, ..Default::default() };
        self.modify(attr, ffi::ibv_qp_attr_mask::IBV_QP_STATE, "to RESET")
    }

    /// Modifies the queue pair. `transition` completes "cannot bring queue pair 17 …".
    pub(crate) fn modify(
        &self,
        mut attr: ffi::ibv_qp_attr,
        mask: ffi::ibv_qp_attr_mask,
        transition: &str,
    ) -> Result<()> {
        // SAFETY: the queue pair is live, and the attributes named by the mask are filled in.
        check(unsafe { ffi::ibv_modify_qp(self.raw.as_ptr(), &mut attr, mask.0 as i32) })
            .map_err(self.failed(format!("bring queue pair {} {transition}", self.number())))
    }

    fn failed(&self, operation: String) -> impl FnOnce(io::Error) -> Error {
        self.context.failed(operation)
    }
}

/// The error for a queue pair that was not created.
fn not_created(context: &Context, options: &QueuePairOptions, source: io::Error) -> Error {
    if source.raw_os_error() == Some(libc::EOPNOTSUPP) {
        return Error::Unavailable {
            device: context.device_name().into(),
            operation: "reliable connected (RC) queue pairs",
            needs: "a NIC and a driver with the RC transport (efa has only SRD and UD)",
            source: Some(source.into()),
        };
    }
    let QueuePairOptions { send_depth, recv_depth, max_sge, max_inline, .. } = options;
    let operation = format!(
        "create a queue pair with send depth {send_depth}, receive depth {recv_depth}, {max_sge} elements and {max_inline} inline bytes a request"
    );
    context.failed(operation)(source)
}

/// The first packet sequence number of a new queue pair. Each one gets another number, so that a late packet
/// of an earlier connection with the same queue pair numbers is not accepted.
fn next_psn() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let seed = std::process::id().wrapping_mul(0x9e37_79b9);
    (seed ^ NEXT.fetch_add(0x1_0001, Ordering::Relaxed)) & 0xff_ffff
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kind::ErrorKind;
    use crate::mr::tests::domain;

    /// A queue pair that no device has. libibverbs must not see it.
    pub(crate) fn fake(domain: &ProtectionDomain) -> QueuePair {
        QueuePair {
            raw: NonNull::from(Box::leak(Box::new(ffi::ibv_qp::default()))),
            domain: Some(domain.id()),
            max_sge: 40,
            max_sge_read: 40,
            max_inline: 64,
            remote_access: 0,
            initiator_depth: 16.into(),
            creator: Process::current(),
            owned: None,
            context: domain.context().clone(),
        }
    }

    #[test]
    fn a_queue_pair_of_datagrams_is_not_wrapped() {
        let domain = domain();
        let (context, pd) = (domain.context().as_raw().as_ptr(), domain.as_raw().as_ptr());
        let qp_type = ffi::ibv_qp_type::IBV_QPT_UD;
        let raw = Box::leak(Box::new(ffi::ibv_qp { context, pd, qp_type, ..Default::default() }));
        // SAFETY: it is leaked, and libibverbs does not see it.
        let refused = unsafe { QueuePair::from_raw(NonNull::from(raw)) }.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("reliable connected"), "{refused}");
    }

    #[test]
    fn a_device_without_rc_is_named() {
        let domain = domain();
        let error = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            not_created(domain.context(), &QueuePairOptions::default(), source)
        };
        let refused = error(libc::EOPNOTSUPP);
        assert_eq!((refused.kind(), refused.errno()), (ErrorKind::Unsupported, Some(libc::EOPNOTSUPP)));
        assert!(
            refused.to_string().starts_with("stub0 has no reliable connected (RC) queue pairs"),
            "{refused}"
        );
        assert!(matches!(error(libc::EINVAL), Error::Device { .. }));
    }
}
