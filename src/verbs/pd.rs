//! A protection domain: what keys and queue pairs belong to.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as ffi;

use super::{Context, check};
use crate::Result;
use crate::observe;

/// A protection domain. Clones are the same object, freed with the last of them.
#[derive(Clone)]
pub struct ProtectionDomain {
    inner: Arc<Inner>,
}

struct Inner {
    raw: NonNull<ffi::ibv_pd>,
    owned: bool,
    /// The process that allocated it, as forks are counted.
    generation: u32,
    // Dropped after the domain was freed.
    context: Context,
}

// SAFETY: libibverbs protection domains may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // In a child of `fork` it is the parent's to free.
        if !self.owned || self.generation != observe::generation() {
            return;
        }
        // SAFETY: the domain is ours, and everything made in it held this object and is gone.
        if let Err(error) = check(unsafe { ffi::ibv_dealloc_pd(self.raw.as_ptr()) }) {
            tracing::warn!(device = self.context.device_name(), %error, "cannot free a protection domain");
        }
    }
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProtectionDomain")
            .field("device", &self.context().device_name())
            .field("handle", &self.handle())
            .finish()
    }
}

impl ProtectionDomain {
    /// Allocates a protection domain.
    ///
    /// # Errors
    /// [`Error::Verbs`](crate::Error::Verbs): `ENOMEM` when the device has no more.
    #[doc(alias = "ibv_alloc_pd")]
    pub fn new(context: &Context) -> Result<Self> {
        // SAFETY: the context is open.
        let raw = unsafe { ffi::ibv_alloc_pd(context.as_raw().as_ptr()) };
        let Some(raw) = NonNull::new(raw) else {
            let source = io::Error::last_os_error();
            return Err(context.failed("allocate a protection domain")(source));
        };
        Ok(Self {
            inner: Arc::new(Inner {
                raw,
                owned: true,
                generation: observe::generation(),
                context: context.clone(),
            }),
        })
    }

    /// Wraps a protection domain that another library allocated. It is never freed here.
    ///
    /// # Safety
    /// `raw` is a live `ibv_pd` of an open context, and both stay so as long as a clone of the result,
    /// or anything made of one, lives.
    pub unsafe fn from_raw(raw: NonNull<ffi::ibv_pd>) -> Self {
        // SAFETY: a live domain points to its open context, says the caller.
        let context = unsafe {
            let context = NonNull::new((*raw.as_ptr()).context).expect("an ibv_pd has a context");
            Context::from_raw(context)
        };
        Self { inner: Arc::new(Inner { raw, owned: false, generation: observe::generation(), context }) }
    }

    /// The libibverbs object, for use with other libraries. It stays this object's to free.
    #[inline]
    pub fn as_raw(&self) -> NonNull<ffi::ibv_pd> {
        self.inner.raw
    }

    /// The context it belongs to.
    pub fn context(&self) -> &Context {
        &self.inner.context
    }

    /// Where it lies: equal for clones, and nobody else's as long as one lives.
    #[inline]
    pub(crate) fn address(&self) -> u64 {
        Arc::as_ptr(&self.inner).addr() as u64
    }

    /// The kernel's handle of the domain.
    pub(crate) fn handle(&self) -> u32 {
        // SAFETY: the domain is live as long as `self` is.
        unsafe { (*self.inner.raw.as_ptr()).handle }
    }
}
