//! The list of runs against C over a scatterlist-like table with entries of 32 bytes, `sg.c`: building,
//! block iteration, lookup, and the best page size.
//!
//! Both work in this process on the same addresses and take turns, A B then B A; the ratio is the median
//! over the pairs. Each builds afresh every time, in memory that malloc keeps; one row is of memory fresh
//! from the kernel, which is faulted in page by page.
//! Lookup is measured with independent offsets, which the processor overlaps, and with each waiting for
//! the one before; the C has a binary search over a table of offsets, where the kernel walks.
//!
//! Needs no device. Rows go to stdout and, as lines of JSON, into the file that `BENCH_ROWS` names.

#[path = "common/mod.rs"]
mod common;

use std::hint::black_box;

use bench_bare::Scatterlist;
use common::{Pair, Peer, Result, Rows, Spread, pairs, stay_on_one_processor};
use dma_sg::{DmaSg, DmaSgList, Iova, PageSizes};
use nix::time::ClockId;

const PAGE: u64 = 4096;
const PAGES: u64 = 1 << 20;
const PAIRS: usize = 31;
const LOOKUPS: usize = 1 << 16;
const AGAINST_C: &str = "ratio <= 1.0";

fn main() -> Result<()> {
    stay_on_one_processor()?;
    let mut rows = Rows::new()?;
    // Every other page, in any order: no two are neighbours.
    let mut scattered: Vec<_> = (0..PAGES).map(|i| 2 * i * PAGE).collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for at in (1..scattered.len()).rev() {
        scattered.swap(at, random.below(at as u64 + 1) as usize);
    }
    let contiguous: Vec<_> = (0..PAGES).map(|i| (1 << 32) + i * PAGE).collect();

    keep_memory(false);
    let fresh = build(&scattered)?;
    let time = Spread::of(fresh.iter().map(|pair| pair.library));
    let row = "build, scattered, fresh memory, a page";
    rows.add(row, "ns", time, Some(Peer::of(&fresh)), Some(AGAINST_C))?;
    keep_memory(true);
    show(&mut rows, "build, scattered, a page", "value <= 4", &build(&scattered)?)?;
    show(&mut rows, "build, contiguous, a page", "value <= 1", &build(&contiguous)?)?;
    show(&mut rows, "blocks, contiguous, a block", "value <= 1", &blocks(&contiguous)?)?;
    // What the machine asks for it: a run lies anywhere in 16 MiB.
    rows.add("one random read of 16 MiB", "ns", random_read(&mut random)?, None, None)?;
    show(&mut rows, "lookup, 1 Mi runs", "value <= 60", &lookup(&scattered, &mut random)?)?;
    // At best the read above, and what it waits for.
    let waiting = chain(&scattered, &mut random)?;
    let time = Spread::of(waiting.iter().map(|pair| pair.library));
    rows.add("lookup in a chain, 1 Mi runs", "ns", time, Some(Peer::of(&waiting)), Some(AGAINST_C))?;
    // The same for a run of a short list as for one of a long list: linear.
    let short = &scattered[..scattered.len() / 16];
    show(&mut rows, "best page size, 64 Ki runs, a run", "value <= 4", &best_page_size(short)?)?;
    show(&mut rows, "best page size, 1 Mi runs, a run", "value <= 4", &best_page_size(&scattered)?)?;
    Ok(())
}

/// A row with the time, and one with what the C took.
fn show(rows: &mut Rows, row: &str, goal: &str, pairs: &[Pair]) -> Result<()> {
    let time = Spread::of(pairs.iter().map(|pair| pair.library));
    rows.add(row, "ns", time, None, Some(goal))?;
    rows.add(&format!("{row}: against C"), "ns", time, Some(Peer::of(pairs)), Some(AGAINST_C))
}

/// Nanoseconds of this thread's processor time for one of `n`: not what others had of the processor. What
/// the loop returns is kept alive past the clock.
fn timed<T>(n: usize, run: impl FnOnce() -> T) -> f64 {
    let now = || {
        let now = ClockId::CLOCK_THREAD_CPUTIME_ID.now().expect("every Linux has this clock");
        now.tv_sec() * 1_000_000_000 + now.tv_nsec()
    };
    let start = now();
    let made = black_box(run());
    let took = now() - start;
    drop(made);
    took as f64 / n as f64
}

/// Has malloc keep what is given back, or not: what the kernel takes to map and clear fresh pages is a
/// measure of the kernel.
fn keep_memory(keep: bool) {
    let (mapped, trimmed) = if keep { (i32::MAX, i32::MAX) } else { (128 << 10, 128 << 10) };
    // SAFETY: mallopt takes two numbers, and no other thread allocates.
    let accepted = unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, mapped) & libc::mallopt(libc::M_TRIM_THRESHOLD, trimmed)
    };
    assert_eq!(accepted, 1, "glibc's malloc");
}

fn list(pages: &[u64]) -> Result<DmaSgList> {
    Ok(DmaSgList::from_runs(pages.iter().map(|&addr| DmaSg { addr, len: PAGE }))?)
}

fn table(pages: &[u64]) -> Result<Scatterlist> {
    Ok(Scatterlist::build(pages, PAGE as u32).ok_or("no memory")?)
}

fn build(pages: &[u64]) -> Result<Vec<Pair>> {
    let n = pages.len();
    assert_eq!(list(pages)?.total_len(), n as u64 * PAGE);
    let library = || Ok(timed(n, || list(black_box(pages)).map_err(drop)));
    let bare = || Ok(timed(n, || table(black_box(pages)).map_err(drop)));
    pairs(PAIRS, library, bare)
}

fn blocks(pages: &[u64]) -> Result<Vec<Pair>> {
    let (list, table) = (list(pages)?, table(pages)?);
    let n = pages.len();
    let start = Iova(pages[0]);
    let mut filled = [0; 512];
    let library = || {
        Ok(timed(n, || {
            let blocks = black_box(&list).blocks(PAGE, start).expect("aligned");
            assert_eq!(blocks.len(), n);
            for (at, block) in blocks.enumerate() {
                filled[at % 512] = block;
            }
            black_box(&mut filled);
        }))
    };
    let mut filled = [0; 512];
    let bare = || Ok(timed(n, || assert_eq!(black_box(&table).blocks(PAGE, &mut filled), n as u64)));
    pairs(PAIRS, library, bare)
}

/// Each read waiting for the one before.
fn random_read(random: &mut Random) -> Result<Spread> {
    let memory: Vec<[u64; 2]> = (0..PAGES).map(|i| [i * 2, 0]).collect();
    let places: Vec<_> = (0..LOOKUPS).map(|_| random.below(PAGES)).collect();
    let read = || places.iter().fold(0, |before, &at| memory[(at ^ (before & 1)) as usize][0]);
    Ok(Spread::of((0..PAIRS).map(|_| timed(LOOKUPS, read))))
}

/// Offsets at which neither side can be guessed at.
fn offsets(random: &mut Random) -> Vec<u64> {
    (0..LOOKUPS).map(|_| random.below(PAGES * PAGE)).collect()
}

fn lookup(pages: &[u64], random: &mut Random) -> Result<Vec<Pair>> {
    let (list, table, offsets) = (list(pages)?, table(pages)?, offsets(random));
    let starts = table.starts();
    let find = || offsets.iter().fold(0_u64, |sum, &offset| sum.wrapping_add(found(&list, offset)));
    assert_eq!(find(), table.find(&starts, &offsets));
    let library = || Ok(timed(offsets.len(), find));
    let bare = || Ok(timed(offsets.len(), || table.find(&starts, black_box(&offsets))));
    pairs(PAIRS, library, bare)
}

fn chain(pages: &[u64], random: &mut Random) -> Result<Vec<Pair>> {
    let (list, table, offsets) = (list(pages)?, table(pages)?, offsets(random));
    let starts = table.starts();
    let find = || offsets.iter().fold(0_u64, |before, &offset| found(&list, offset ^ (before & 1)));
    assert_eq!(find(), table.find_chain(&starts, &offsets));
    let library = || Ok(timed(offsets.len(), find));
    let bare = || Ok(timed(offsets.len(), || table.find_chain(&starts, black_box(&offsets))));
    pairs(PAIRS, library, bare)
}

fn found(list: &DmaSgList, offset: u64) -> u64 {
    list.run_at(offset).map_or(0, |run| run.addr)
}

fn best_page_size(pages: &[u64]) -> Result<Vec<Pair>> {
    let (list, table) = (list(pages)?, table(pages)?);
    let sizes = PageSizes::of(&[PAGE, 2 << 20, 1 << 30])?;
    assert_eq!(table.best_page_size(sizes.0, 0), PAGE);
    // Long enough for the clock also where the list is short.
    let times = PAGES as usize / pages.len();
    let library = || {
        Ok(timed(PAGES as usize, || {
            for _ in 0..times {
                assert_eq!(black_box(&list).best_page_size(sizes, Iova(0)).ok(), Some(PAGE));
            }
        }))
    };
    let bare = || {
        Ok(timed(PAGES as usize, || {
            for _ in 0..times {
                assert_eq!(black_box(&table).best_page_size(sizes.0, 0), PAGE);
            }
        }))
    };
    pairs(PAIRS, library, bare)
}

/// xorshift64*: the same offsets in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((u128::from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)) * u128::from(limit)) >> 64) as u64
    }
}
