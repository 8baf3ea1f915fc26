//! Detects a child of `fork`. The child has copies of its parent's objects and must not destroy the kernel's
//! objects behind them, which belong to the parent.
//!
//! `unsafe` is here to register a fork handler.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// Number of forks between the first process and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// The process that created an object of the kernel or of a library. The object's owner has it as a field, and
/// its drop does nothing in a child of that process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process(u32);

impl Process {
    /// This process. Its forks count from the first call on.
    pub(crate) fn current() -> Self {
        count_forks();
        Self(GENERATION.load(Ordering::Relaxed))
    }

    /// False in a child of the process.
    pub(crate) fn is_current(self) -> bool {
        self.0 == GENERATION.load(Ordering::Relaxed)
    }
}

fn count_forks() {
    static ONCE: Once = Once::new();
    extern "C" fn in_the_child() {
        GENERATION.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler takes no argument and is async-signal-safe: one atomic addition.
    // After ENOMEM, the only failure, forks go unnoticed.
    ONCE.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_the_child));
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Whether `action` returned true in a child of this process. It may allocate and free, but not panic.
    pub(crate) fn in_a_child(action: impl FnOnce() -> bool) -> bool {
        // SAFETY: glibc permits the child to allocate and free. It ends by `_exit`.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let code = if action() { 0 } else { 1 };
            // SAFETY: the call takes a number and does not return.
            unsafe { libc::_exit(code) };
        }
        let mut status = -1;
        // SAFETY: `status` is a local variable.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        status == 0
    }

    #[test]
    fn only_the_creating_process_is_current() {
        let process = Process::current();
        assert!(process.is_current());
        assert!(in_a_child(|| !process.is_current() && Process::current().is_current()));
        assert!(process.is_current());
    }
}
