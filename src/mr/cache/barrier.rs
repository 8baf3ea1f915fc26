//! A memory barrier that costs the frequent side nothing.
//!
//! Who takes or drops a handle writes a counter and then reads a state; who retires an entry writes the
//! state and then reads the counters. Each must see the other's write or be seen. That takes a full
//! barrier on both sides, which is most of what a hit costs, or membarrier(2) on the rare side, which
//! runs one on every other thread of the process.
//!
//! `unsafe` is here for that system call, which has no wrapper in libc.

use std::ffi::c_int;
use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence, fence};

// linux/membarrier.h
const GLOBAL: c_int = 1;
const PRIVATE_EXPEDITED: c_int = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: c_int = 1 << 4;

/// Whether `heavy` reaches every thread, so that `light` will do for threads that count by themselves. Set
/// before the first of them does, and never cleared.
static BY_KERNEL: AtomicBool = AtomicBool::new(false);

fn membarrier(command: c_int) -> io::Result<()> {
    // SAFETY: takes three numbers and touches no memory of ours.
    match unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Called before an entry is made.
pub(super) fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Refused only by a filter of system calls: then both sides have their own barrier.
        BY_KERNEL.store(membarrier(REGISTER_PRIVATE_EXPEDITED).is_ok(), Ordering::SeqCst);
    });
}

/// Whether threads may go without a barrier of their own.
pub(super) fn by_kernel() -> bool {
    BY_KERNEL.load(Ordering::SeqCst)
}

/// Between the write and the read of the frequent side, where `by_kernel`: nothing but the order of the
/// two in the program.
#[inline(always)]
pub(super) fn light() {
    compiler_fence(Ordering::SeqCst);
}

/// The same of threads that share a place, or of all.
pub(super) fn full() {
    fence(Ordering::SeqCst);
}

/// Between the write and the read of the rare side.
pub(super) fn heavy() {
    fence(Ordering::SeqCst);
    if by_kernel() {
        // A child of `fork` may have to register anew. A filter that came later leaves the slow one.
        membarrier(PRIVATE_EXPEDITED)
            .or_else(|_| membarrier(REGISTER_PRIVATE_EXPEDITED).and_then(|()| membarrier(PRIVATE_EXPEDITED)))
            .or_else(|_| membarrier(GLOBAL))
            .expect("the kernel did membarrier before");
    }
    fence(Ordering::SeqCst);
}
