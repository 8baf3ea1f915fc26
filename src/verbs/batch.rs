//! Work requests that are built in place and posted as one list.
//!
//! A transfer posts millions of them, so their memory is made once. `unsafe` is here for the list's
//! pointers, which are set when it is posted, and for the call.

use std::io;
use std::ptr::null_mut;

use ibverbs_sys as ffi;
use rdma_sys_ext::verbs as inline;

use super::{Operation, QueuePair, Sge, check};
use crate::Result;

/// Requests to be sent with one call, each with its elements.
pub(crate) struct SendBatch {
    requests: Box<[ffi::ibv_send_wr]>,
    elements: Box<[ffi::ibv_sge]>,
    max_sge: usize,
    count: usize,
}

// SAFETY: its pointers are null except while `post` runs, and lead into itself then.
unsafe impl Send for SendBatch {}
// SAFETY: as above; nothing can be read through a shared reference.
unsafe impl Sync for SendBatch {}

impl SendBatch {
    /// Room for so many requests, of so many elements each.
    pub(crate) fn new(requests: usize, max_sge: usize) -> Self {
        Self {
            requests: vec![ffi::ibv_send_wr::default(); requests].into(),
            elements: vec![ffi::ibv_sge::default(); requests * max_sge].into(),
            max_sge,
            count: 0,
        }
    }

    /// Adds a request; there must be room. It takes at most `max_sge` of the elements, and returns how
    /// many bytes they have; with that number it asks what the request does.
    #[inline]
    pub(crate) fn push<'s>(
        &mut self,
        wr_id: u64,
        elements: impl Iterator<Item = Sge<'s>>,
        operation: impl FnOnce(u64) -> Operation,
    ) -> Result<u64> {
        let at = self.count * self.max_sge;
        let places = &mut self.elements[at..at + self.max_sge];
        let (mut used, mut bytes) = (0, 0);
        for (place, element) in places.iter_mut().zip(elements) {
            *place = element.raw();
            bytes += u64::from(element.len());
            used += 1;
        }
        let mut request = operation(bytes).request_of(bytes)?;
        request.wr_id = wr_id;
        request.num_sge = used;
        self.requests[self.count] = request;
        self.count += 1;
        Ok(bytes)
    }

    /// Asks for a completion of the last request, and so of all before it.
    pub(crate) fn signal_last(&mut self) {
        if let Some(last) = self.count.checked_sub(1) {
            self.requests[last].send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
    }

    /// Posts what it has and is empty then. On failure it says how many were posted all the same.
    pub(crate) fn post(&mut self, pair: &QueuePair) -> Result<(), (usize, io::Error)> {
        let count = std::mem::take(&mut self.count);
        let (requests, elements) = (self.requests.as_mut_ptr(), self.elements.as_mut_ptr());
        for at in 0..count {
            // SAFETY: `count` requests and `max_sge` elements for each are inside the two boxes.
            unsafe {
                let request = requests.add(at);
                (*request).sg_list = elements.add(at * self.max_sge);
                (*request).next = if at + 1 < count { request.add(1) } else { null_mut() };
            }
        }
        let mut bad = null_mut();
        if count == 0 {
            return Ok(());
        }
        // SAFETY: the queue pair is live; requests and elements are read during the call only. What the
        // device may do with memory is bounded by the regions behind the elements.
        check(unsafe { inline::post_send(pair.as_raw().as_ptr(), requests, &mut bad) }).map_err(|source| {
            let posted = (bad.addr().wrapping_sub(requests.addr())) / size_of::<ffi::ibv_send_wr>();
            (posted.min(count), source)
        })
    }
}

/// Receives to be posted with one call.
pub(crate) struct RecvBatch {
    requests: Box<[ffi::ibv_recv_wr]>,
    elements: Box<[ffi::ibv_sge]>,
    max_sge: usize,
    count: usize,
}

// SAFETY: as for `SendBatch`.
unsafe impl Send for RecvBatch {}
// SAFETY: as for `SendBatch`.
unsafe impl Sync for RecvBatch {}

impl RecvBatch {
    /// Room for so many receives, of so many elements each.
    pub(crate) fn new(requests: usize, max_sge: usize) -> Self {
        Self {
            requests: vec![ffi::ibv_recv_wr::default(); requests].into(),
            elements: vec![ffi::ibv_sge::default(); requests * max_sge].into(),
            max_sge,
            count: 0,
        }
    }

    /// Adds a receive; there must be room. As `SendBatch::push`.
    #[inline]
    pub(crate) fn push<'s>(&mut self, wr_id: u64, elements: impl Iterator<Item = Sge<'s>>) -> u64 {
        let at = self.count * self.max_sge;
        let (mut used, mut bytes) = (0, 0);
        for (place, element) in self.elements[at..at + self.max_sge].iter_mut().zip(elements) {
            *place = element.raw();
            bytes += u64::from(element.len());
            used += 1;
        }
        self.requests[self.count] = ffi::ibv_recv_wr { wr_id, num_sge: used, ..Default::default() };
        self.count += 1;
        bytes
    }

    /// Posts what it has and is empty then. On failure it says how many were posted all the same.
    pub(crate) fn post(&mut self, pair: &QueuePair) -> Result<(), (usize, io::Error)> {
        let count = std::mem::take(&mut self.count);
        let (requests, elements) = (self.requests.as_mut_ptr(), self.elements.as_mut_ptr());
        for at in 0..count {
            // SAFETY: as in `SendBatch::post`.
            unsafe {
                let request = requests.add(at);
                (*request).sg_list = elements.add(at * self.max_sge);
                (*request).next = if at + 1 < count { request.add(1) } else { null_mut() };
            }
        }
        let mut bad = null_mut();
        if count == 0 {
            return Ok(());
        }
        // SAFETY: as in `SendBatch::post`.
        check(unsafe { inline::post_recv(pair.as_raw().as_ptr(), requests, &mut bad) }).map_err(|source| {
            let posted = (bad.addr().wrapping_sub(requests.addr())) / size_of::<ffi::ibv_recv_wr>();
            (posted.min(count), source)
        })
    }
}
