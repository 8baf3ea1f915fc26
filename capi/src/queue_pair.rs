//! Work requests on a queue pair of the caller's.
//!
//! `unsafe` is here for what C passes; see the crate.

use std::ptr::NonNull;

use dmabuf_rdma::verbs::{Operation, QueuePair, WorkRequest};
use dmabuf_rdma::{RegionSlice, RemoteSlice};
use ibverbs_sys::ibv_qp;

use crate::arguments::store;
use crate::handle::{self, get};
use crate::region::drdma_region;
use crate::remote::drdma_remote;
use crate::status::{Failed, Result, call, drdma_status};

/// A queue pair of the caller's, for work requests with regions. The caller connects it and polls its completion queues.
#[allow(non_camel_case_types)]
pub struct drdma_queue_pair(());

/// Uses a reliable connected (RC) queue pair of the caller's. It is never destroyed here; it and its context must outlive the
/// new handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_queue_pair_from_qp(
    qp: *mut ibv_qp,
    queue_pair: *mut *mut drdma_queue_pair,
) -> drdma_status {
    call(|| {
        let qp = NonNull::new(qp).ok_or_else(|| Failed::misuse("the ibv_qp is NULL"))?;
        // SAFETY: the header's rules for places, and this function's for the queue pair.
        unsafe { store(queue_pair, || Ok(QueuePair::from_raw(qp)?)) }
    })
}

/// Posts one signaled work request. The elements are those of the region.
fn post(pair: &QueuePair, local: &RegionSlice, operation: Operation, wr_id: u64) -> Result<()> {
    Ok(pair.post(WorkRequest::new(wr_id, operation, &local.sges()).signaled())?)
}

fn same_length(local: &RegionSlice, remote: &RemoteSlice) -> Result<()> {
    match (local.len(), remote.len()) {
        (here, there) if here == there => Ok(()),
        (here, there) => {
            Err(Failed::misuse(format!("the region has {here} bytes, and the peer's memory {there}")))
        }
    }
}

/// Posts one signaled work request that writes a region into the peer's memory. The completion has `wr_id`, in the send queue's
/// completion queue. Until then the caller holds the region: this handle does not. Memory of several registrations at the peer,
/// and more elements than the queue pair takes, are refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_queue_pair_write(
    queue_pair: *mut drdma_queue_pair,
    local: *mut drdma_region,
    remote: *mut drdma_remote,
    wr_id: u64,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles.
        let (pair, local, remote) = unsafe { (get(queue_pair)?, get(local)?, get(remote)?) };
        same_length(local, remote)?;
        post(pair, local, Operation::Write { remote: remote.addr()? }, wr_id)
    })
}

/// As drdma_queue_pair_write(), but reads the peer's memory into a region, which needs DRDMA_LOCAL_WRITE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_queue_pair_read(
    queue_pair: *mut drdma_queue_pair,
    local: *mut drdma_region,
    remote: *mut drdma_remote,
    wr_id: u64,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles.
        let (pair, local, remote) = unsafe { (get(queue_pair)?, get(local)?, get(remote)?) };
        same_length(local, remote)?;
        post(pair, local, Operation::Read { remote: remote.addr()? }, wr_id)
    })
}

/// Posts one signaled work request that sends a region's bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_queue_pair_send(
    queue_pair: *mut drdma_queue_pair,
    local: *mut drdma_region,
    wr_id: u64,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles.
        let (pair, local) = unsafe { (get(queue_pair)?, get(local)?) };
        post(pair, local, Operation::Send, wr_id)
    })
}

/// Posts a receive into a region, which needs DRDMA_LOCAL_WRITE. The completion has `wr_id`, in the receive queue's completion
/// queue.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_queue_pair_recv(
    queue_pair: *mut drdma_queue_pair,
    local: *mut drdma_region,
    wr_id: u64,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles.
        let (pair, local) = unsafe { (get(queue_pair)?, get(local)?) };
        Ok(pair.post_recv(wr_id, &local.sges())?)
    })
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_queue_pair_ref(queue_pair: *mut drdma_queue_pair) -> drdma_status {
    call(|| handle::reference(queue_pair))
}

/// Releases a reference; NULL does nothing. The queue pair itself stays the caller's.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_queue_pair_unref(queue_pair: *mut drdma_queue_pair) -> drdma_status {
    call(|| handle::release(queue_pair))
}
