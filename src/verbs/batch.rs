//! Work requests that are built in place and posted as one list.
//!
//! A transfer posts millions of them, so their memory is made once. `unsafe` is here for the list's
//! pointers, which are set when it is posted, and for the call.

use std::ffi::c_int;
use std::io;
use std::ptr::null_mut;

use ibverbs_sys as ffi;
use rdma_sys_ext::verbs as inline;

use super::{QueuePair, check};

/// A work request of one of the two queues.
pub(crate) trait WorkRequest: Default + Clone {
    /// Its first element, and the request behind it.
    fn link(&mut self, elements: *mut ffi::ibv_sge, next: *mut Self);

    /// Posts a list; sets `bad` to the first request that was not posted.
    ///
    /// # Safety
    /// `pair` is live; the list and its elements are valid during the call.
    unsafe fn post(pair: *mut ffi::ibv_qp, list: *mut Self, bad: &mut *mut Self) -> c_int;
}

impl WorkRequest for ffi::ibv_send_wr {
    #[inline]
    fn link(&mut self, elements: *mut ffi::ibv_sge, next: *mut Self) {
        (self.sg_list, self.next) = (elements, next);
    }

    #[inline]
    unsafe fn post(pair: *mut ffi::ibv_qp, list: *mut Self, bad: &mut *mut Self) -> c_int {
        // SAFETY: the caller's.
        unsafe { inline::post_send(pair, list, bad) }
    }
}

impl WorkRequest for ffi::ibv_recv_wr {
    #[inline]
    fn link(&mut self, elements: *mut ffi::ibv_sge, next: *mut Self) {
        (self.sg_list, self.next) = (elements, next);
    }

    #[inline]
    unsafe fn post(pair: *mut ffi::ibv_qp, list: *mut Self, bad: &mut *mut Self) -> c_int {
        // SAFETY: the caller's.
        unsafe { inline::post_recv(pair, list, bad) }
    }
}

/// Requests to be posted with one call, each with its elements.
pub(crate) struct Batch<W> {
    requests: Box<[W]>,
    elements: Box<[ffi::ibv_sge]>,
    max_sge: usize,
    count: usize,
}

/// Requests to be sent.
pub(crate) type SendBatch = Batch<ffi::ibv_send_wr>;
/// Receives.
pub(crate) type RecvBatch = Batch<ffi::ibv_recv_wr>;

// SAFETY: its pointers are null except while `post` runs, and lead into itself then.
unsafe impl<W: WorkRequest> Send for Batch<W> {}
// SAFETY: as above; nothing can be read through a shared reference.
unsafe impl<W: WorkRequest> Sync for Batch<W> {}

impl<W: WorkRequest> Batch<W> {
    /// Room for so many requests, of so many elements each.
    pub(crate) fn new(requests: usize, max_sge: usize) -> Self {
        Self {
            requests: vec![W::default(); requests].into(),
            elements: vec![ffi::ibv_sge::default(); requests * max_sge].into(),
            max_sge,
            count: 0,
        }
    }

    /// The next request and the places for its elements; there must be room. Both may hold what was there
    /// before. It is one of the batch once it is [added](Self::add).
    #[inline]
    pub(crate) fn next(&mut self) -> (&mut W, &mut [ffi::ibv_sge]) {
        let at = self.count * self.max_sge;
        (&mut self.requests[self.count], &mut self.elements[at..at + self.max_sge])
    }

    /// Takes what was made of `next` as one of the batch.
    #[inline]
    pub(crate) fn add(&mut self) {
        self.count += 1;
    }

    /// Posts what it has and is empty then. On failure it says how many were posted all the same.
    #[inline(always)]
    pub(crate) fn post(&mut self, pair: &QueuePair) -> Result<(), (usize, io::Error)> {
        let count = std::mem::take(&mut self.count);
        let Some(last) = count.checked_sub(1) else { return Ok(()) };
        let (list, elements) = (self.requests.as_mut_ptr(), self.elements.as_mut_ptr());
        // SAFETY: `count` requests and `max_sge` elements for each are inside the two boxes.
        unsafe {
            let link = |at: usize, next| (*list.add(at)).link(elements.add(at * self.max_sge), next);
            for at in 0..last {
                link(at, list.add(at + 1));
            }
            link(last, null_mut());
        }
        let mut bad = null_mut();
        // SAFETY: the queue pair is live; requests and elements are read during the call only. What the
        // device may do with memory is bounded by the regions behind the elements.
        check(unsafe { W::post(pair.as_raw().as_ptr(), list, &mut bad) }).map_err(|source| {
            let posted = bad.addr().wrapping_sub(list.addr()) / size_of::<W>();
            (posted.min(count), source)
        })
    }
}

impl SendBatch {
    /// Asks for a completion of the last request, and so of all before it.
    pub(crate) fn signal_last(&mut self) {
        if let Some(last) = self.count.checked_sub(1) {
            self.requests[last].send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
    }
}
