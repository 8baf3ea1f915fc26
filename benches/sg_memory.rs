//! Where lists come from: a device's view of a buffer against the kernel's own mapping of it (a registration
//! with soft-RoCE), and the pages of host memory against reading /proc/self/pagemap and no more.
//!
//! Both sides take turns in this process, A B then B A; the ratio is the median over the pairs. Needs root,
//! the module dma_sg, and a device that imports dma-bufs: the guest. Rows go to stdout and, as lines of
//! JSON, into the file that `BENCH_ROWS` names.

#[path = "common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Instant;

use common::{Pair, Peer, Result, Rows, Spread, pairs};
use dma_sg::device_view::{DeviceView, DmaDevice};
use dmabuf_rdma::exporter::{Allocation, Backing, DmaHeap, Exporter, PageKind, Udmabuf};
use dmabuf_rdma::mr::MemoryRegion;
use dmabuf_rdma::verbs::{ProtectionDomain, devices};

const SIZE: u64 = 4 << 30;
const PAGE: u64 = 4096;
const PAIRS: usize = 9;

/// As much of the file at once as the library reads, so that neither has the better cache.
const BATCH: usize = 128 << 10;

const VIEW: &str = "ratio <= 1.2";
const PAGEMAP: &str = "ratio <= 1.5";

fn main() -> Result<()> {
    let loaded = Command::new("modprobe").arg("dma_sg").status()?;
    if !loaded.success() {
        return Err("the module dma_sg cannot be loaded; run this by `cargo xtask bench sg`".into());
    }
    fs::write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise")?;
    let device = devices()?.into_iter().next().ok_or("this machine has no RDMA device")?;
    let domain = ProtectionDomain::new(&device.open()?)?;
    let mut rows = Rows::new()?;

    // One after the other: the guest has no room for two.
    show(&mut rows, "view of 4 GiB, dma-heap", VIEW, &view(&domain, &DmaHeap::open("system")?)?)?;
    let huge = Udmabuf::open()?.with_pages(PageKind::Transparent);
    show(&mut rows, "view of 4 GiB, udmabuf of huge pages", VIEW, &view(&domain, &huge)?)?;
    show(&mut rows, "pagemap of 4 GiB, huge pages", PAGEMAP, &pages(&huge)?)?;
    let base = Udmabuf::open()?;
    show(&mut rows, "view of 4 GiB, udmabuf", VIEW, &view(&domain, &base)?)?;
    show(&mut rows, "pagemap of 4 GiB", PAGEMAP, &pages(&base)?)
}

fn show(rows: &mut Rows, row: &str, goal: &str, pairs: &[Pair]) -> Result<()> {
    let time = Spread::of(pairs.iter().map(|pair| pair.library));
    rows.add(row, "ms", time, Some(Peer::of(pairs)), Some(goal))
}

/// Milliseconds, and what the call made is dropped after the clock.
fn timed<T>(run: impl FnOnce() -> Result<T>) -> Result<f64> {
    let start = Instant::now();
    let made = black_box(run()?);
    let took = start.elapsed();
    drop(made);
    Ok(took.as_secs_f64() * 1e3)
}

fn view(domain: &ProtectionDomain, exporter: &dyn Exporter) -> Result<Vec<Pair>> {
    let Allocation { dmabuf, .. } = &exporter.allocate(SIZE)?;
    let library = || {
        timed(|| {
            let view = DeviceView::new(dmabuf, DmaDevice::Untranslated)?;
            let list = view.list()?;
            assert_eq!(list.total_len(), SIZE);
            Ok((view, list))
        })
    };
    let registration = || timed(|| Ok(MemoryRegion::builder(domain, dmabuf).register()?));
    pairs(PAIRS, library, registration)
}

fn pages(exporter: &dyn Exporter) -> Result<Vec<Pair>> {
    let backing = exporter.allocate(SIZE)?.backing.ok_or("a udmabuf has a backing")?;
    let library = || {
        timed(|| {
            let pages = backing.page_list()?;
            assert_eq!(pages.total_len(), SIZE);
            Ok(pages)
        })
    };
    pairs(PAIRS, library, || timed(|| read(&backing)))
}

/// Just the file.
fn read(backing: &Backing) -> Result<u64> {
    let file = File::open("/proc/self/pagemap")?;
    let first = backing.as_ptr().addr() as u64 / PAGE * 8;
    let length = SIZE / PAGE * 8;
    let mut buffer = vec![0; BATCH];
    for offset in (0..length).step_by(BATCH) {
        file.read_exact_at(&mut buffer, first + offset)?;
    }
    Ok(u64::from(black_box(buffer[0])))
}
