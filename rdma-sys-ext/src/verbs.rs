//! The verbs that C has as inline functions, through the context's operations.
//!
//! `ibverbs-sys` binds what libibverbs exports. The data path is not exported: a header's inline
//! function calls the provider through the context. These do the same, with C's arguments and
//! results.
//!
//! # `ibv_query_port`
//! The exported `ibv_query_port` that `ibverbs-sys` binds is kept for old programs: it takes a
//! `_compat_ibv_port_attr` and leaves out `port_cap_flags2` and `active_speed_ex`. In C, a macro of
//! that name hides it. [`query_port`] is that macro's function.

use ibverbs_sys::{
    _compat_ibv_port_attr, _ibv_query_gid_ex, _ibv_query_gid_table, ibv_context, ibv_cq, ibv_gid_entry,
    ibv_port_attr, ibv_qp, ibv_query_port, ibv_recv_wr, ibv_send_wr, ibv_wc,
};
use std::ffi::{c_int, c_void};

/// Posts a list of work requests to the send queue.
///
/// The result is 0 or an errno, with `*bad_wr` then the first request that was not posted: ENOMEM
/// for a full queue, EINVAL for a request or a state of the queue pair that is not right.
///
/// # Safety
/// `qp` must be a live queue pair, `wr` a null-terminated list of initialised requests and `bad_wr`
/// writable. The memory that the requests name must stay registered until they complete, and what
/// they make the device write must not be referenced from Rust meanwhile.
#[doc(alias = "ibv_post_send")]
#[inline]
pub unsafe fn post_send(qp: *mut ibv_qp, wr: *mut ibv_send_wr, bad_wr: *mut *mut ibv_send_wr) -> c_int {
    // SAFETY: a live queue pair has a live context; the caller answers for the rest.
    unsafe {
        match (*(*qp).context).ops.post_send {
            Some(post_send) => post_send(qp, wr, bad_wr),
            None => libc::EOPNOTSUPP,
        }
    }
}

/// Posts a list of work requests to the receive queue.
///
/// The result is 0 or an errno, with `*bad_wr` then the first request that was not posted.
///
/// # Safety
/// As [`post_send`]: what the requests name will be written by the device.
#[doc(alias = "ibv_post_recv")]
#[inline]
pub unsafe fn post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr, bad_wr: *mut *mut ibv_recv_wr) -> c_int {
    // SAFETY: a live queue pair has a live context; the caller answers for the rest.
    unsafe {
        match (*(*qp).context).ops.post_recv {
            Some(post_recv) => post_recv(qp, wr, bad_wr),
            None => libc::EOPNOTSUPP,
        }
    }
}

/// Takes up to `n` completions from the queue.
///
/// The result is how many of the entries at `wc` were filled in, or negative on failure. Of an entry
/// whose status is not success only `wr_id`, `status`, `qp_num` and `vendor_err` mean anything.
///
/// # Safety
/// `cq` must be a live completion queue and `wc` writable for `n` entries.
#[doc(alias = "ibv_poll_cq")]
#[inline]
pub unsafe fn poll_cq(cq: *mut ibv_cq, n: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: a live completion queue has a live context; the caller answers for the rest.
    unsafe {
        match (*(*cq).context).ops.poll_cq {
            Some(poll_cq) => poll_cq(cq, n, wc),
            None => -libc::EOPNOTSUPP,
        }
    }
}

/// Asks for one event on the queue's completion channel at the next completion, or at the next
/// solicited or failed one.
///
/// Completions that are already in the queue give no event: poll once more after arming. The result
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

/// What lies directly before an extended context: the end of libibverbs' `struct verbs_context`,
/// without the context itself, which is its last field.
///
/// That struct grows at its front and `sz` says how much of it there is, so distances from its end
/// never change.
#[doc(alias = "verbs_context")]
#[repr(C)]
#[derive(Debug)]
pub struct BeforeContext {
    /// Fills in all of `ibv_port_attr`; the last argument is its size.
    pub query_port: Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr, usize) -> c_int>,
    /// Operations that nothing here calls.
    pub others: [*mut c_void; 38],
    /// Bytes of the whole struct, the context included.
    pub sz: usize,
}

/// `ibv_context::abi_compat` of a context that lies in a `verbs_context`.
#[doc(alias = "__VERBS_ABI_IS_EXTENDED")]
pub const VERBS_ABI_IS_EXTENDED: usize = usize::MAX;

/// Reads a port's attributes, all that the library knows; the others are 0.
///
/// `port_num` counts from 1. The result is 0 or an errno.
///
/// # Safety
/// `context` must be a live context, as `ibv_open_device` returned it, and `port_attr` writable.
#[doc(alias = "ibv_query_port")]
pub unsafe fn query_port(context: *mut ibv_context, port_num: u8, port_attr: *mut ibv_port_attr) -> c_int {
    // SAFETY: the caller answers for both pointers. Where the context says that it is extended, it
    // lies at the end of a struct of `sz` bytes, so `sz` can be read, and `query_port` once `sz`
    // says that it exists; no reference to the whole is formed. All zeros are an ibv_port_attr, and
    // libibverbs' _compat_ibv_port_attr is a beginning of it.
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

/// Reads one entry of a port's GID table, with its type (`IBV_GID_TYPE_ROCE_V2`) and its network
/// interface.
///
/// `flags` must be 0. The result is 0 or an errno: ENODATA for an empty entry.
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
    // SAFETY: the caller answers for both pointers; `size` is that of the entry.
    unsafe { _ibv_query_gid_ex(context, port_num, gid_index, entry, flags, size) }
}

/// Reads the valid entries of the GID tables of all ports.
///
/// `flags` must be 0. The result is how many of the entries at `entries` were filled in, or a
/// negative errno.
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
    // SAFETY: the caller answers for both pointers; `size` is that of one entry.
    unsafe { _ibv_query_gid_table(context, entries, max_entries, flags, size) }
}

#[cfg(test)]
mod tests {
    //! The inlines against a fake provider that answers with what it was given.

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
        // SAFETY: the test passes a queue pair, and a place for the bad request.
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
        // SAFETY: the test passes a queue pair, and a place for the bad request.
        unsafe {
            *bad_wr = wr.byte_add(2);
            -((*qp).qp_num as c_int)
        }
    }

    unsafe extern "C" fn fake_poll_cq(cq: *mut ibv_cq, n: c_int, wc: *mut ibv_wc) -> c_int {
        // SAFETY: the test passes a completion queue, and `n` entries.
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
        // SAFETY: live objects of this function, on a context whose operations are the fakes.
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
        // SAFETY: live objects of this function, on a context without operations.
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
        // The pointer comes from the whole, since the function looks before the context.
        let context = (&raw mut extended).cast::<BeforeContext>().wrapping_add(1).cast();
        // SAFETY: an extended context of this function, whose operation is the fake.
        let result = unsafe { query_port(context, 2, &raw mut port) };
        assert_eq!(result, size_of::<ibv_port_attr>() as c_int);
        assert_eq!((port.lid, port.active_speed_ex), (0, 2));
    }
}
