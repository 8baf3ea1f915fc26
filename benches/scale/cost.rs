//! Registration time per GiB by exporter, path and size of the region: a table and a chart.

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::{Backing, DmaHeap, Exporter, PageKind, Udmabuf};
use dmabuf_rdma::mr::{MemoryRegion, Path};
use dmabuf_rdma::verbs::ProtectionDomain;

use super::{ACCESS, Memory, timed};
use crate::common::{Result, Rows, Spread};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SIZES: [u64; 4] = [64 * MIB, 256 * MIB, GIB, 4 * GIB];
const TIMES: usize = 5;

/// UCX's cost model of a registration: 16 us and 0.06 ns a byte.
fn ucx(size: u64) -> f64 {
    (16e-6 + 0.06e-9 * size as f64) * 1e3 / (size as f64 / GIB as f64)
}

pub fn run(rows: &mut Rows, domain: &ProtectionDomain) -> Result<()> {
    let heap = DmaHeap::open("system")?;
    let udmabuf = Udmabuf::open()?;
    for size in SIZES {
        let buffer = heap.allocate(size)?.dmabuf;
        row(rows, "heap, Uverbs", size, &measure(domain, &buffer, size, None)?)?;
        drop(buffer);
        let allocation = udmabuf.allocate(size)?;
        let buffer = &allocation.dmabuf;
        row(rows, "udmabuf, Uverbs", size, &measure(domain, buffer, size, None)?)?;
        // rxe refuses more than 1 GiB of host pages in one region, and the kernel warns.
        if let Some(backing) = allocation.backing.as_ref().filter(|_| size <= GIB) {
            let times = measure(domain, buffer, size, Some(backing))?;
            row(rows, "udmabuf, HostMapping", size, &times)?;
        }
        drop(allocation);
        if let Ok(huge) = Udmabuf::open()?.with_pages(PageKind::Transparent).allocate(size) {
            let times = measure(domain, &huge.dmabuf, size, None)?;
            row(rows, "udmabuf of huge pages, Uverbs", size, &times)?;
        }
    }
    // Regions of the first bytes of one dma-buf: the kernel maps all of the dma-buf for each.
    let memory = Memory::new(4 * GIB)?;
    let whole = memory.part(0..4 * GIB)?.dmabuf;
    for size in SIZES {
        row(rows, "a chunk of 4 GiB, Uverbs", size, &measure(domain, &whole, size, None)?)?;
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

/// Milliseconds per GiB, for a region of the first `length` bytes.
fn measure(
    domain: &ProtectionDomain,
    buffer: &DmaBuf,
    length: u64,
    backing: Option<&Backing>,
) -> Result<Vec<f64>> {
    let register = || {
        let builder = MemoryRegion::builder(domain, buffer).range(..length).access(ACCESS);
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
