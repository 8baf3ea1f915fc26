//! Where a cached region lives, and who counts on it.
//!
//! A slot is never freed: it returns to a pool, for this cache or another. So a thread may look at one that
//! it found a moment ago, whatever has become of it since; whether it still is the same entry is for its
//! `state` to say, after the thread has been counted. No count is shared by two threads (`thread`), and no
//! barrier is needed on the way (`barrier`), so that a hit writes nothing that another thread reads.
//!
//! A handle counts in `taken` when it is made and in `returned` when it is dropped, each in the place of the
//! thread that does it. Both only grow. All of `returned` read first and all of `taken` after it, and
//! both alike: then there was a time between at which no handle lived. Once an entry is retired none can
//! come, so it may go.
//!
//! `unsafe` is here for an empty instruction, and because the region is written by whoever fills a slot and read through a shared
//! reference by whoever has a handle.

use std::cell::UnsafeCell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::barrier;
use super::key::Key;
use super::thread::{Counters, NONE, PLACES, here, own, place};
use crate::mr::MemoryRegion;
use crate::tag::Tag;

/// Bits of `state`, of which no more than one is set, where no place has any (`thread`). Those above count
/// how often the slot was used.
const PHASE: u64 = FREE | PROBED | RETIRED;
/// An entry: handles may be taken.
const LIVE: u64 = 0;
/// In the pool, or being filled.
const FREE: u64 = NONE << 1;
/// Still an entry, and its cache looks whether it may go. No handle is taken meanwhile.
const PROBED: u64 = NONE << 2;
/// No entry any more; whoever drops the last handle empties the slot.
const RETIRED: u64 = NONE << 3;
const USE: u64 = NONE << 4;

/// What a count goes up by. An addition of 1 becomes an instruction that keeps a flag of the one before it,
/// for which an emulated processor has to work out what that was.
const STEP: u64 = 2;

/// One thread's counts, on lines of its own.
#[repr(align(128))]
struct Counts {
    taken: AtomicU64,
    returned: AtomicU64,
    /// Of `taken`, those that were no hits.
    no_hits: AtomicU64,
}

impl Counts {
    const fn new() -> Self {
        Self { taken: AtomicU64::new(0), returned: AtomicU64::new(0), no_hits: AtomicU64::new(0) }
    }
}

#[repr(align(128))]
pub(super) struct Slot {
    state: AtomicU64,
    /// The tag of a live entry, where that fits; otherwise 0.
    tag: AtomicU64,
    /// What `tag` is when the entry is live.
    live: AtomicU64,
    inode: AtomicU64,
    size: AtomicU64,
    user: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
    /// The cache's clock when it was last used.
    stamp: AtomicU64,
    counts: Counters<Counts>,
    /// Written by who has the slot from the pool, and by who emptied it; read by who is counted.
    region: UnsafeCell<Option<MemoryRegion>>,
}

// SAFETY: all but `region` is atomic. That is written only while the slot is neither live nor counted on:
// before `publish` by the one who took it from the pool, and in `empty` by the one whose exchange of the
// state succeeded after `is_drained`. Between, it is only read.
unsafe impl Sync for Slot {}

/// A slot that never is an entry, for where there is none.
pub(super) static EMPTY: Slot = Slot::new();

/// Slots of no cache.
static POOL: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

/// The same value, of which the compiler knows nothing: what is combined stays combined, where it would
/// test part after part. A test that nearly never fails is dear only by there being many.
#[inline(always)]
fn opaque(mut value: u64) -> u64 {
    // SAFETY: no instruction at all; the value stays in its register.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) value, options(pure, nomem, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        value = std::hint::black_box(value);
    }
    value
}

/// 0 for `length` bytes that begin `before` bytes behind the start of an entry and `behind` bytes before its
/// end, if they lie in it and are some; otherwise 1. An entry ends below 2^63, as files do.
#[inline(always)]
fn outside(before: u64, behind: u64, length: u64) -> u64 {
    // What would be negative has the top bit: an offset that is not inside, bytes beyond the end, a length
    // of 0 less 1. An offset above 2^63 is outside on one side or the other; a length that large is either
    // longer than what is left or, less 1, as large still.
    (before | behind | behind.wrapping_sub(length) | length.wrapping_sub(1)) >> 63
}

impl Slot {
    /// An empty slot, with this region; not found by anybody before `publish`. The caller has a handle.
    pub(super) fn with(
        region: MemoryRegion,
        (key, tag): (&Key, Tag),
        (start, end): (u64, u64),
        stamp: u64,
    ) -> &'static Self {
        let pooled = POOL.lock().unwrap_or_else(|poison| poison.into_inner()).pop();
        let slot = pooled.unwrap_or_else(|| Box::leak(Box::new(Self::new())));
        // SAFETY: the slot is from the pool or new, so nobody else has it, and it is not live.
        unsafe { *slot.region.get() = Some(region) };
        // Release, for who compares with these what is not the same entry any more: a new value tells it
        // that the state has changed, too.
        slot.live.store(if tag.fits() { tag.word() } else { 0 }, Ordering::Release);
        slot.inode.store(key.inode, Ordering::Release);
        slot.size.store(key.size, Ordering::Release);
        slot.user.store(key.user, Ordering::Release);
        slot.start.store(start, Ordering::Release);
        slot.end.store(end, Ordering::Release);
        slot.stamp.store(stamp, Ordering::Release);
        slot.take();
        slot
    }

    const fn new() -> Self {
        Self {
            state: AtomicU64::new(FREE),
            tag: AtomicU64::new(0),
            live: AtomicU64::new(0),
            inode: AtomicU64::new(0),
            size: AtomicU64::new(0),
            user: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            stamp: AtomicU64::new(0),
            counts: Counters::new([const { Counts::new() }; PLACES + 1]),
            region: UnsafeCell::new(None),
        }
    }

    /// From here on the entry is found; or never, and it goes with the caller's handle.
    pub(super) fn publish(&self, live: bool) {
        self.enter(if live { LIVE } else { RETIRED });
    }

    /// The next phase, for both who compare the tag and who look at the state.
    fn enter(&self, phase: u64) {
        let state = self.state.load(Ordering::Relaxed);
        self.state.store((state & !PHASE) | phase, Ordering::SeqCst);
        let tag = if phase == LIVE { self.live.load(Ordering::Relaxed) } else { 0 };
        self.tag.store(tag, Ordering::SeqCst);
    }

    /// The tag of the entry as long as it is one; 0, which no entry has, where it does not fit.
    pub(super) fn tag_when_live(&self) -> u64 {
        self.live.load(Ordering::Acquire)
    }

    pub(super) fn key(&self) -> Key {
        let read = |word: &AtomicU64| word.load(Ordering::Acquire);
        Key { inode: read(&self.inode), size: read(&self.size), user: read(&self.user) }
    }

    /// Takes a handle if this is an entry of that tag that covers the range; by a thread that counts in a
    /// place of its own, and with as few branches as can be. `None` says that `take_if` is to be asked.
    #[inline(always)]
    pub(super) fn take_at_once(&self, tag: Tag, offset: u64, length: u64) -> Option<()> {
        let here = here();
        let counter = &self.counts.at(here).taken;
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(STEP), Ordering::Release);
        barrier::light();
        // Counted, and live: it is this entry as long as the count stands. Its inode tells the size.
        let differs = (self.tag.load(Ordering::Acquire) ^ tag.word()) | (here.bits() & NONE);
        let before = offset.wrapping_sub(self.start.load(Ordering::Acquire));
        let behind = self.end.load(Ordering::Acquire).wrapping_sub(offset);
        let outside = outside(before, behind, length);
        if opaque(differs) | outside == 0 {
            return Some(());
        }
        self.take_back();
        None
    }

    /// Takes a handle if this is an entry of that key that covers the range.
    pub(super) fn take_if(&self, key: &Key, offset: u64, length: u64) -> bool {
        // Looked at without being counted first, so that a search writes only where it finds.
        if !self.matches(key, offset, length) {
            return false;
        }
        self.count(|counts| &counts.taken);
        // Looked at again, since it may have become another entry.
        if self.matches(key, offset, length) {
            return true;
        }
        self.take_back();
        false
    }

    fn matches(&self, key: &Key, offset: u64, length: u64) -> bool {
        let before = offset.wrapping_sub(self.start.load(Ordering::Acquire));
        let behind = self.end.load(Ordering::Acquire).wrapping_sub(offset);
        self.is_live() && self.key() == *key && outside(before, behind, length) == 0
    }

    /// Whether it is an entry that handles may be taken of.
    pub(super) fn is_live(&self) -> bool {
        self.state.load(Ordering::SeqCst) & PHASE == LIVE
    }

    #[cold]
    #[inline(never)]
    fn take_back(&self) {
        // Otherwise nothing was counted that is ever read.
        if own().is_some() {
            self.count(|counts| &counts.no_hits);
            self.give_back();
        }
    }

    /// One more handle for who has one.
    pub(super) fn take(&self) {
        self.count(|counts| &counts.no_hits);
        self.count(|counts| &counts.taken);
    }

    /// One handle less; the last one of a retired entry empties it.
    #[inline(always)]
    pub(super) fn give_back(&self) {
        let here = here();
        let counter = &self.counts.at(here).returned;
        // Release: what was done under the handle comes before its return.
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(STEP), Ordering::Release);
        barrier::light();
        let state = self.state.load(Ordering::Acquire) | here.bits();
        if state & (RETIRED | NONE) != 0 {
            self.give_back_otherwise();
        }
    }

    #[cold]
    #[inline(never)]
    fn give_back_otherwise(&self) {
        if own().is_none() {
            self.count_in_common(&|counts| &counts.returned);
        }
        self.empty_if_drained();
    }

    /// Adds one step in this thread's place, before whatever is read after it.
    #[inline(always)]
    fn count(&self, which: impl Fn(&Counts) -> &AtomicU64) {
        if own().is_some() {
            let counter = which(self.counts.at(here()));
            // Nobody else writes it.
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(STEP), Ordering::Release);
            barrier::light();
        } else {
            self.count_in_common(&which);
        }
    }

    #[cold]
    #[inline(never)]
    fn count_in_common(&self, which: &dyn Fn(&Counts) -> &AtomicU64) {
        which(self.counts.of(place())).fetch_add(STEP, Ordering::AcqRel);
        barrier::full();
    }

    fn sum(&self, which: impl Fn(&Counts) -> &AtomicU64) -> u64 {
        self.counts.iter().fold(0, |sum, counts| sum.wrapping_add(which(counts).load(Ordering::Acquire)))
    }

    /// Whether no handle lives, at some time during the call. Another may be taken at once unless the
    /// state forbids it.
    fn is_drained(&self) -> bool {
        let returned = self.sum(|counts| &counts.returned);
        returned == self.sum(|counts| &counts.taken)
    }

    /// Whether handles live, as far as can be seen without a barrier.
    pub(super) fn seems_used(&self) -> bool {
        !self.is_drained()
    }

    /// How many handles were taken by hits, ever. Off by those that are being taken.
    pub(super) fn hits(&self) -> i64 {
        let no_hits = self.sum(|counts| &counts.no_hits);
        self.sum(|counts| &counts.taken).wrapping_sub(no_hits) as i64 / STEP as i64
    }

    /// Ends the entry if no handle lives. Only its cache calls this, one call at a time.
    pub(super) fn retire_if_unused(&self) -> bool {
        debug_assert!(self.is_live());
        self.enter(PROBED);
        barrier::heavy();
        let unused = self.is_drained();
        self.enter(if unused { RETIRED } else { LIVE });
        unused
    }

    /// Ends the entry; it goes with its last handle. The caller calls `empty_if_drained` afterwards, in
    /// case there is none. Only its cache calls this, once.
    pub(super) fn retire(&self) {
        debug_assert!(self.is_live());
        self.enter(RETIRED);
    }

    /// Deregisters a retired entry that has no handle, and returns the slot to the pool.
    #[cold]
    #[inline(never)]
    pub(super) fn empty_if_drained(&self) {
        let state = self.state.load(Ordering::Acquire);
        if state & PHASE != RETIRED {
            return;
        }
        // Who took a handle of the live entry is counted by now, or sees that it is retired.
        barrier::heavy();
        if !self.is_drained() {
            return;
        }
        // The next use of the slot has another number. Of several who get here one empties it.
        let next = (state & !PHASE).wrapping_add(USE) | FREE;
        if self.state.compare_exchange(state, next, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return;
        }
        // SAFETY: the entry was retired and had no handle, so none will come, and the exchange above
        // succeeded for this call only.
        let region = unsafe { (*self.region.get()).take() };
        // SAFETY: slots are made by `with` only, which leaks them.
        let slot = unsafe { &*std::ptr::from_ref(self) };
        POOL.lock().unwrap_or_else(|poison| poison.into_inner()).push(slot);
        drop(region);
    }

    /// The region.
    ///
    /// # Safety
    /// The caller has a handle, as long as the result is used.
    pub(super) unsafe fn region(&self) -> &MemoryRegion {
        // SAFETY: with a handle the slot is not emptied, so nobody writes the region.
        let region = unsafe { &*self.region.get() };
        region.as_ref().expect("an entry with a handle has its region")
    }

    pub(super) fn stamp(&self) -> u64 {
        self.stamp.load(Ordering::Relaxed)
    }

    /// Notes when it was used, unless that is known.
    #[inline(always)]
    pub(super) fn touch(&self, now: u64) {
        if self.stamp.load(Ordering::Relaxed) != now {
            self.stamp.store(now, Ordering::Relaxed);
        }
    }
}
