//! Handles: numbers that C holds as pointers to incomplete types.
//!
//! A handle is the index of a slot in a table and the slot's generation, which each use of the slot raises. So a handle that
//! was released, or that never was one, is refused, and no pointer that C passes as a handle is ever followed. Slots are never
//! freed, and one whose generations are used up is not used again.
//!
//! `unsafe` is here because a look-up takes no lock and counts nothing: a call costs two loads for each handle, and the
//! caller's reference keeps the object. With a mutex around the free slots instead of the stack, a new handle and its release
//! cost 18 ns more (`cargo xtask bench c`, on one core of a busy server).

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ptr::without_provenance_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use dmabuf_rdma::ErrorKind;

use crate::status::{Failed, Result};

/// A type of C that stands for objects of a type of Rust.
pub trait Handle: Sized + 'static {
    type Object: Send + Sync + 'static;
    /// Its name in C.
    const NAME: &'static str;
    /// Distinguishes it from other types: 1 to 15.
    const TAG: u64;

    fn table() -> &'static Table<Self::Object>;
}

/// Names the types of C, with their tags and the types of Rust behind them.
macro_rules! handles {
    ($($tag:literal $name:ident: $object:ty;)*) => {
        $(impl $crate::handle::Handle for $name {
            type Object = $object;
            const NAME: &'static str = stringify!($name);
            const TAG: u64 = $tag;

            fn table() -> &'static $crate::handle::Table<$object> {
                static TABLE: $crate::handle::Table<$object> = $crate::handle::Table::new();
                &TABLE
            }
        })*

        /// The name of the type with this tag.
        pub fn name_of(tag: u64) -> Option<&'static str> {
            match tag {
                $($tag => Some(stringify!($name)),)*
                _ => None,
            }
        }

        /// Number of handles that are not released.
        pub fn live() -> usize {
            [$(<$name as $crate::handle::Handle>::table().live()),*].iter().sum()
        }
    };
}

/// Bits of a handle, from the lowest: the tag, the index, the generation.
const TAG_BITS: u32 = 4;
const INDEX_BITS: u32 = 28;
/// No address of a process has its highest bit set, so a pointer is never taken for a handle.
const FIRST_GENERATION: u32 = 1 << 31;

/// Segment `k` of a table has `FIRST_SEGMENT << k` slots, so that slots stay where they are when a table grows.
const FIRST_SEGMENT: usize = 64;
const SEGMENTS: usize = INDEX_BITS as usize - FIRST_SEGMENT.trailing_zeros() as usize;

struct Slot<T> {
    /// The generation in the upper half, and the number of references in the lower.
    state: AtomicU64,
    /// The next free slot while this one is free: its index and 1, or 0.
    next: AtomicU32,
    /// Initialized while there are references.
    object: UnsafeCell<MaybeUninit<T>>,
}

/// The objects of one type.
pub struct Table<T> {
    segments: [OnceLock<Box<[Slot<T>]>>; SEGMENTS],
    /// A stack of free slots: the index of the first and 1, or 0, in the lower half. The upper half counts changes, so that
    /// whoever was interrupted does not take the stack for the same when its first slot was taken and came back.
    free: AtomicU64,
    /// Number of slots that were ever used.
    used: AtomicU32,
}

// SAFETY: an object is moved in before its first reference exists, moved out after the last is gone, and shared in between,
// which `T: Send + Sync` permits on any thread.
unsafe impl<T: Send + Sync> Sync for Table<T> {}

const fn state(generation: u32, references: u32) -> u64 {
    (generation as u64) << 32 | references as u64
}

const fn generation(state: u64) -> u32 {
    (state >> 32) as u32
}

const fn references(state: u64) -> u32 {
    state as u32
}

/// The segment of an index, and the position in it.
#[inline]
fn place(index: u32) -> (usize, usize) {
    let number = index as usize + FIRST_SEGMENT;
    let segment = (number / FIRST_SEGMENT).ilog2() as usize;
    (segment, number - (FIRST_SEGMENT << segment))
}

impl<T> Table<T> {
    pub const fn new() -> Self {
        Self {
            segments: [const { OnceLock::new() }; SEGMENTS],
            free: AtomicU64::new(0),
            used: AtomicU32::new(0),
        }
    }

    /// Number of objects, by looking at each slot.
    pub fn live(&self) -> usize {
        let slots = (0..self.used.load(Ordering::Acquire)).filter_map(|index| self.slot(index));
        slots.filter(|slot| references(slot.state.load(Ordering::Relaxed)) > 0).count()
    }

    /// Sets the generation of a free slot.
    #[cfg(test)]
    pub fn skip_to(&self, index: u32, generation: u32) {
        self.slot(index).expect("a slot that was used").state.store(state(generation, 0), Ordering::Relaxed);
    }

    #[inline]
    fn slot(&self, index: u32) -> Option<&Slot<T>> {
        let (segment, at) = place(index);
        self.segments.get(segment)?.get()?.get(at)
    }

    /// Takes a free slot.
    #[inline]
    fn take(&self) -> Option<(u32, &Slot<T>)> {
        let mut top = self.free.load(Ordering::Acquire);
        while let Some(index) = (top as u32).checked_sub(1) {
            let slot = self.slot(index).expect("a free slot was used before");
            let next = changed(top, slot.next.load(Ordering::Relaxed));
            match self.free.compare_exchange_weak(top, next, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some((index, slot)),
                Err(now) => top = now,
            }
        }
        self.grow()
    }

    /// Takes a slot that was never used.
    #[cold]
    fn grow(&self) -> Option<(u32, &Slot<T>)> {
        let more = |used: u32| used.checked_add(1).filter(|used| *used < 1 << INDEX_BITS);
        let index = self.used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more).ok()?;
        let (segment, at) = place(index);
        let slots = self.segments.get(segment)?.get_or_init(|| {
            let empty = || Slot {
                state: AtomicU64::new(state(FIRST_GENERATION, 0)),
                next: AtomicU32::new(0),
                object: UnsafeCell::new(MaybeUninit::uninit()),
            };
            (0..FIRST_SEGMENT << segment).map(|_| empty()).collect()
        });
        Some((index, &slots[at]))
    }

    /// Gives a slot back, unless its generations are used up.
    #[inline]
    fn give(&self, index: u32, slot: &Slot<T>, generation: u32) {
        let next = generation.checked_add(1);
        slot.state.store(state(next.unwrap_or(0), 0), Ordering::Relaxed);
        if next.is_none() {
            return;
        }
        let mut top = self.free.load(Ordering::Relaxed);
        loop {
            slot.next.store(top as u32, Ordering::Relaxed);
            let first = changed(top, index + 1);
            match self.free.compare_exchange_weak(top, first, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }
}

/// The stack with another first slot.
fn changed(top: u64, first: u32) -> u64 {
    (top >> 32).wrapping_add(1) << 32 | u64::from(first)
}

/// A new handle with one reference.
#[inline]
pub fn new<H: Handle>(object: H::Object) -> Result<*mut H> {
    let Some((index, slot)) = H::table().take() else {
        return Err(Failed::new(
            ErrorKind::Limit,
            format!("there are 2^{INDEX_BITS} handles of type {}", H::NAME),
        ));
    };
    let generation = generation(slot.state.load(Ordering::Relaxed));
    // SAFETY: the slot was free, so nobody else uses its object.
    unsafe { (*slot.object.get()).write(object) };
    slot.state.store(state(generation, 1), Ordering::Release);
    let number = u64::from(generation) << 32 | u64::from(index) << TAG_BITS | H::TAG;
    Ok(without_provenance_mut(number as usize))
}

/// The slot of a handle with its index and the generation that it must have.
#[inline]
fn find<H: Handle>(handle: *const H) -> Result<(u32, u32, &'static Slot<H::Object>)> {
    let number = handle.addr() as u64;
    let (tag, index) = (number & ((1 << TAG_BITS) - 1), number as u32 >> TAG_BITS);
    let known = tag == H::TAG && generation(number) >= FIRST_GENERATION;
    match known.then(|| H::table().slot(index)).flatten() {
        Some(slot) => Ok((index, generation(number), slot)),
        None => Err(refused(handle)),
    }
}

#[cold]
fn refused<H: Handle>(handle: *const H) -> Failed {
    let (number, name) = (handle.addr() as u64, H::NAME);
    if number == 0 {
        return Failed::misuse(format!("the {name} is NULL"));
    }
    let other = crate::name_of(number & ((1 << TAG_BITS) - 1));
    match other.filter(|_| generation(number) >= FIRST_GENERATION) {
        Some(other) if other != name => Failed::misuse(format!("a {other} was passed as a {name}")),
        Some(_) => Failed::misuse(format!("the {name} was released")),
        None => Failed::misuse(format!("the {name} is none: {number:#x} was not returned by this library")),
    }
}

/// The object of a handle.
///
/// # Safety
/// The handle has a reference that nobody releases while the result is used.
#[inline]
pub unsafe fn get<'a, H: Handle>(handle: *const H) -> Result<&'a H::Object> {
    let (_, generation, slot) = find(handle)?;
    let now = slot.state.load(Ordering::Acquire);
    if self::generation(now) != generation || references(now) == 0 {
        return Err(refused(handle));
    }
    // SAFETY: there are references, so the object is initialized; the caller has one of them.
    Ok(unsafe { (*slot.object.get()).assume_init_ref() })
}

/// Takes another reference.
pub fn reference<H: Handle>(handle: *const H) -> Result<()> {
    change(handle, |references| references.checked_add(1)).map(drop)
}

/// Releases a reference; nothing for NULL. With the last one the object is dropped.
pub fn release<H: Handle>(handle: *const H) -> Result<()> {
    if handle.is_null() {
        return Ok(());
    }
    if change(handle, |references| references.checked_sub(1))? > 1 {
        return Ok(());
    }
    let (index, generation, slot) = find(handle)?;
    // SAFETY: this was the last reference, and none can be taken while there are none. So nobody else uses the object.
    let object = unsafe { (*slot.object.get()).assume_init_read() };
    H::table().give(index, slot, generation);
    drop(object);
    Ok(())
}

/// Changes the number of references, and returns the previous one.
#[inline]
fn change<H: Handle>(handle: *const H, change: impl Fn(u32) -> Option<u32>) -> Result<u32> {
    let (_, generation, slot) = find(handle)?;
    let update = |now: u64| {
        let live = self::generation(now) == generation && references(now) > 0;
        live.then(|| change(references(now)).map(|references| state(generation, references))).flatten()
    };
    match slot.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, update) {
        Ok(before) => Ok(references(before)),
        Err(now) if self::generation(now) == generation && references(now) == u32::MAX => {
            Err(Failed::new(ErrorKind::Limit, format!("the {} has {} references", H::NAME, u32::MAX)))
        }
        Err(_) => Err(refused(handle)),
    }
}
