//! Work request chains, built in place and posted with one call.
//!
//! A transfer posts millions of work requests, so their memory is allocated once. `unsafe` is here for the
//! pointers of the chain, which `post` sets, and for the call.

use std::ffi::c_int;
use std::io;
use std::ptr::null_mut;

use ibverbs_sys as ffi;
use rdma_sys_ext::verbs as inline;

use super::{QueuePair, SharedReceiveQueue, check};

/// A work request of the send queue or of the receive queue.
pub(crate) trait RawRequest: Default + Clone {
    /// Sets the request's first element and the request after it.
    fn link(&mut self, elements: *mut ffi::ibv_sge, next: *mut Self);

    /// Posts a chain; sets `bad` to the first request that was not posted.
    ///
    /// # Safety
    /// `pair` is live. The chain and its elements are valid during the call.
    unsafe fn post(pair: *mut ffi::ibv_qp, list: *mut Self, bad: &mut *mut Self) -> c_int;
}

impl RawRequest for ffi::ibv_send_wr {
    fn link(&mut self, elements: *mut ffi::ibv_sge, next: *mut Self) {
        (self.sg_list, self.next) = (elements, next);
    }

    unsafe fn post(pair: *mut ffi::ibv_qp, list: *mut Self, bad: &mut *mut Self) -> c_int {
        // SAFETY: the caller guarantees what the call needs.
        unsafe { inline::post_send(pair, list, bad) }
    }
}

impl RawRequest for ffi::ibv_recv_wr {
    fn link(&mut self, elements: *mut ffi::ibv_sge, next: *mut Self) {
        (self.sg_list, self.next) = (elements, next);
    }

    unsafe fn post(pair: *mut ffi::ibv_qp, list: *mut Self, bad: &mut *mut Self) -> c_int {
        // SAFETY: the caller guarantees what the call needs.
        unsafe { inline::post_recv(pair, list, bad) }
    }
}

/// A chain of work requests with room for the elements of each.
pub(crate) struct Batch<W> {
    requests: Box<[W]>,
    elements: Box<[ffi::ibv_sge]>,
    max_sge: usize,
    count: usize,
}

/// A chain for the send queue.
pub(crate) type SendBatch = Batch<ffi::ibv_send_wr>;
/// A chain for the receive queue.
pub(crate) type RecvBatch = Batch<ffi::ibv_recv_wr>;

// SAFETY: the pointers are null or point into the boxes beside them, which move with them and are used by
// `post` only.
unsafe impl<W: RawRequest> Send for Batch<W> {}
// SAFETY: as above; a shared reference gives access to nothing.
unsafe impl<W: RawRequest> Sync for Batch<W> {}

impl<W: RawRequest> Batch<W> {
    /// Allocates a chain of at most `requests` requests with at most `max_sge` elements each.
    pub(crate) fn new(requests: usize, max_sge: usize) -> Self {
        Self {
            requests: vec![W::default(); requests].into(),
            elements: vec![ffi::ibv_sge::default(); requests * max_sge].into(),
            max_sge,
            count: 0,
        }
    }

    /// The next request and its elements, for the caller to fill in: both may hold values of an earlier request.
    /// [`add`](Self::add) makes it part of the chain. Panics if the chain is full.
    pub(crate) fn next(&mut self) -> (&mut W, &mut [ffi::ibv_sge]) {
        let at = self.count * self.max_sge;
        (&mut self.requests[self.count], &mut self.elements[at..at + self.max_sge])
    }

    /// Adds the request that [`next`](Self::next) returned.
    pub(crate) fn add(&mut self) {
        self.count += 1;
    }

    /// Posts the chain, which is empty afterwards. On failure, also returns how many requests were posted.
    pub(crate) fn post(&mut self, pair: &QueuePair) -> Result<(), (usize, io::Error)> {
        // SAFETY: the queue pair is live. The call reads requests and elements and keeps neither.
        // The regions behind the elements limit which memory the device accesses.
        self.post_by(|list, bad| unsafe { W::post(pair.as_raw().as_ptr(), list, bad) })
    }

    /// Posts the chain by a call that takes its first request, and sets the first one that was not posted.
    fn post_by(&mut self, call: impl FnOnce(*mut W, &mut *mut W) -> c_int) -> Result<(), (usize, io::Error)> {
        let count = std::mem::take(&mut self.count);
        let Some(last) = count.checked_sub(1) else { return Ok(()) };
        let (list, elements) = (self.requests.as_mut_ptr(), self.elements.as_mut_ptr());
        // SAFETY: the boxes have room for `count` requests and `max_sge` elements of each.
        unsafe {
            let link = |at: usize, next| (*list.add(at)).link(elements.add(at * self.max_sge), next);
            for at in 0..last {
                link(at, list.add(at + 1));
            }
            link(last, null_mut());
        }
        let mut bad = null_mut();
        check(call(list, &mut bad)).map_err(|source| {
            let posted = bad.addr().wrapping_sub(list.addr()) / size_of::<W>();
            (posted.min(count), source)
        })
    }
}

impl RecvBatch {
    /// Posts the chain to a shared receive queue. It is empty afterwards.
    pub(crate) fn post_shared(&mut self, queue: &SharedReceiveQueue) -> io::Result<()> {
        // SAFETY: as in `post`.
        let posted =
            self.post_by(|list, bad| unsafe { inline::post_srq_recv(queue.as_raw().as_ptr(), list, bad) });
        posted.map_err(|(_, source)| source)
    }
}

impl SendBatch {
    /// Requests a completion for the last request, which stands for the whole chain.
    pub(crate) fn signal_last(&mut self) {
        if let Some(last) = self.count.checked_sub(1) {
            self.requests[last].send_flags |= ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
    }
}
