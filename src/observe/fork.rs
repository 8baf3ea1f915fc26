//! Which process this is: a child of `fork` has copies of its parent's objects, and must not destroy
//! what they stand for in the kernel, since that is its parent's.
//!
//! `unsafe` is here to be told of forks.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// Forks between the first process and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// A number that differs in a child and its parent.
#[inline]
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// From here on forks are counted. Called when a device is opened.
pub(crate) fn watch_forks() {
    static ONCE: Once = Once::new();
    extern "C" fn in_the_child() {
        GENERATION.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the function takes nothing and does what may be done after a fork: one atomic addition.
    // ENOMEM, its only failure, leaves forks unnoticed.
    ONCE.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_the_child));
    });
}
