//! Counts the objects that a test must not leak.

use std::fs;
use std::time::{Duration, Instant};

use super::system::run;

/// Counts of this process's descriptors, and of memory regions and dma-bufs in the whole guest.
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

    /// Fails if any count differs. Waits up to 10 s first: the kernel releases the objects of a killed
    /// process with a delay.
    #[track_caller]
    pub fn assert_unchanged(&self) {
        let end = Instant::now() + Duration::from_secs(10);
        while Self::take() != *self && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(Self::take(), *self, "counts after the test (left) and before it (right) differ");
    }
}

/// Open descriptors of this process.
pub fn fds() -> usize {
    // Every count includes the descriptor of the listing itself.
    fs::read_dir("/proc/self/fd").expect("/proc/self/fd").count()
}

/// Memory regions of all processes, as the kernel's resource tracking lists them.
pub fn regions() -> usize {
    run("rdma", &["resource", "show", "mr"]).lines().count()
}

/// dma-bufs of the whole system.
pub fn dma_bufs() -> usize {
    let path = "/sys/kernel/debug/dma_buf/bufinfo";
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}; mount debugfs"));
    let total = text.lines().rev().find_map(|line| line.strip_prefix("Total ")).expect("a total in bufinfo");
    total.split(' ').next().and_then(|count| count.parse().ok()).expect("a number of objects")
}
