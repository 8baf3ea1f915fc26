//! `bench`: rates and latencies of blocks, for each combination of operation, block size and batch.
//!
//! The far end is a buffer of `dmabuf-rdma serve` on another host, or of another device of this one. Before each
//! measurement the target is cleared, and afterwards its bytes are compared.

mod chart;
mod ends;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use dmabuf_rdma::{Blocks, RegionSlice, RemoteSlice, Transfer};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{Result, exporter, net, size, ui};
use ends::Ends;

/// Measure how fast blocks move, verified.
///
/// Without --connect both ends are on this machine. With it the far end is the buffer of `dmabuf-rdma serve`, whose
/// exporter and size are given there.
#[derive(clap::Args)]
pub struct Args {
    /// Address that `dmabuf-rdma serve` listens on.
    #[arg(long, conflicts_with_all = ["device", "peer_device", "peer_exporter"])]
    connect: Option<String>,
    #[arg(long, default_value_t = 18518)]
    port: u16,
    /// RDMA device; default: the first.
    #[arg(long)]
    device: Option<String>,
    /// RDMA device of the far end; default: the same.
    #[arg(long)]
    peer_device: Option<String>,
    #[arg(long, default_value = "udmabuf", help = format!("The exporter of the near buffer: host, {}", exporter::NAMES))]
    exporter: String,
    #[arg(long, default_value = "heap", help = "The exporter of the far buffer")]
    peer_exporter: String,
    /// Operations.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "write,read")]
    op: Vec<Operation>,
    /// Sizes of a block.
    #[arg(long, value_delimiter = ',', default_value = "4K,64K,1M", value_parser = size::parse_size)]
    block: Vec<u64>,
    /// Numbers of blocks in one transfer.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    batch: Vec<u64>,
    /// Transfers in flight at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    depth: u64,
    /// Seconds for each combination.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Largest size of each buffer; combinations that need more are left out.
    #[arg(long, default_value = "256M", value_parser = size::parse_size)]
    size: u64,
    /// Do not compare the bytes.
    #[arg(long)]
    no_verify: bool,
    /// Write the results as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the rates as SVG.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// A direction of transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Operation {
    Write,
    Read,
}

/// A row of the table. Times are in microseconds, of one transfer of `batch` blocks.
#[derive(Debug, Clone, Serialize)]
struct Row {
    operation: Operation,
    block: u64,
    batch: u64,
    depth: u64,
    transfers: u64,
    mib_per_second: f64,
    blocks_per_second: f64,
    median: f64,
    p90: f64,
    p99: f64,
    p999: f64,
    maximum: f64,
    verified: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let seconds = Duration::try_from_secs_f64(args.seconds).map_err(|_| "--seconds is no time")?;
    let all: Vec<(Operation, u64, u64)> = args
        .op
        .iter()
        .flat_map(|op| {
            args.block.iter().flat_map(move |block| args.batch.iter().map(move |batch| (*op, *block, *batch)))
        })
        .collect();
    let need = |block: u64, batch: u64| block.checked_mul(batch)?.checked_mul(args.depth);
    let fits = |size: u64| {
        move |(_, block, batch): &(Operation, u64, u64)| {
            *batch > 0 && need(*block, *batch).is_some_and(|need| need <= size)
        }
    };
    let largest =
        all.iter().copied().filter(fits(args.size)).filter_map(|(_, block, batch)| need(block, batch)).max();
    let largest =
        largest.ok_or_else(|| format!("no combination fits into --size {}", ui::bytes(args.size)))?;
    let ends = match &args.connect {
        Some(host) => Ends::connect(net::address(host, args.port)?, &args.exporter, largest)?,
        None => Ends::here(
            [args.device.as_deref(), args.peer_device.as_deref()],
            [&args.exporter, &args.peer_exporter],
            largest,
        )?,
    };
    ui::row("near", &ends.near);
    ui::row("far", &ends.far);
    ui::line(format!(
        "\n{:<6}{:>9}{:>7}{:>11}{:>12}{:>11}{:>11}{:>11}",
        "", "block", "batch", "MiB/s", "blocks/s", "median us", "99% us", "99.9% us"
    ));
    let mut rows = Vec::new();
    let (fitting, others): (Vec<_>, Vec<_>) = all.into_iter().partition(fits(ends.size()));
    for (operation, block, batch) in fitting {
        let case = Case { operation, block, batch, depth: args.depth };
        let row = case.measure(&ends, seconds, !args.no_verify)?;
        let verified = if row.verified { "  verified" } else { "" };
        let name = format!("{operation:?}").to_lowercase();
        ui::line(format!(
            "{name:<6}{:>9}{batch:>7}{:>11.1}{:>12.0}{:>11.1}{:>11.1}{:>11.1}{verified}",
            dma_sg::Size(block).to_string(),
            row.mib_per_second,
            row.blocks_per_second,
            row.median,
            row.p99,
            row.p999
        ));
        rows.push(row);
    }
    if !others.is_empty() {
        ui::line(format!("{} combinations need more than {}", others.len(), ui::bytes(ends.size())));
    }
    let write = |path: &PathBuf, text: String| {
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
    };
    if let Some(path) = &args.json {
        write(path, serde_json::to_string_pretty(&rows)? + "\n")?;
    }
    if let Some(path) = &args.svg {
        write(path, chart::draw(&rows))?;
    }
    Ok(())
}

/// A combination.
struct Case {
    operation: Operation,
    block: u64,
    batch: u64,
    depth: u64,
}

impl Case {
    /// Moves blocks for some time, and then compares the target.
    fn measure(&self, ends: &Ends, seconds: Duration, verify: bool) -> Result<Row> {
        let each = self.block * self.batch;
        let total = each * self.depth;
        let table = |slot: u64| -> Result<(Blocks<RegionSlice>, Blocks<RemoteSlice>)> {
            let range = slot * each..(slot + 1) * each;
            let count = usize::try_from(self.batch)?;
            Ok((
                ends.region.slice(range.clone())?.strided(self.block, self.block, count)?,
                ends.remote.slice(range)?.strided(self.block, self.block, count)?,
            ))
        };
        let tables = (0..self.depth).map(table).collect::<Result<Vec<_>>>()?;
        let writes = self.operation == Operation::Write;
        if verify {
            ends.prepare(total, writes)?;
        }
        // Nanoseconds, to three digits.
        let mut times = Histogram::<u64>::new(3)?;
        let mut in_flight: VecDeque<(Transfer, Instant)> = VecDeque::new();
        let mut transfers = 0;
        let mut finish = |(transfer, start): (Transfer, Instant)| -> Result<()> {
            transfer.wait()?;
            times.record(start.elapsed().as_nanos() as u64)?;
            Ok(())
        };
        let start = Instant::now();
        for (local, remote) in tables.iter().cycle() {
            // Every slot is used at least once, so that all bytes are there to compare.
            if start.elapsed() >= seconds && transfers >= self.depth {
                break;
            }
            if in_flight.len() as u64 == self.depth {
                finish(in_flight.pop_front().expect("not empty"))?;
            }
            let began = Instant::now();
            let transfer = match self.operation {
                Operation::Write => ends.connection.write(local, remote)?,
                Operation::Read => ends.connection.read(local, remote)?,
            };
            in_flight.push_back((transfer, began));
            transfers += 1;
        }
        in_flight.into_iter().try_for_each(&mut finish)?;
        let took = start.elapsed().as_secs_f64();
        if verify {
            ends.compare(total, writes)?;
        }
        let at = |quantile| times.value_at_quantile(quantile) as f64 / 1e3;
        Ok(Row {
            operation: self.operation,
            block: self.block,
            batch: self.batch,
            depth: self.depth,
            transfers,
            mib_per_second: (transfers * each) as f64 / took / f64::from(1 << 20),
            blocks_per_second: (transfers * self.batch) as f64 / took,
            median: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            maximum: times.max() as f64 / 1e3,
            verified: verify,
        })
    }
}
