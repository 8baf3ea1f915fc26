//! Finding an entry without a lock.
//!
//! One entry of each hash is looked at first; it is the only one of most. It is put there by who found it in
//! the table, and all go from there when the cache's clock goes on, so that what is found there need not
//! be noted as used.
//!
//! The table of slots is searched from the place that a key's hash gives up to the first empty one. It is
//! written under the cache's lock, one word at a time, while others search it. Who searches may so miss an
//! entry that is being moved, and then asks under the lock; it cannot get a wrong one, since the slot itself
//! is compared.
//!
//! `unsafe` is here for the slots' addresses, which stay valid for ever.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering, fence};

use super::key::Key;
use super::slot::{EMPTY, Slot};
use crate::tag::Tag;

/// Entries that are found at once, at most.
const FIRST: usize = 1024;

pub(super) struct Index {
    /// Never null. In the cache's own memory, and of one size, so that nothing is read to find a place.
    first: [AtomicPtr<Slot>; FIRST],
    table: Box<[AtomicPtr<Slot>]>,
    shift: u32,
}

impl Index {
    /// For at most so many entries, with as much room again.
    pub(super) fn new(entries: usize) -> Self {
        let size = (2 * entries.max(8)).next_power_of_two();
        let table = (0..size).map(|_| AtomicPtr::new(null_mut())).collect();
        let first = std::array::from_fn(|_| AtomicPtr::new(address(Some(&EMPTY))));
        Self { first, table, shift: u64::BITS - size.ilog2() }
    }

    /// The slot that is looked at first, whatever it has.
    #[inline(always)]
    pub(super) fn first(&self, tag: Tag) -> &'static Slot {
        // SAFETY: there are addresses of slots only, which live for ever.
        unsafe { &*self.first[first_place(tag.word())].load(Ordering::Acquire) }
    }

    fn home(&self, key: &Key) -> usize {
        (key.hash() >> self.shift) as usize
    }

    fn at(&self, place: usize) -> Option<&'static Slot> {
        // SAFETY: there are null and addresses of slots only, which live for ever.
        unsafe { self.table[place].load(Ordering::Acquire).as_ref() }
    }

    fn next(&self, place: usize) -> usize {
        (place + 1) & (self.table.len() - 1)
    }

    /// Takes a handle of an entry of that key that covers the range.
    pub(super) fn take(&self, key: &Key, offset: u64, length: u64) -> Option<&'static Slot> {
        let mut place = self.home(key);
        loop {
            let slot = self.at(place)?;
            if slot.take_if(key, offset, length) {
                return Some(slot);
            }
            place = self.next(place);
        }
    }

    /// Under the cache's lock; there is room, as the cache's limit is half of the table.
    pub(super) fn insert(&self, slot: &'static Slot) {
        let mut place = self.home(&slot.key());
        while self.at(place).is_some() {
            place = self.next(place);
        }
        self.set(place, Some(slot));
    }

    /// Has it found at once, if there is room and nothing has happened since it was found: `unchanged`
    /// tells whether the clock still stands. The caller has a handle of it.
    pub(super) fn put_first(&self, slot: &'static Slot, unchanged: impl FnOnce() -> bool) {
        let tag = slot.tag_when_live();
        if tag == 0 {
            return;
        }
        let first = &self.first[first_place(tag)];
        let put = |old, new| {
            first.compare_exchange(
                address(Some(old)),
                address(Some(new)),
                Ordering::SeqCst,
                Ordering::Relaxed,
            )
        };
        if put(&EMPTY, slot).is_err() {
            return;
        }
        // Who retires it or turns the clock does so before it looks here; or this sees it, and takes it
        // away again. Meanwhile nobody takes a handle of a retired one.
        fence(Ordering::SeqCst);
        if !(slot.is_live() && unchanged()) {
            let _ = put(slot, &EMPTY);
        }
    }

    /// Nothing is found at once any more. Under the cache's lock, when the clock has gone on.
    pub(super) fn forget_first(&self) {
        fence(Ordering::SeqCst);
        self.first.iter().for_each(|first| first.store(address(Some(&EMPTY)), Ordering::Relaxed));
    }

    /// Under the cache's lock, of one that is retired. What lies behind moves up, so that no search ends
    /// before it.
    pub(super) fn remove(&self, slot: &'static Slot) {
        fence(Ordering::SeqCst);
        let _ = self.first[first_place(slot.tag_when_live())].compare_exchange(
            address(Some(slot)),
            address(Some(&EMPTY)),
            Ordering::SeqCst,
            Ordering::Relaxed,
        );
        let mut hole = self.home(&slot.key());
        while !std::ptr::eq(self.at(hole).expect("an entry is in the table"), slot) {
            hole = self.next(hole);
        }
        let mut place = hole;
        loop {
            place = self.next(place);
            let Some(moved) = self.at(place) else { break };
            let mask = self.table.len() - 1;
            let from_home = place.wrapping_sub(self.home(&moved.key())) & mask;
            if from_home >= place.wrapping_sub(hole) & mask {
                self.set(hole, Some(moved));
                hole = place;
            }
        }
        self.set(hole, None);
    }

    fn set(&self, place: usize, slot: Option<&'static Slot>) {
        self.table[place].store(address(slot), Ordering::Release);
    }
}

#[inline(always)]
fn first_place(tag: u64) -> usize {
    (tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - FIRST.ilog2())) as usize
}

fn address(slot: Option<&'static Slot>) -> *mut Slot {
    slot.map_or(null_mut(), |slot| std::ptr::from_ref(slot).cast_mut())
}
