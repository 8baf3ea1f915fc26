//! A protection domain.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as ffi;

use super::error::Result;
use super::{Context, check};
use crate::observe::Process;

/// A protection domain: the group of memory regions and queue pairs that work together. Clones share one
/// `ibv_pd`; dropping the last one frees it.
#[derive(Clone)]
#[doc(alias = "ibv_pd")]
pub struct ProtectionDomain {
    inner: Arc<Inner>,
}

/// Identifies the kernel's domain. A parent domain (`ibv_alloc_parent_domain`) is the domain that it extends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DomainId {
    /// Address of the `ibv_context`, only compared.
    context: usize,
    handle: u32,
}

impl DomainId {
    /// # Safety
    /// `raw` points to a live `ibv_pd`.
    pub(super) unsafe fn of(raw: NonNull<ffi::ibv_pd>) -> Self {
        // SAFETY: the caller guarantees a live domain.
        let ffi::ibv_pd { context, handle } = unsafe { *raw.as_ptr() };
        Self { context: context.addr(), handle }
    }
}

struct Inner {
    raw: NonNull<ffi::ibv_pd>,
    /// The process that allocated it; `None` for a domain of another library.
    creator: Option<Process>,
    // Last, so that it is dropped after the domain is freed.
    context: Context,
}

// SAFETY: libibverbs protection domains may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.creator.is_some_and(Process::is_current) {
            return;
        }
        // SAFETY: the domain is ours. Every object in it held this one, so all of them are gone.
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
    /// [`Error::Device`](super::Error::Device): `ENOMEM` if the device has no more.
    #[doc(alias = "ibv_alloc_pd")]
    pub fn new(context: &Context) -> Result<Self> {
        // SAFETY: the context is open.
        let raw = unsafe { ffi::ibv_alloc_pd(context.as_raw().as_ptr()) };
        let Some(raw) = NonNull::new(raw) else {
            let source = io::Error::last_os_error();
            return Err(context.failed("allocate a protection domain")(source));
        };
        Ok(Self::wrap(raw, Some(Process::current()), context.clone()))
    }

    fn wrap(raw: NonNull<ffi::ibv_pd>, creator: Option<Process>, context: Context) -> Self {
        Self { inner: Arc::new(Inner { raw, creator, context }) }
    }

    /// Wraps a protection domain that another library allocated. It is never freed here.
    ///
    /// # Safety
    /// `raw` points to a live `ibv_pd` of an open context. Both stay so while a clone of the result, or any object
    /// created from one, lives. Its provider [locks](super#providers-without-locks), or one thread at a time uses them.
    pub unsafe fn from_raw(raw: NonNull<ffi::ibv_pd>) -> Self {
        // SAFETY: the caller guarantees a live domain, which points to its open context.
        let context = unsafe {
            let context = NonNull::new((*raw.as_ptr()).context).expect("an ibv_pd has a context");
            Context::from_raw(context)
        };
        Self::wrap(raw, None, context)
    }

    /// The libibverbs object, for calls that this crate lacks. Do not free it.
    pub fn as_raw(&self) -> NonNull<ffi::ibv_pd> {
        self.inner.raw
    }

    /// The context of the domain.
    pub fn context(&self) -> &Context {
        &self.inner.context
    }

    /// The kernel's handle of the domain.
    pub(crate) fn handle(&self) -> u32 {
        self.id().handle
    }

    /// Equal for two values that stand for one domain of the kernel's.
    pub(crate) fn id(&self) -> DomainId {
        // SAFETY: the domain is live while `self` is.
        unsafe { DomainId::of(self.inner.raw) }
    }
}
