//! Registering and deregistering a dma-buf: this library against `register.c`, which does the same two ioctls
//! and nothing else.
//!
//! What makes the two comparable:
//! - The C is compiled with -O2 and runs in this process, on the same context, protection domain and dma-buf,
//!   with the same range, iova and access. As a separate process it would be a worse measure: two processes
//!   of this C differed by up to 5% over a hundred turns, since each turn begins with a switch of address
//!   space.
//! - The two take turns in pairs, A B then B A, within milliseconds, on one processor. Each times only its
//!   loop. Each warms the caches with one registration first, unless a registration goes through more memory
//!   than the caches hold.
//! - Ratio and difference are medians over the pairs, since a load on the machine that outlasts a pair slows
//!   both sides of it. The C against itself gave 0.999 to 1.004, on a machine with four times as much to do
//!   as it has processors.
//!
//! The library does all its checks and tries its paths as usual. Values are for a registration with its
//! deregistration.
//!
//! `scale/` measures sets against one region, parallel against serial registration, and the cost of a GiB. An
//! argument chooses a part: `pairs`, `sets`, `cost`. The cache has a benchmark of its own, `cargo xtask bench
//! cache`.
//!
//! Needs an RDMA device `rxe0` that imports dma-bufs, and the dma-heap `system`. Rows go to stdout, and as
//! lines of JSON to the file named by `BENCH_ROWS`.

#[path = "common/mod.rs"]
mod common;
#[path = "scale/mod.rs"]
mod scale;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{Pair, Peer, Processors, Result, Rows, Spread, pairs, stay_on_one_processor};
use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::{DmaHeap, Exporter};
use dmabuf_rdma::mr::{Access, MemoryRegion, Path};
use dmabuf_rdma::verbs::{Device, ProtectionDomain};

const DEVICE: &str = "rxe0";
const GOAL: &str = "ratio <= 1.02";

/// A size to measure.
struct Case {
    name: &'static str,
    size: u64,
    /// Registrations in one loop: enough that reading the clock does not count, few enough that most
    /// pairs are not interrupted.
    times: u64,
    /// Loops of each side, for some seconds.
    pairs: usize,
    goal: Option<&'static str>,
}

const CASES: [Case; 4] = [
    Case { name: "4 KiB", size: 4 << 10, times: 4, pairs: 6001, goal: None },
    Case { name: "1 MiB", size: 1 << 20, times: 4, pairs: 6001, goal: Some(GOAL) },
    Case { name: "256 MiB", size: 256 << 20, times: 1, pairs: 2001, goal: Some(GOAL) },
    Case { name: "1 GiB", size: 1 << 30, times: 1, pairs: 601, goal: Some(GOAL) },
];

fn main() -> Result<()> {
    // cargo's own arguments begin with dashes.
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |part: &str| chosen.is_empty() || chosen.iter().any(|word| word == part);
    let processors = Processors::allowed()?;
    let domain = ProtectionDomain::new(&Device::by_name(DEVICE)?.open()?)?;
    let mut rows = Rows::new()?;
    if wanted("pairs") {
        stay_on_one_processor()?;
        against_c(&mut rows, &domain)?;
        processors.all()?;
    }
    if wanted("sets") {
        scale::sets::run(&mut rows, &domain)?;
    }
    if wanted("cost") {
        scale::cost::run(&mut rows, &domain)?;
    }
    Ok(())
}

fn against_c(rows: &mut Rows, domain: &ProtectionDomain) -> Result<()> {
    let heap = DmaHeap::open("system")?;
    for case in &CASES {
        let buffer = heap.allocate(case.size)?.dmabuf;
        let sides = Sides { domain, buffer: &buffer };
        let library = || timed(case.times, |times| sides.library(times));
        let bare = || timed(case.times, |times| sides.bare(times));
        let pairs = pairs(case.pairs, library, bare)?;
        let over = |value: fn(&Pair) -> f64| Spread::of(pairs.iter().map(value));
        let row = format!("register+deregister {}", case.name);
        rows.add(&row, "us", over(|pair| pair.library), Some(Peer::of(&pairs)), case.goal)?;
        if case.goal.is_none() {
            let row = format!("overhead at {}", case.name);
            rows.add(&row, "us", over(|pair| pair.library - pair.bare), None, None)?;
        }
    }
    Ok(())
}

/// Microseconds per registration.
fn timed(times: u64, run: impl Fn(u64) -> Result<Duration>) -> Result<f64> {
    if times > 1 {
        run(1)?;
    }
    Ok(run(times)?.as_nanos() as f64 / 1e3 / times as f64)
}

/// The domain and the buffer of both sides.
struct Sides<'a> {
    domain: &'a ProtectionDomain,
    buffer: &'a DmaBuf,
}

impl Sides<'_> {
    const ACCESS: Access = Access::LOCAL_WRITE.union(Access::REMOTE_WRITE).union(Access::REMOTE_READ);

    fn library(&self, times: u64) -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..times {
            let region = MemoryRegion::builder(self.domain, self.buffer).access(Self::ACCESS).register()?;
            debug_assert_eq!(region.path(), Path::Uverbs);
            region.deregister()?;
        }
        Ok(start.elapsed())
    }

    fn bare(&self, times: u64) -> Result<Duration> {
        let pd = self.domain.as_raw().as_ptr().cast();
        let (buffer, length, access) = (self.buffer.as_fd(), self.buffer.size(), Self::ACCESS.bits());
        // SAFETY: the borrowed domain outlives the call, and rxe0 is soft-RoCE.
        Ok(unsafe { bench_bare::register(pd, buffer, length, access, times)? })
    }
}
