//! Numbers for allocations of HSA, which has none of its own.
//!
//! HSA calls a function when memory is freed, before its addresses can be allocated again. So an address has a number
//! from its first look-up until the memory there is freed.

use std::ffi::c_void;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use super::Api;

static NUMBERS: LazyLock<Mutex<Numbers>> = LazyLock::new(Mutex::default);

#[derive(Default)]
struct Numbers {
    last: u64,
    of: FxHashMap<u64, u64>,
}

fn numbers() -> MutexGuard<'static, Numbers> {
    NUMBERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of the allocation from `base`; `None` if HSA would not report its end.
pub(super) fn number(api: &Api, base: u64) -> Option<u64> {
    let number = {
        let mut numbers = numbers();
        if let Some(number) = numbers.of.get(&base) {
            return Some(*number);
        }
        numbers.last += 1;
        let number = numbers.last;
        numbers.of.insert(base, number);
        number
    };
    // Without the lock, which `released` takes.
    if api.on_release(base, released) {
        return Some(number);
    }
    numbers().of.remove(&base);
    None
}

/// HSA may free memory without a call when it shuts down, so every allocation gets a new number.
pub(super) fn forget() {
    numbers().of.clear();
}

extern "C" fn released(address: *mut c_void, _: *mut c_void) {
    numbers().of.remove(&(address.addr() as u64));
}
