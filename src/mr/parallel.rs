//! Runs numbered jobs on several threads.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Maximum number of threads by default. A registration is bound by memory, and a kernel that serializes the
/// registrations of a device gains nothing from more.
const MAX_THREADS: usize = 8;

/// The default number of threads: one for each CPU that this process may use, at most 8.
pub(super) fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS)
}

/// Calls `work` with each number below `count`, on at most `threads` threads including the caller's. Once
/// `work` returns false, no further call starts.
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
            // If a thread cannot be created, the others do its share.
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
    fn nothing_starts_after_a_stop() {
        let calls = AtomicUsize::new(0);
        each(1000, 1, |at| {
            calls.fetch_add(1, Ordering::Relaxed);
            at < 6
        });
        assert_eq!(calls.into_inner(), 7);
    }
}
