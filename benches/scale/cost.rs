//! What a GiB costs, by exporter, path and size of the piece: a table and a chart.

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::{Backing, DmaHeap, Exporter, Pages, Udmabuf};
use dmabuf_rdma::mr::{MemoryRegion, Path};
use dmabuf_rdma::verbs::ProtectionDomain;

use super::{ACCESS, Memory, timed};
use crate::common::{Result, Rows, Spread};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SIZES: [u64; 4] = [64 * MIB, 256 * MIB, GIB, 4 * GIB];
const TIMES: usize = 5;

/// What UCX plans with for a registration: 16 us and 0.06 ns a byte.
fn ucx(size: u64) -> f64 {
    (16e-6 + 0.06e-9 * size as f64) * 1e3 / (size as f64 / GIB as f64)
}

pub fn run(rows: &mut Rows, domain: &ProtectionDomain) -> Result<()> {
    let heap = DmaHeap::open("system")?;
    let udmabuf = Udmabuf::open()?;
    for size in SIZES {
        let buffer = heap.allocate(size)?.dmabuf;
        row(rows, "heap, Uverbs", size, &measure(domain, &buffer, (0, size), None)?)?;
        drop(buffer);
        let allocation = udmabuf.allocate(size)?;
        let buffer = &allocation.dmabuf;
        row(rows, "udmabuf, Uverbs", size, &measure(domain, buffer, (0, size), None)?)?;
        // More than 1 GiB in one region of host pages is refused by rxe, and the kernel warns.
        if let Some(backing) = allocation.backing.as_ref().filter(|_| size <= GIB) {
            let times = measure(domain, buffer, (0, size), Some(backing))?;
            row(rows, "udmabuf, HostMapping", size, &times)?;
        }
        drop(allocation);
        if let Ok(huge) = Udmabuf::open()?.with_pages(Pages::Transparent).allocate(size) {
            let times = measure(domain, &huge.dmabuf, (0, size), None)?;
            row(rows, "udmabuf of huge pages, Uverbs", size, &times)?;
        }
    }
    // A chunk of one dma-buf of 4 GiB: each maps all of it.
    let memory = Memory::new(4 * GIB)?;
    let whole = memory.part(0, 4 * GIB)?.dmabuf;
    for size in SIZES {
        row(rows, "a chunk of 4 GiB, Uverbs", size, &measure(domain, &whole, (0, size), None)?)?;
    }
    for size in SIZES {
        let exact = Spread { min: ucx(size), median: ucx(size), max: ucx(size) };
        rows.add_point(&name("UCX's model", size), "ms/GiB", exact, "UCX's model", size)?;
    }
    Ok(())
}

fn name(series: &str, size: u64) -> String {
    let size = if size < GIB { format!("{} MiB", size / MIB) } else { format!("{} GiB", size / GIB) };
    format!("cost of {series}, {size}")
}

fn row(rows: &mut Rows, series: &str, size: u64, times: &[f64]) -> Result<()> {
    rows.add_point(&name(series, size), "ms/GiB", Spread::of(times.iter().copied()), series, size)
}

/// Milliseconds a GiB of this range.
fn measure(
    domain: &ProtectionDomain,
    buffer: &DmaBuf,
    (offset, length): (u64, u64),
    backing: Option<&Backing>,
) -> Result<Vec<f64>> {
    let register = || {
        let builder = MemoryRegion::builder(domain, buffer).range(offset, length).access(ACCESS);
        match backing {
            Some(backing) => builder.paths(&[]).host_mapping(backing).register(),
            None => builder.register(),
        }
    };
    let expected = if backing.is_some() { Path::HostMapping } else { Path::Uverbs };
    (0..TIMES)
        .map(|_| {
            let (took, region) = timed(register)?;
            assert_eq!(region.path(), expected);
            Ok(took.as_secs_f64() * 1e3 / (length as f64 / GIB as f64))
        })
        .collect()
}
