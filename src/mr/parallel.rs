//! Work that many threads share.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Most threads by default. A registration waits for memory more than it computes, and a kernel that
/// serialises what is behind a device gains nothing by more.
const MOST: usize = 8;

/// Threads where the caller named no number: one for each processor that we may use, 8 at most.
pub(super) fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get).min(MOST)
}

/// Calls `work` with each number below `count`, on up to `threads` threads, of which the caller's is one.
/// Once it answers false no further call begins.
pub(super) fn each(count: usize, threads: usize, work: impl Fn(usize) -> bool + Sync) {
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = || {
        while !stopped.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                break;
            }
            if !work(at) {
                stopped.store(true, Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            // A thread that cannot be had leaves its share to the others.
            if thread::Builder::new().name("dmabuf-rdma".into()).spawn_scoped(scope, run).is_err() {
                break;
            }
        }
        run();
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn each_number_is_worked_on_once() {
        for threads in [0, 1, 3, 100] {
            let seen = Mutex::new(Vec::new());
            each(50, threads, |at| {
                seen.lock().unwrap().push(at);
                true
            });
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..50), "{threads} threads");
        }
    }

    #[test]
    fn nothing_begins_after_a_stop() {
        let calls = AtomicUsize::new(0);
        each(1000, 1, |at| {
            calls.fetch_add(1, Ordering::Relaxed);
            at < 6
        });
        assert_eq!(calls.into_inner(), 7);
    }
}
