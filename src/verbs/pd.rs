//! A protection domain: what keys and queue pairs belong to.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use ibverbs_sys as ffi;

use super::{Context, check};
use crate::Result;
use crate::observe;
use crate::tag::Tag;

/// A protection domain. Clones are the same object, freed with the last of them.
#[derive(Clone)]
pub struct ProtectionDomain {
    inner: Arc<Inner>,
    /// Of its number.
    tag: Tag,
}

struct Inner {
    number: u32,
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

/// What tells a domain from all others that live: numbers that are free again, and how many there ever were.
static NUMBERS: Mutex<(Vec<u32>, u32)> = Mutex::new((Vec::new(), 0));

fn take_number() -> u32 {
    let mut numbers = NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
    numbers.0.pop().unwrap_or_else(|| {
        numbers.1 += 1;
        numbers.1
    })
}

fn give_back(number: u32) {
    NUMBERS.lock().unwrap_or_else(PoisonError::into_inner).0.push(number);
}

impl Drop for Inner {
    fn drop(&mut self) {
        // In a child of `fork` it is the parent's to free.
        if self.generation != observe::generation() {
            return;
        }
        give_back(self.number);
        if !self.owned {
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
        Ok(Self::with(raw, true, context.clone()))
    }

    fn with(raw: NonNull<ffi::ibv_pd>, owned: bool, context: Context) -> Self {
        let number = take_number();
        let inner = Inner { number, raw, owned, generation: observe::generation(), context };
        Self { inner: Arc::new(inner), tag: Tag::of_domain(number) }
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
        Self::with(raw, false, context)
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

    /// Equal for clones, and nobody else's as long as one lives. It has 31 bits, more than domains fit in
    /// any memory.
    pub(crate) fn number(&self) -> u32 {
        self.inner.number
    }

    /// Its part of what a cache compares.
    #[inline(always)]
    pub(crate) fn tag(&self) -> Tag {
        self.tag
    }

    /// The kernel's handle of the domain.
    pub(crate) fn handle(&self) -> u32 {
        // SAFETY: the domain is live as long as `self` is.
        unsafe { (*self.inner.raw.as_ptr()).handle }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_different_as_long_as_they_are_used() {
        let (one, other) = (take_number(), take_number());
        assert_ne!(one, other);
        give_back(one);
        let (again, more) = (take_number(), take_number());
        assert!(again != other && more != other && again != more);
        [other, again, more].into_iter().for_each(give_back);
    }
}
