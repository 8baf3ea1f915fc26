//! A number for each thread, so that each counts in a place of its own.

use std::cell::Cell;
use std::sync::Mutex;

use super::barrier;

/// Places to count in. The first is for all threads that have none of their own.
pub(crate) const PLACES: usize = 16;

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
        barrier::prepare();
        if !barrier::by_kernel() {
            PLACE.set(0);
            return Self(0);
        }
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

/// A place that no other thread writes; `None` for a thread that shares the first, or has not asked yet.
#[inline(always)]
pub(crate) fn own() -> Option<usize> {
    let place = PLACE.get();
    (place.wrapping_sub(1) < PLACES - 1).then_some(place)
}

/// This thread's place: 0 is shared, others are its own.
#[cold]
pub(crate) fn place() -> usize {
    match PLACE.get() {
        // Where the thread is ending already there is no lease any more.
        UNKNOWN => LEASE.try_with(|lease| lease.0).unwrap_or_else(|_| {
            PLACE.set(0);
            0
        }),
        place => place,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Barrier;

    #[test]
    fn threads_at_one_time_share_only_the_first_place() {
        barrier::prepare();
        let barrier = Barrier::new(2 * PLACES);
        let places: Vec<usize> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2 * PLACES)
                .map(|_| {
                    scope.spawn(|| {
                        let mine = place();
                        barrier.wait();
                        assert_eq!((place(), own().unwrap_or(0)), (mine, mine));
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
