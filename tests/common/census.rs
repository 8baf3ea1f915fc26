//! Counting what a test must not leave behind.

use std::fs;
use std::time::{Duration, Instant};

use super::system::run;

/// Descriptors of this process, and memory regions and dma-bufs of the whole guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Census {
    fds: usize,
    regions: usize,
    dma_bufs: usize,
}

impl Census {
    pub fn take() -> Self {
        Self { fds: fds(), regions: regions(), dma_bufs: dma_bufs() }
    }

    /// Fails unless everything that came since has gone. What the kernel releases behind the last
    /// close, as that of a killed process, is given a moment.
    #[track_caller]
    pub fn assert_unchanged(&self) {
        let end = Instant::now() + Duration::from_secs(10);
        while Self::take() != *self && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(Self::take(), *self, "left behind (second) since the test began (first)");
    }
}

/// Open descriptors of this process.
pub fn fds() -> usize {
    // One is of the listing itself, in every count.
    fs::read_dir("/proc/self/fd").expect("/proc/self/fd").count()
}

/// Memory regions of all processes, as the kernel's resource tracking lists them.
pub fn regions() -> usize {
    run("rdma", &["resource", "show", "mr"]).lines().count()
}

/// dma-bufs of the whole system.
pub fn dma_bufs() -> usize {
    let path = "/sys/kernel/debug/dma_buf/bufinfo";
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e} (is debugfs mounted?)"));
    let total = text.lines().rev().find_map(|line| line.strip_prefix("Total ")).expect("a total in bufinfo");
    total.split(' ').next().and_then(|count| count.parse().ok()).expect("a number of objects")
}
