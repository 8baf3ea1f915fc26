//! A shared receive queue: receives that several queue pairs take from.
//!
//! `unsafe` is here to pass C structs to libibverbs.

use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use ibverbs_sys as ffi;

use super::error::{Error, Result};
use super::{ProtectionDomain, check};
use crate::observe::Process;

/// A shared receive queue. Clones share one `ibv_srq`; dropping the last one destroys it.
#[derive(Clone)]
pub(crate) struct SharedReceiveQueue {
    inner: Arc<Inner>,
}

struct Inner {
    raw: NonNull<ffi::ibv_srq>,
    creator: Process,
    // Last, so that it is dropped after the queue is destroyed.
    domain: ProtectionDomain,
}

// SAFETY: libibverbs shared receive queues may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.creator.is_current() {
            return;
        }
        // SAFETY: the queue is ours. The queue pairs that took from it held this object and are gone.
        if let Err(error) = check(unsafe { ffi::ibv_destroy_srq(self.raw.as_ptr()) }) {
            let device = self.domain.context().device_name();
            tracing::warn!(device, %error, "cannot destroy a shared receive queue");
        }
    }
}

impl SharedReceiveQueue {
    /// Creates a queue for `depth` receives of at most one element each.
    ///
    /// # Errors
    /// - [`Error::Device`]: `EINVAL` for a depth of 0 or above the device's `max_srq_wr`; `ENOMEM`.
    /// - [`Error::Unavailable`] (`EOPNOTSUPP`): the device has none.
    pub(crate) fn new(domain: &ProtectionDomain, depth: u32) -> Result<Self> {
        let context = domain.context();
        let attr = ffi::ibv_srq_attr { max_wr: depth, max_sge: 1, srq_limit: 0 };
        let mut init = ffi::ibv_srq_init_attr { srq_context: null_mut(), attr };
        // SAFETY: the domain is live, and the new queue holds it.
        let raw = unsafe { ffi::ibv_create_srq(domain.as_raw().as_ptr(), &mut init) };
        let Some(raw) = NonNull::new(raw) else {
            let source = io::Error::last_os_error();
            if matches!(source.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) {
                return Err(Error::Unavailable {
                    device: context.device_name().into(),
                    operation: "shared receive queues, from which notifications are received",
                    needs: "a NIC and a driver with them (efa has none)",
                    source: Some(source.into()),
                });
            }
            let operation = format!("create a shared receive queue of {depth} receives");
            return Err(context.failed(operation)(source));
        };
        Ok(Self { inner: Arc::new(Inner { raw, creator: Process::current(), domain: domain.clone() }) })
    }

    /// The kernel's handle of the queue.
    pub(crate) fn handle(&self) -> u32 {
        // SAFETY: the queue is live while `self` is.
        unsafe { (*self.inner.raw.as_ptr()).handle }
    }

    pub(super) fn as_raw(&self) -> NonNull<ffi::ibv_srq> {
        self.inner.raw
    }
}
