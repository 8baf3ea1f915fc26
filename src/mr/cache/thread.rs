//! A number for each thread, so that each counts in a place of its own.
//!
//! `unsafe` is here to count without looking at the number first.

use std::cell::Cell;
use std::sync::Mutex;

use super::barrier;

/// Places to count in. The first is for all threads that have none of their own.
pub(crate) const PLACES: usize = 16;

/// Bytes of what is counted in one place: two lines, since processors fetch the neighbour along.
pub(super) const STRIDE: usize = 128;

/// Where a thread counts, as an offset in bytes: a place that no other thread writes, or that behind all.
#[derive(Clone, Copy)]
pub(super) struct Place(usize);

/// The bit that only the place behind all has, and a bit above those of all places.
pub(super) const NONE: u64 = (PLACES * STRIDE) as u64;

impl Place {
    const OF_NOBODY: Self = Self(PLACES * STRIDE);

    #[inline(always)]
    pub(super) fn bits(self) -> u64 {
        self.0 as u64
    }
}

/// What is counted, in each place; and once more, for what is written by threads that have none of their own.
/// That is never read: they find out afterwards, with whatever else may be wrong, and count in common.
pub(super) struct Counters<T>([T; PLACES + 1]);

impl<T> Counters<T> {
    pub(super) const fn new(counters: [T; PLACES + 1]) -> Self {
        assert!(size_of::<T>() == STRIDE);
        Self(counters)
    }

    #[inline(always)]
    pub(super) fn at(&self, place: Place) -> &T {
        // SAFETY: places are made in this file only, as multiples of a counter's size up to `PLACES` times.
        unsafe { &*self.0.as_ptr().byte_add(place.0) }
    }

    /// By what `place` returned.
    pub(super) fn of(&self, place: usize) -> &T {
        &self.0[place]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0[..PLACES].iter()
    }
}

thread_local! {
    // Two, because one without a destructor is read by one instruction, and lives as long as the thread.
    static PLACE: Cell<Place> = const { Cell::new(Place::OF_NOBODY) };
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
        if place != 0 {
            PLACE.set(Place(place * STRIDE));
        }
        Self(place)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Handles that are dropped from here on, by other destructors of this thread, count in common.
        PLACE.set(Place::OF_NOBODY);
        if self.0 != 0 {
            FREE.lock().unwrap_or_else(|poison| poison.into_inner()).push(self.0);
        }
    }
}

/// This thread's place: none before it has asked, nor for one that shares the first.
#[inline(always)]
pub(super) fn here() -> Place {
    PLACE.get()
}

/// A place that no other thread writes; `None` for a thread that shares the first, or has not asked yet.
#[inline(always)]
pub(crate) fn own() -> Option<usize> {
    let place = here().0 / STRIDE;
    (place < PLACES).then_some(place)
}

/// This thread's place: 0 is shared, others are its own.
#[cold]
pub(crate) fn place() -> usize {
    // Where the thread is ending already there is no lease any more.
    LEASE.try_with(|lease| lease.0).unwrap_or(0)
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
