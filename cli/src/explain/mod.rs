//! `explain`: where a buffer's memory is: its segments, their lengths, and the best page size for a device.

mod histogram;
mod memory;
mod view;

use std::os::fd::OwnedFd;
use std::time::Instant;

use dma_sg::{DmaSgList, Iova, PageSizes, Size, page_size};
use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::Backing;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::{Result, exporter, size, ui};

/// Show where a buffer's memory is, and its best page size for a device.
///
/// The physical pages of a udmabuf come from /proc/self/pagemap, which needs root. Other buffers, and the addresses
/// for a device, need the module of `kernel/dma_sg`.
#[derive(clap::Args)]
pub struct Args {
    #[arg(long, default_value = "udmabuf", help = format!("The exporter of the buffer: {}", exporter::NAMES))]
    exporter: String,
    /// Size of the buffer, such as 64M or 4G.
    #[arg(long, default_value = "64M", value_parser = size::parse_size)]
    size: u64,
    /// A process that has a dma-buf open: look at that one. Needs the right to debug the process.
    #[arg(long, requires = "fd", conflicts_with_all = ["exporter", "size"])]
    pid: Option<i32>,
    /// The number of the dma-buf's descriptor in that process.
    #[arg(long, requires = "pid")]
    fd: Option<i32>,
    /// The PCI or RDMA device whose addresses to show; default: physical addresses.
    #[arg(long)]
    device: Option<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let (buffer, backing, from) = open(args)?;
    ui::row("buffer", format!("{from}, {}", Size(buffer.size())));
    let start = Instant::now();
    let seen = match &args.device {
        Some(device) => view::by_device(&buffer, device)?,
        None => view::physical(&buffer, backing.as_ref())?,
    };
    let took = start.elapsed().as_secs_f64() * 1e3;
    ui::row("addresses", format!("{}, read in {took:.1} ms", seen.addresses));
    list(&seen.list);
    if seen.physical {
        for (number, (name, bytes)) in memory::places(&seen.list).iter().enumerate() {
            ui::row(if number == 0 { "where" } else { "" }, format!("{name}: {}", Size(*bytes)));
        }
    }
    histogram::draw(&seen.list);
    Ok(())
}

/// The buffer, the pages behind it if they are this process's, and where it comes from.
fn open(args: &Args) -> Result<(DmaBuf, Option<Backing>, String)> {
    let (Some(pid), Some(fd)) = (args.pid, args.fd) else {
        let exporter = exporter::by_name(&args.exporter)?;
        let allocation = exporter.allocate(args.size)?;
        return Ok((allocation.dmabuf, allocation.backing, exporter.name()));
    };
    let failed = |what: &str, error: rustix::io::Errno| format!("{what} of process {pid}: {error}");
    let process = Pid::from_raw(pid).ok_or_else(|| format!("{pid} is no process"))?;
    let process = pidfd_open(process, PidfdFlags::empty()).map_err(|e| failed("a handle", e))?;
    let taken: OwnedFd = pidfd_getfd(process, fd, PidfdGetfdFlags::empty())
        .map_err(|e| failed(&format!("descriptor {fd}"), e))?;
    let buffer = DmaBuf::from_fd(taken)?;
    let from = format!("{}, descriptor {fd} of process {pid}", buffer.exporter_name()?);
    Ok((buffer, None, from))
}

fn list(list: &DmaSgList) {
    let runs = list.runs();
    ui::row("list", list);
    let sizes = runs.iter().map(|run| run.len);
    let (shortest, longest) = (sizes.clone().min().unwrap_or(0), sizes.max().unwrap_or(0));
    let lowest = runs.iter().map(|run| run.addr).min().unwrap_or(0);
    let highest = runs.iter().map(|run| run.addr + (run.len - 1)).max().unwrap_or(0);
    let lengths = if shortest == longest { "of" } else { &format!("of {} to", Size(shortest)) };
    ui::row("segments", format!("{lengths} {}, from {lowest:#x} to {highest:#x}", Size(longest)));
    // An iova congruent to the first address allows the largest pages.
    let iova = Iova(list.as_view().start_addr());
    match list.best_page_size(PageSizes::ALL, iova).and_then(|size| Ok((size, list.num_blocks(size, iova)?)))
    {
        Ok((size, blocks)) => {
            let small = list.num_blocks(page_size(), iova).unwrap_or(blocks);
            let entries = if blocks == 1 { "entry" } else { "entries" };
            let saved = if blocks < small { &format!(" instead of {small}") } else { "" };
            ui::row("best page", format!("{}: {blocks} {entries} in a device's table{saved}", Size(size)));
        }
        Err(error) => ui::row("best page", error),
    }
}
