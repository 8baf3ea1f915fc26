//! Sends memory of a GPU, a camera or a heap to a peer by RDMA, without a copy; the peer verifies it.
//!
//! `gpu_send --exporter cuda` runs both sides on one machine, as two processes. For two machines, start
//! `gpu_send --listen 0.0.0.0:18516` on one and `gpu_send --exporter cuda --connect HOST:18516` on the other.

mod peer;
mod sender;
#[path = "../common/size.rs"]
mod size;
mod source;

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};

use clap::{Parser, ValueEnum};
use dmabuf_rdma::verbs::{Context, Device, devices};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
#[command(about = "Sends memory of any exporter to a peer by RDMA; the peer verifies it")]
struct Cli {
    /// The exporter of the memory.
    #[arg(long, value_enum, default_value = "heap")]
    exporter: Kind,
    /// Bytes to send, such as 64M; a camera sends a frame.
    #[arg(long, default_value = "16M", value_parser = size::parse_size)]
    size: u64,
    /// RDMA device; default: the first.
    #[arg(long)]
    device: Option<String>,
    /// Run as the peer, and listen on this address.
    #[arg(long)]
    listen: Option<String>,
    /// Send to the peer that listens on this address; default: start one here.
    #[arg(long, conflicts_with = "listen")]
    connect: Option<String>,
}

/// The exporters, by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Vulkan,
    Cuda,
    Hsa,
    LevelZero,
    Gbm,
    V4l2,
    Heap,
    Udmabuf,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{:>9}  {error}", "failed");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("{:>9}  caused by: {error}", "");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    if let Some(address) = &cli.listen {
        return peer::run(&open(cli)?, address);
    }
    // The memory first, so that its errors are reported before a missing RDMA device.
    let source = source::make(cli.exporter, cli.size)?;
    let context = open(cli)?;
    match &cli.connect {
        Some(address) => sender::run(&context, &source, address),
        None => with_a_peer(cli, |address| sender::run(&context, &source, address)),
    }
}

fn open(cli: &Cli) -> Result<Context> {
    let device = match &cli.device {
        Some(name) => Device::by_name(name)?,
        None => devices()?.into_iter().next().ok_or("this machine has no RDMA device")?,
    };
    Ok(device.open()?)
}

/// Starts a peer as a process of its own.
fn with_a_peer(cli: &Cli, send: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--listen", "127.0.0.1:0"]);
    if let Some(device) = &cli.device {
        command.args(["--device", device]);
    }
    let mut peer = command.stdout(Stdio::piped()).spawn()?;
    let mut announced = String::new();
    BufReader::new(peer.stdout.take().ok_or("no output")?).read_line(&mut announced)?;
    let sent = match announced.trim().strip_prefix(peer::LISTENING) {
        Some(address) => send(address),
        None => Ok(()), // The peer failed and printed why; its status is checked below.
    };
    if sent.is_err() {
        // It may wait for messages that will not come. Killing fails if it has already ended.
        let _ = peer.kill();
    }
    let status = peer.wait()?;
    sent?;
    if status.success() { Ok(()) } else { Err(format!("the peer ended with {status}").into()) }
}
