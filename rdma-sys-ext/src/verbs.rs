//! Verbs that are inline functions in C, called through the context's operations.
//!
//! `ibverbs-sys` binds the functions that libibverbs exports. libibverbs does not export the data path:
//! an inline function in its header calls the provider through the context. The functions here do the
//! same, with the arguments and results of C.
//!
//! # `ibv_query_port`
//! `ibverbs-sys` binds the exported `ibv_query_port`, which exists for old programs: it takes a
//! `_compat_ibv_port_attr` and does not fill in `port_cap_flags2` and `active_speed_ex`. In C a macro of
//! the same name replaces it. [`query_port`] does what that macro does.

use ibverbs_sys::{
    _compat_ibv_port_attr, _ibv_query_gid_ex, _ibv_query_gid_table, ibv_context, ibv_cq, ibv_gid_entry,
    ibv_port_attr, ibv_qp, ibv_query_port, ibv_recv_wr, ibv_send_wr, ibv_srq, ibv_wc,
};
use std::ffi::{c_int, c_void};

/// Posts a chain of work requests to the send queue.
///
/// The result is 0 or an errno; after an error `*bad_wr` is the first request that was not posted.
/// ENOMEM: the queue is full. EINVAL: a request is wrong, or the queue pair is in the wrong state.
///
/// # Safety
/// `qp` must be a live queue pair, `wr` a null-terminated chain of initialized requests and `bad_wr`
/// writable. The memory that the requests name must stay registered until they complete. Until then no
/// Rust reference to memory that the device writes may exist.
#[doc(alias = "ibv_post_send")]
#[inline]
pub unsafe fn post_send(qp: *mut ibv_qp, wr: *mut ibv_send_wr, bad_wr: *mut *mut ibv_send_wr) -> c_int {
    // SAFETY: a live queue pair has a live context; the caller vouches for the rest.
    unsafe {
        match (*(*qp).context).ops.post_send {
            Some(post_send) => post_send(qp, wr, bad_wr),
            None => libc::EOPNOTSUPP,
        }
    }
}

/// Posts a chain of work requests to the receive queue.
///
/// The result is 0 or an errno; after an error `*bad_wr` is the first request that was not posted.
///
/// # Safety
/// As [`post_send`]: the device writes the memory that the requests name.
#[doc(alias = "ibv_post_recv")]
#[inline]
pub unsafe fn post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr, bad_wr: *mut *mut ibv_recv_wr) -> c_int {
    // SAFETY: a live queue pair has a live context; the caller vouches for the rest.
    unsafe {
        match (*(*qp).context).ops.post_recv {
            Some(post_recv) => post_recv(qp, wr, bad_wr),
            None => libc::EOPNOTSUPP,
        }
    }
}

/// Posts a chain of work requests to a shared receive queue.
///
/// The result is 0 or an errno; after an error `*bad_wr` is the first request that was not posted.
///
/// # Safety
/// As [`post_recv`], for a live shared receive queue.
#[doc(alias = "ibv_post_srq_recv")]
#[inline]
pub unsafe fn post_srq_recv(srq: *mut ibv_srq, wr: *mut ibv_recv_wr, bad_wr: *mut *mut ibv_recv_wr) -> c_int {
    // SAFETY: a live queue has a live context; the caller vouches for the rest.
    unsafe {
        match (*(*srq).context).ops.post_srq_recv {
            Some(post_srq_recv) => post_srq_recv(srq, wr, bad_wr),
            None => libc::EOPNOTSUPP,
        }
    }
}

/// Takes up to `n` completions from the queue.
///
/// The result is the number of entries written to `wc`, or negative on failure. In an entry whose status
/// is not success only `wr_id`, `status`, `qp_num` and `vendor_err` are valid.
///
/// # Safety
/// `cq` must be a live completion queue and `wc` writable for `n` entries.
#[doc(alias = "ibv_poll_cq")]
#[inline]
pub unsafe fn poll_cq(cq: *mut ibv_cq, n: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: a live completion queue has a live context; the caller vouches for the rest.
    unsafe {
        match (*(*cq).context).ops.poll_cq {
            Some(poll_cq) => poll_cq(cq, n, wc),
            None => -libc::EOPNOTSUPP,
        }
    }
}

/// Arms the queue: its completion channel gets one event at the next completion, or with
/// `solicited_only` at the next solicited or failed one.
///
/// Completions that are already in the queue give no event, so poll once more after arming. The result
/// is 0 or an errno.
///
/// # Safety
/// `cq` must be a live completion queue.
#[doc(alias = "ibv_req_notify_cq")]
#[inline]
pub unsafe fn req_notify_cq(cq: *mut ibv_cq, solicited_only: bool) -> c_int {
    // SAFETY: a live completion queue has a live context.
    unsafe {
        match (*(*cq).context).ops.req_notify_cq {
            Some(req_notify_cq) => req_notify_cq(cq, solicited_only.into()),
            None => libc::EOPNOTSUPP,
        }
    }
}

/// The memory directly before an extended context: the end of libibverbs' `struct verbs_context`,
/// without its last field, which is the context itself.
///
/// That struct grows at its front and `sz` is its size, so distances from its end never change.
#[doc(alias = "verbs_context")]
#[repr(C)]
#[derive(Debug)]
pub struct BeforeContext {
    /// Fills in an `ibv_port_attr` of the size in the last argument.
    pub query_port: Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr, usize) -> c_int>,
    /// Operations that this crate does not call.
    pub others: [*mut c_void; 38],
    /// Bytes of the whole struct, the context included.
    pub sz: usize,
}

/// `ibv_context::abi_compat` of a context inside a `verbs_context`.
#[doc(alias = "__VERBS_ABI_IS_EXTENDED")]
pub const VERBS_ABI_IS_EXTENDED: usize = usize::MAX;

/// Reads all attributes of a port that libibverbs knows; the others are 0.
///
/// `port_num` counts from 1. The result is 0 or an errno.
///
/// # Safety
/// `context` must be a live context, as `ibv_open_device` returned it, and `port_attr` writable.
#[doc(alias = "ibv_query_port")]
pub unsafe fn query_port(context: *mut ibv_context, port_num: u8, port_attr: *mut ibv_port_attr) -> c_int {
    // SAFETY: the caller vouches for both pointers. An extended context is the end of a struct of `sz`
    // bytes, so `sz` is readable, and `query_port` once `sz` includes it; no reference to it is formed.
    // An ibv_port_attr may be all zero, and _compat_ibv_port_attr is a prefix of it.
    unsafe {
        port_attr.write_bytes(0, 1);
        if (*context).abi_compat.addr() == VERBS_ABI_IS_EXTENDED {
            let before = context.cast::<BeforeContext>().sub(1);
            if (*before).sz >= size_of::<BeforeContext>() + size_of::<ibv_context>()
                && let Some(query_port) = (*before).query_port
            {
                return query_port(context, port_num, port_attr, size_of::<ibv_port_attr>());
            }
        }
        ibv_query_port(context, port_num, port_attr.cast::<_compat_ibv_port_attr>())
    }
}

/// Reads one entry of a port's GID table, including its type (such as `IBV_GID_TYPE_ROCE_V2`) and its
/// network interface.
///
/// `flags` must be 0. The result is 0 or an errno; ENODATA means an empty entry.
///
/// # Safety
/// `context` must be a live context and `entry` writable.
#[doc(alias = "ibv_query_gid_ex")]
pub unsafe fn query_gid_ex(
    context: *mut ibv_context,
    port_num: u32,
    gid_index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
) -> c_int {
    let size = size_of::<ibv_gid_entry>();
    // SAFETY: the caller vouches for both pointers; `size` is that of the entry.
    unsafe { _ibv_query_gid_ex(context, port_num, gid_index, entry, flags, size) }
}

/// Reads the valid entries of the GID tables of all ports.
///
/// `flags` must be 0. The result is the number of entries written to `entries`, or a negative errno.
///
/// # Safety
/// `context` must be a live context and `entries` writable for `max_entries`.
#[doc(alias = "ibv_query_gid_table")]
pub unsafe fn query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
) -> isize {
    let size = size_of::<ibv_gid_entry>();
    // SAFETY: the caller vouches for both pointers; `size` is that of one entry.
    unsafe { _ibv_query_gid_table(context, entries, max_entries, flags, size) }
}

#[cfg(test)]
mod tests {
    //! Calls the inline verbs with a fake provider, which returns the arguments that it gets.

    use super::*;
    use std::mem::zeroed;
    use std::ptr::{null_mut, without_provenance_mut};

    /// A context of libibverbs' layout.
    #[repr(C)]
    struct Extended {
        before: BeforeContext,
        context: ibv_context,
    }

    fn extended(sz: usize) -> Extended {
        let mut context =
            ibv_context { abi_compat: without_provenance_mut(VERBS_ABI_IS_EXTENDED), ..Default::default() };
        context.ops.post_send = Some(fake_post_send);
        context.ops.post_recv = Some(fake_post_recv);
        context.ops.poll_cq = Some(fake_poll_cq);
        context.ops.req_notify_cq = Some(fake_req_notify_cq);
        let before = BeforeContext { query_port: Some(fake_query_port), others: [null_mut(); 38], sz };
        Extended { before, context }
    }

    unsafe extern "C" fn fake_post_send(
        qp: *mut ibv_qp,
        wr: *mut ibv_send_wr,
        bad_wr: *mut *mut ibv_send_wr,
    ) -> c_int {
        // SAFETY: the test passes a queue pair and a writable `bad_wr`.
        unsafe {
            *bad_wr = wr.byte_add(1);
            (*qp).qp_num as c_int
        }
    }

    unsafe extern "C" fn fake_post_recv(
        qp: *mut ibv_qp,
        wr: *mut ibv_recv_wr,
        bad_wr: *mut *mut ibv_recv_wr,
    ) -> c_int {
        // SAFETY: the test passes a queue pair and a writable `bad_wr`.
        unsafe {
            *bad_wr = wr.byte_add(2);
            -((*qp).qp_num as c_int)
        }
    }

    unsafe extern "C" fn fake_poll_cq(cq: *mut ibv_cq, n: c_int, wc: *mut ibv_wc) -> c_int {
        // SAFETY: the test passes a completion queue and `n` entries.
        unsafe {
            (*wc.add(n as usize - 1)).qp_num = 0x77;
            (*cq).cqe + n
        }
    }

    unsafe extern "C" fn fake_req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
        // SAFETY: the test passes a completion queue.
        unsafe { (*cq).cqe + solicited_only }
    }

    unsafe extern "C" fn fake_query_port(
        _context: *mut ibv_context,
        port_num: u8,
        port_attr: *mut ibv_port_attr,
        size: usize,
    ) -> c_int {
        // SAFETY: the test passes an ibv_port_attr.
        unsafe {
            assert_eq!((*port_attr).lid, 0);
            (*port_attr).active_speed_ex = port_num.into();
        }
        size as c_int
    }

    #[test]
    fn posting_and_polling_reach_the_provider_with_their_arguments() {
        let mut extended = extended(0);
        let context = &raw mut extended.context;
        let mut qp = ibv_qp { context, qp_num: 40, ..Default::default() };
        let mut cq = ibv_cq { context, cqe: 100, ..Default::default() };
        let (mut send, mut recv) = (ibv_send_wr::default(), ibv_recv_wr::default());
        let (mut bad_send, mut bad_recv) = (null_mut(), null_mut());
        // SAFETY: an ibv_wc is integers only.
        let mut wc: [ibv_wc; 3] = unsafe { zeroed() };
        // SAFETY: the objects live in this function, on a context whose operations are the fakes.
        unsafe {
            assert_eq!(post_send(&raw mut qp, &raw mut send, &raw mut bad_send), 40);
            assert_eq!(bad_send, (&raw mut send).byte_add(1));
            assert_eq!(post_recv(&raw mut qp, &raw mut recv, &raw mut bad_recv), -40);
            assert_eq!(bad_recv, (&raw mut recv).byte_add(2));
            assert_eq!(poll_cq(&raw mut cq, 3, wc.as_mut_ptr()), 103);
            assert_eq!(req_notify_cq(&raw mut cq, true), 101);
            assert_eq!(req_notify_cq(&raw mut cq, false), 100);
        }
        assert_eq!(wc.map(|wc| wc.qp_num), [0, 0, 0x77]);
    }

    #[test]
    fn an_operation_that_is_absent_is_eopnotsupp() {
        let mut context = ibv_context::default();
        let context = &raw mut context;
        let mut qp = ibv_qp { context, ..Default::default() };
        let mut cq = ibv_cq { context, ..Default::default() };
        let (qp, cq) = (&raw mut qp, &raw mut cq);
        // SAFETY: the objects live in this function, on a context without operations.
        unsafe {
            assert_eq!(post_send(qp, null_mut(), null_mut()), libc::EOPNOTSUPP);
            assert_eq!(post_recv(qp, null_mut(), null_mut()), libc::EOPNOTSUPP);
            assert_eq!(poll_cq(cq, 0, null_mut()), -libc::EOPNOTSUPP);
            assert_eq!(req_notify_cq(cq, false), libc::EOPNOTSUPP);
        }
    }

    #[test]
    fn query_port_asks_for_all_attributes() {
        let mut extended = extended(size_of::<Extended>());
        let mut port = ibv_port_attr { lid: 9, ..Default::default() };
        // The pointer derives from the whole struct, since `query_port` reads before the context.
        let context = (&raw mut extended).cast::<BeforeContext>().wrapping_add(1).cast();
        // SAFETY: the extended context lives in this function, and its operation is the fake.
        let result = unsafe { query_port(context, 2, &raw mut port) };
        assert_eq!(result, size_of::<ibv_port_attr>() as c_int);
        assert_eq!((port.lid, port.active_speed_ex), (0, 2));
    }
}
