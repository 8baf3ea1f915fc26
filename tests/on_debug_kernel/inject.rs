//! The kernel's fault injection, for the allocations of this thread.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// Which allocations fail.
#[derive(Clone, Copy)]
pub struct Injection {
    nth: u32,
    percent: u32,
}

impl Injection {
    /// The `nth` one, from 1.
    pub fn nth(nth: u32) -> Self {
        prepare();
        Self { nth, percent: 0 }
    }

    /// Each one with this probability.
    pub fn probability(percent: u32) -> Self {
        prepare();
        Self { nth: 0, percent }
    }

    /// Runs `action` on this thread, with failing allocations.
    pub fn during<T>(self, action: impl FnOnce() -> T) -> T {
        for cause in CAUSES {
            set(&format!("{cause}/probability"), self.percent);
        }
        let open = |file| {
            let path = format!("/proc/thread-self/{file}");
            File::options().read(true).write(true).open(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
        };
        // Opened before: opening allocates too.
        let (random, counted) = (open("make-it-fail"), open("fail-nth"));
        random.write_all_at(if self.percent > 0 { b"1" } else { b"0" }, 0).expect("make-it-fail");
        counted.write_all_at(self.nth.to_string().as_bytes(), 0).expect("fail-nth");
        let answer = action();
        let mut left = [0; 16];
        let length = counted.read_at(&mut left, 0).expect("fail-nth");
        counted.write_all_at(b"0", 0).expect("fail-nth");
        random.write_all_at(b"0", 0).expect("make-it-fail");
        // The count stands at 0 once the failure has happened.
        LEFT.set(String::from_utf8_lossy(&left[..length]).trim().parse().expect("a number"));
        answer
    }
}

thread_local! {
    static LEFT: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// Whether the last call of this thread had its nth failure.
pub fn happened() -> bool {
    LEFT.get() == 0
}

/// Slab objects, and pages.
const CAUSES: [&str; 2] = ["failslab", "fail_page_alloc"];

fn prepare() {
    for cause in CAUSES {
        for (option, value) in [("times", "-1"), ("interval", "1"), ("space", "0"), ("verbose", "0")] {
            set(&format!("{cause}/{option}"), value);
        }
        set(&format!("{cause}/task-filter"), "Y");
        // Also allocations that may wait: most do.
        set(&format!("{cause}/ignore-gfp-wait"), "N");
    }
    set("fail_page_alloc/min-order", 0);
}

fn set(option: &str, value: impl ToString) {
    write(&format!("/sys/kernel/debug/{option}"), value);
}

fn write(path: &str, value: impl ToString) {
    fs::write(path, value.to_string()).unwrap_or_else(|error| panic!("{path}: {error}"));
}
