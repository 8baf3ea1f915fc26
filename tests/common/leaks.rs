//! kmemleak, in the kernel that checks itself.

use std::fs;
use std::path::Path;
use std::time::Duration;

const FILE: &str = "/sys/kernel/debug/kmemleak";

/// Fails if the kernel has lost memory since the last call. Does nothing in a kernel without kmemleak.
#[track_caller]
pub fn assert_none() {
    if !Path::new(FILE).exists() {
        return;
    }
    // An object counts as leaked once it is 5 s old. A second scan finds what pointed to the first ones.
    std::thread::sleep(Duration::from_secs(6));
    for _ in 0..2 {
        fs::write(FILE, "scan").unwrap_or_else(|error| panic!("{FILE}: {error}; has kmemleak given up?"));
    }
    let leaks = fs::read_to_string(FILE).unwrap();
    fs::write(FILE, "clear").unwrap();
    assert!(leaks.is_empty(), "the kernel leaks:\n{leaks}");
}
