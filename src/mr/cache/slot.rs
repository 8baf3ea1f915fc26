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
use super::thread::{PLACES, own, place};
use crate::dmabuf::DmaBuf;
use crate::mr::{Access, MemoryRegion};
use crate::verbs::ProtectionDomain;

/// What an entry is found by. The buffer's device number is left out, since all dma-bufs are of one file
/// system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub inode: u64,
    pub size: u64,
    /// Address of the domain, which an entry holds, so that no other can have it meanwhile.
    pub domain: u64,
    /// Access flags, and above them whether the descriptor may write: a read-only one finds no entry that
    /// may.
    pub access: u64,
}

impl Key {
    #[inline(always)]
    pub(super) fn of(domain: &ProtectionDomain, buffer: &DmaBuf, access: Access) -> Self {
        Self {
            inode: buffer.id().inode(),
            size: buffer.size(),
            domain: domain.address(),
            access: u64::from(access.bits()) | u64::from(buffer.is_writable()) << 32,
        }
    }

    #[inline(always)]
    pub(super) fn hash(&self) -> u64 {
        // Inode numbers count up, and the others differ in few bits. The upper bits are used.
        (self.inode ^ self.domain).wrapping_add(self.access).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// Low bits of `state`; the others count how often the slot was used.
const PHASE: u64 = 3;
/// An entry: handles may be taken.
const LIVE: u64 = 0;
/// In the pool, or being filled.
const FREE: u64 = 1;
/// Still an entry, and its cache looks whether it may go. No handle is taken meanwhile.
const PROBED: u64 = 2;
/// No entry any more; whoever drops the last handle empties the slot.
const RETIRED: u64 = 3;

/// What a count goes up by. An addition of 1 becomes an instruction that keeps a flag of the one before it,
/// for which an emulated processor has to work out what that was.
const STEP: u64 = 2;

/// One thread's counts, on a line of its own (and its neighbour, which processors fetch along).
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
    inode: AtomicU64,
    size: AtomicU64,
    domain: AtomicU64,
    access: AtomicU64,
    start: AtomicU64,
    length: AtomicU64,
    /// The cache's clock when it was last used.
    stamp: AtomicU64,
    counts: [Counts; PLACES],
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

impl Slot {
    /// An empty slot, with this region; not found by anybody before `publish`. The caller has a handle.
    pub(super) fn with(
        region: MemoryRegion,
        key: &Key,
        (start, length): (u64, u64),
        stamp: u64,
    ) -> &'static Self {
        let pooled = POOL.lock().unwrap_or_else(|poison| poison.into_inner()).pop();
        let slot = pooled.unwrap_or_else(|| Box::leak(Box::new(Self::new())));
        // SAFETY: the slot is from the pool or new, so nobody else has it, and it is not live.
        unsafe { *slot.region.get() = Some(region) };
        // Release, for who compares with these what is not the same entry any more: a new value tells it
        // that the state has changed, too.
        slot.inode.store(key.inode, Ordering::Release);
        slot.size.store(key.size, Ordering::Release);
        slot.domain.store(key.domain, Ordering::Release);
        slot.access.store(key.access, Ordering::Release);
        slot.start.store(start, Ordering::Release);
        slot.length.store(length, Ordering::Release);
        slot.stamp.store(stamp, Ordering::Release);
        slot.take();
        slot
    }

    const fn new() -> Self {
        Self {
            state: AtomicU64::new(FREE),
            inode: AtomicU64::new(0),
            size: AtomicU64::new(0),
            domain: AtomicU64::new(0),
            access: AtomicU64::new(0),
            start: AtomicU64::new(0),
            length: AtomicU64::new(0),
            stamp: AtomicU64::new(0),
            counts: [const { Counts::new() }; PLACES],
            region: UnsafeCell::new(None),
        }
    }

    /// From here on the entry is found; or never, and it goes with the caller's handle.
    pub(super) fn publish(&self, live: bool) {
        let phase = if live { LIVE } else { RETIRED };
        let state = self.state.load(Ordering::Relaxed);
        self.state.store((state & !PHASE) | phase, Ordering::Release);
    }

    pub(super) fn key(&self) -> Key {
        let read = |word: &AtomicU64| word.load(Ordering::Acquire);
        Key {
            inode: read(&self.inode),
            size: read(&self.size),
            domain: read(&self.domain),
            access: read(&self.access),
        }
    }

    /// Takes a handle if this is an entry of that key that covers the range, and was used as late as
    /// `now`; by a thread that counts in a place of its own, and with as few branches as can be. `None`
    /// says that `take_if` is to be asked.
    #[inline(always)]
    pub(super) fn take_at_once(&self, key: &Key, offset: u64, length: u64, now: u64) -> Option<()> {
        let counter = &self.counts[own()?].taken;
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(STEP), Ordering::Release);
        barrier::light();
        let state = self.state.load(Ordering::Acquire);
        // Counted, and live: it is this entry as long as the count stands. Its inode tells the size.
        let differs = (state & PHASE)
            | (self.inode.load(Ordering::Acquire) ^ key.inode)
            | (self.domain.load(Ordering::Acquire) ^ key.domain)
            | (self.access.load(Ordering::Acquire) ^ key.access)
            | (self.stamp.load(Ordering::Relaxed) ^ now);
        let inside = offset.wrapping_sub(self.start.load(Ordering::Acquire));
        let whole = self.length.load(Ordering::Acquire);
        // Before the start `inside` is larger than any length. So is a length of 0 less 1: not covered.
        let outside =
            u64::from(inside >= whole) | u64::from(length.wrapping_sub(1) >= whole.wrapping_sub(inside));
        if opaque(differs) | opaque(outside) == 0 {
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
        let live = self.state.load(Ordering::Acquire) & PHASE == LIVE;
        let start = self.start.load(Ordering::Acquire);
        let (inside, whole) = (offset.wrapping_sub(start), self.length.load(Ordering::Acquire));
        live && self.key() == *key && inside < whole && length.wrapping_sub(1) < whole - inside
    }

    #[cold]
    #[inline(never)]
    fn take_back(&self) {
        self.count(|counts| &counts.no_hits);
        self.give_back();
    }

    /// One more handle for who has one.
    pub(super) fn take(&self) {
        self.count(|counts| &counts.no_hits);
        self.count(|counts| &counts.taken);
    }

    /// One handle less; the last one of a retired entry empties it.
    #[inline(always)]
    pub(super) fn give_back(&self) {
        self.count(|counts| &counts.returned);
        let state = self.state.load(Ordering::Acquire);
        if state & PHASE == RETIRED {
            self.empty_if_drained();
        }
    }

    /// Adds one step in this thread's place, before whatever is read after it.
    #[inline(always)]
    fn count(&self, which: impl Fn(&Counts) -> &AtomicU64) {
        if let Some(place) = own() {
            let counter = which(&self.counts[place]);
            // Nobody else writes it. Release: what was done under a handle comes before its return.
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(STEP), Ordering::Release);
            barrier::light();
        } else {
            self.count_otherwise(&which);
        }
    }

    #[cold]
    #[inline(never)]
    fn count_otherwise(&self, which: &dyn Fn(&Counts) -> &AtomicU64) {
        which(&self.counts[place()]).fetch_add(STEP, Ordering::AcqRel);
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
        let state = self.state.load(Ordering::Relaxed);
        debug_assert_eq!(state & PHASE, LIVE);
        self.state.store((state & !PHASE) | PROBED, Ordering::SeqCst);
        barrier::heavy();
        let unused = self.is_drained();
        self.state.store((state & !PHASE) | if unused { RETIRED } else { LIVE }, Ordering::SeqCst);
        unused
    }

    /// Ends the entry; it goes with its last handle. The caller calls `empty_if_drained` afterwards, in
    /// case there is none. Only its cache calls this, once.
    pub(super) fn retire(&self) {
        let state = self.state.load(Ordering::Relaxed);
        debug_assert_eq!(state & PHASE, LIVE);
        self.state.store((state & !PHASE) | RETIRED, Ordering::SeqCst);
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
        let next = (state & !PHASE).wrapping_add(PHASE + 1) | FREE;
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
