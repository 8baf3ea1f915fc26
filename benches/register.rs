//! Registering and deregistering a dma-buf: this library against a bare C program that does the same
//! two ioctls and nothing else, `register.c`.
//!
//! What makes the two comparable:
//! - The C is compiled with -O2 by the C compiler and runs in this process, on the same context,
//!   protection domain and dma-buf, with the same range, iova and access. In a process of its own it
//!   would be the same code and a worse measure: two such processes, both of this C, differed by up to
//!   5% over a hundred turns, since each turn begins with a switch of address space.
//! - They take turns in pairs, A B then B A, within milliseconds, on one processor. Each times only its
//!   loop, having done the same once before for what the other left in the caches.
//! - The ratio and the difference are medians over the pairs, not of the two medians: what slows the
//!   machine for longer than a pair slows both of it. Measured so, the C against itself gave 0.999 to
//!   1.004 on a machine with four times more to do than processors.
//!
//! The library goes its usual way, with all its checks and paths. The values are per registration with
//! its deregistration.
//!
//! Needs an RDMA device `rxe0` that imports dma-bufs, and the dma-heap `system`. Rows go to stdout and,
//! as lines of JSON, into the file that `BENCH_ROWS` names.

use std::env;
use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::{DmaHeap, Exporter};
use dmabuf_rdma::mr::{Access, MemoryRegion, Path};
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const DEVICE: &str = "rxe0";
const GOAL: &str = "ratio <= 1.02";

/// A size to measure.
struct Case {
    name: &'static str,
    size: u64,
    /// Registrations in one loop: enough that reading the clock does not count, few enough that most
    /// pairs are over before anything interrupts.
    times: u64,
    /// Loops of each side: as many as pass in some seconds.
    pairs: usize,
    goal: Option<&'static str>,
}

const CASES: [Case; 4] = [
    Case { name: "4 KiB", size: 4 << 10, times: 4, pairs: 6001, goal: None },
    Case { name: "1 MiB", size: 1 << 20, times: 4, pairs: 6001, goal: Some(GOAL) },
    Case { name: "256 MiB", size: 256 << 20, times: 1, pairs: 501, goal: Some(GOAL) },
    Case { name: "1 GiB", size: 1 << 30, times: 1, pairs: 201, goal: Some(GOAL) },
];

fn main() -> Result<()> {
    stay_on_one_processor()?;
    let domain = ProtectionDomain::new(&Device::by_name(DEVICE)?.open()?)?;
    let heap = DmaHeap::open("system")?;
    let mut rows = Rows::new()?;
    for case in &CASES {
        let buffer = heap.allocate(case.size)?.dmabuf;
        let pairs = measure(case, &Sides { domain: &domain, buffer: &buffer })?;
        let over = |value: fn(&Pair) -> f64| Spread::of(pairs.iter().map(value));
        let ratio = over(|pair| pair.library / pair.bare).median;
        let peer = Peer { value: over(|pair| pair.bare).median, ratio };
        let row = format!("register+deregister {}", case.name);
        rows.add(&row, over(|pair| pair.library), Some(peer), case.goal)?;
        if case.goal.is_none() {
            let row = format!("overhead at {}", case.name);
            rows.add(&row, over(|pair| pair.library - pair.bare), None, None)?;
        }
    }
    Ok(())
}

/// On the highest processor that we may use, since the lowest have the interrupts.
fn stay_on_one_processor() -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let last = (0..CpuSet::count()).rev().find(|&cpu| allowed.is_set(cpu) == Ok(true));
    let mut one = CpuSet::new();
    one.set(last.ok_or("no processor to run on")?)?;
    Ok(sched_setaffinity(this, &one)?)
}

/// Microseconds a registration on either side, in one pair.
struct Pair {
    library: f64,
    bare: f64,
}

fn measure(case: &Case, sides: &Sides<'_>) -> Result<Vec<Pair>> {
    let library = || timed(case.times, |times| sides.library(times));
    let bare = || timed(case.times, |times| sides.bare(times));
    // Once for nothing: what is looked up, allocated and loaded only once.
    library()?;
    bare()?;
    let pair = |at| {
        if at % 2 == 0 {
            let library = library()?;
            Ok(Pair { library, bare: bare()? })
        } else {
            let bare = bare()?;
            Ok(Pair { library: library()?, bare })
        }
    };
    (0..case.pairs).map(pair).collect()
}

fn timed(times: u64, run: impl Fn(u64) -> Result<Duration>) -> Result<f64> {
    run(1)?;
    Ok(run(times)?.as_nanos() as f64 / 1e3 / times as f64)
}

/// What both sides work on.
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
        // SAFETY: the domain lives as long as it is borrowed, and rxe0 is soft-RoCE.
        Ok(unsafe { bench_bare::register(pd, buffer, length, access, times)? })
    }
}

#[derive(Clone, Copy)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    /// Of an odd number of values, so that one of them is the median.
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.collect();
        values.sort_by(f64::total_cmp);
        Self { min: values[0], median: values[values.len() / 2], max: values[values.len() - 1] }
    }
}

struct Peer {
    value: f64,
    ratio: f64,
}

struct Rows(Option<File>);

impl Rows {
    fn new() -> Result<Self> {
        Ok(Self(env::var_os("BENCH_ROWS").map(File::create).transpose()?))
    }

    fn add(&mut self, row: &str, us: Spread, peer: Option<Peer>, goal: Option<&str>) -> Result<()> {
        let Spread { min, median, max } = us;
        print!("{row:<28} {median:>9.2} us ({min:.2} to {max:.2})");
        match &peer {
            Some(Peer { value, ratio }) => println!(", bare C {value:.2} us, ratio {ratio:.4}"),
            None => println!(),
        }
        if let Some(file) = &mut self.0 {
            let (peer, ratio) = peer.map(|peer| (peer.value, peer.ratio)).unzip();
            let line = json!({
                "row": row, "value": median, "unit": "us", "min": min, "max": max,
                "peer_value": peer, "ratio": ratio, "goal": goal,
            });
            writeln!(file, "{line}")?;
        }
        Ok(())
    }
}
