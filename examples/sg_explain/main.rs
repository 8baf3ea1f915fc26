//! Shows where a buffer's memory is: its segments, their lengths, and the best page size for a device.
//!
//! `sg_explain --exporter udmabuf:thp --size 64M` reads the physical pages of a udmabuf. It needs root, and
//! for huge pages `echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled`. Other exporters, and
//! the addresses for a device (`--device 0000:03:00.0`, `--device mlx5_0`), need the module of
//! `kernel/dma_sg`.

#[path = "../common/exporter.rs"]
mod exporter;
mod histogram;
mod memory;
#[path = "../common/size.rs"]
mod size;
mod ui;
mod view;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
#[command(about = "Shows where a buffer's memory is, and its best page size for a device")]
struct Cli {
    /// The exporter of the buffer: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
    #[arg(long, default_value = "udmabuf")]
    exporter: String,
    /// Size of the buffer, such as 64M or 4G.
    #[arg(long, default_value = "64M", value_parser = size::parse_size)]
    size: u64,
    /// The PCI or RDMA device whose addresses to show; default: physical addresses.
    #[arg(long)]
    device: Option<String>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::failure(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let exporter = exporter::by_name(&cli.exporter)?;
    let allocation = exporter.allocate(cli.size)?;
    ui::row("buffer", format!("{}, {}", exporter.name(), dma_sg::Size(allocation.dmabuf.size())));
    let start = Instant::now();
    let seen = match &cli.device {
        Some(device) => view::by_device(&allocation, device)?,
        None => view::physical(&allocation)?,
    };
    ui::row(
        "addresses",
        format!("{}, read in {:.1} ms", seen.addresses, start.elapsed().as_secs_f64() * 1e3),
    );
    ui::list(&seen.list);
    if seen.physical {
        ui::places(&memory::places(&seen.list));
    }
    histogram::draw(&seen.list);
    Ok(())
}
