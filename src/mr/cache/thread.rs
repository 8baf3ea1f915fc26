//! A number for each thread, so that each counts in a place of its own.

use std::cell::Cell;
use std::sync::Mutex;

/// Places to count in. The first is for all threads that have none of their own.
pub(super) const PLACES: usize = 16;

/// A thread that has not asked yet.
const UNKNOWN: usize = usize::MAX;

thread_local! {
    // Two, because one without a destructor is read by one instruction, and lives as long as the thread.
    static PLACE: Cell<usize> = const { Cell::new(UNKNOWN) };
    static LEASE: Lease = Lease::take();
}

/// Places that no thread has. The lock also orders what one thread counted before what its successor does.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
static NEVER_USED: Mutex<usize> = Mutex::new(1);

/// A place of one thread's own, given back when the thread ends.
struct Lease(usize);

impl Lease {
    fn take() -> Self {
        let freed = FREE.lock().unwrap_or_else(|poison| poison.into_inner()).pop();
        let place = freed.unwrap_or_else(|| {
            let mut next = NEVER_USED.lock().unwrap_or_else(|poison| poison.into_inner());
            if *next == PLACES {
                return 0;
            }
            *next += 1;
            *next - 1
        });
        PLACE.set(place);
        Self(place)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Handles that are dropped from here on, by other destructors of this thread, count in common.
        PLACE.set(0);
        if self.0 != 0 {
            FREE.lock().unwrap_or_else(|poison| poison.into_inner()).push(self.0);
        }
    }
}

/// This thread's place: 0 is shared, others are its own.
#[inline(always)]
pub(super) fn place() -> usize {
    let place = PLACE.get();
    if place < PLACES { place } else { first_time() }
}

#[cold]
fn first_time() -> usize {
    // Where the thread is ending already there is no lease any more.
    LEASE.try_with(|lease| lease.0).unwrap_or_else(|_| {
        PLACE.set(0);
        0
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Barrier;

    #[test]
    fn threads_at_one_time_share_only_the_first_place() {
        let barrier = Barrier::new(2 * PLACES);
        let places: Vec<usize> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2 * PLACES)
                .map(|_| {
                    scope.spawn(|| {
                        let mine = place();
                        barrier.wait();
                        assert_eq!(place(), mine);
                        mine
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let own: Vec<_> = places.iter().filter(|place| **place != 0).collect();
        assert_eq!(own.iter().collect::<HashSet<_>>().len(), own.len());
        assert!(places.contains(&0) && !own.is_empty());
    }
}
