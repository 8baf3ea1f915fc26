//! Sends a file, or a buffer of any size, from one dma-buf to another on the far host.
//!
//! ```text
//! bulk receive --listen 192.0.2.1 --to copy.bin     # the far host
//! bulk send --connect 192.0.2.1 --file original.bin
//! bulk send --connect 192.0.2.1 --size 20G          # without files: a pattern
//! ```
//!
//! The sender says how much comes; the receiver makes a buffer of that size and answers with its
//! description; the sender writes all of it with one call, and its digest behind it. The receiver compares
//! it with the digest of what its CPU sees.

#[path = "../demo/digest.rs"]
mod digest;
#[path = "../common/exporter.rs"]
mod exporter;
mod file;
#[path = "../common/register.rs"]
mod register;
#[path = "../common/size.rs"]
mod size;
mod ui;

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use dmabuf_rdma::RemoteRegion;
use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::transfer::{Connection, LocalRange, Request};
use dmabuf_rdma::verbs::{Device, ProtectionDomain};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const LIMIT: Duration = Duration::from_secs(60);

/// Behind the bytes, at the next page: their digest.
const PAGE: u64 = 4096;
const DIGEST: u64 = 8;

#[derive(Parser)]
#[command(about = "Sends a file or a buffer of any size over RDMA, dma-buf to dma-buf")]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// The far side.
    Receive {
        #[command(flatten)]
        options: Options,
        /// Address of an RDMA device to wait at.
        #[arg(long)]
        listen: String,
        /// Where to put what came; otherwise it stays in the buffer.
        #[arg(long)]
        to: Option<PathBuf>,
    },
    /// The side that has the bytes.
    Send {
        #[command(flatten)]
        options: Options,
        /// Address that the receiver waits at.
        #[arg(long)]
        connect: String,
        /// What to send.
        #[arg(long, required_unless_present = "size")]
        file: Option<PathBuf>,
        /// Send so much of a pattern instead, such as 20G.
        #[arg(long, conflicts_with = "file", value_parser = size::parse_size)]
        size: Option<u64>,
    },
}

#[derive(Args)]
struct Options {
    #[arg(long, default_value_t = 18517)]
    port: u16,
    /// What makes the buffer: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
    #[arg(long, default_value = "heap")]
    exporter: String,
}

fn main() -> ExitCode {
    let run = match Cli::parse().role {
        Role::Receive { options, listen, to } => receive(&options, &listen, to),
        Role::Send { options, connect, file, size } => send(&options, &connect, file, size),
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::failure(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

fn receive(options: &Options, host: &str, to: Option<PathBuf>) -> Result<()> {
    let listener = Listener::bind(address(host, options.port)?)?;
    ui::listening(listener.local_address());
    let incoming = listener.next(Duration::from_secs(3600))?;
    // Before anything is made: how much it would be.
    let length = incoming.private_data().first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    let length = length.filter(|length| *length > 0).ok_or("the sender does not say how much it sends")?;

    let domain = ProtectionDomain::new(&Device::by_name(&incoming.device_name())?.open()?)?;
    let allocation = exporter::by_name(&options.exporter)?.allocate(whole(length)?)?;
    let region = register::register(&domain, &allocation)?;
    let mut connection = Connection::new(&domain, Default::default())?;
    incoming.accept(&mut connection, &region.remote().to_bytes(), LIMIT)?;

    // The number of the last message says that all bytes are there.
    connection.halves().1.start_imm()?.limit(Duration::MAX).wait()?;
    let mapping = allocation.dmabuf.map()?;
    let mut sent = [0; DIGEST as usize];
    mapping.read(length.next_multiple_of(PAGE), &mut sent)?;
    let seen = digest::digest(&mapping, length)?;
    ui::compared(length, seen, u64::from_le_bytes(sent))?;
    if let Some(path) = to {
        file::save(&mapping, length, &path)?;
    }
    Ok(())
}

fn send(options: &Options, host: &str, path: Option<PathBuf>, size: Option<u64>) -> Result<()> {
    let length = match (&path, size) {
        (Some(path), _) => std::fs::metadata(path)?.len(),
        (None, size) => size.ok_or("neither a file nor a size")?,
    };
    let outgoing = Outgoing::resolve(address(host, options.port)?, None, LIMIT)?;
    let domain = ProtectionDomain::new(&Device::by_name(&outgoing.device_name())?.open()?)?;
    let allocation = exporter::by_name(&options.exporter)?.allocate(whole(length)?)?;
    let mapping = allocation.dmabuf.map()?;
    match &path {
        Some(path) => file::load(path, &mapping, length)?,
        None => {
            digest::fill(&mapping, length, |_| {})?;
        }
    }
    let digest = digest::digest(&mapping, length)?;
    let behind = length.next_multiple_of(PAGE);
    mapping.write(behind, &digest.to_le_bytes())?;

    let region = register::register(&domain, &allocation)?;
    let mut connection = Connection::new(&domain, Default::default())?;
    let answer = outgoing.connect(&mut connection, &length.to_le_bytes(), LIMIT)?;
    let (remote, _) = RemoteRegion::split_from(&answer)?;

    let bar = ui::Bar::new(length);
    let mut report = |done| bar.set(done);
    let start = Instant::now();
    let bytes = LocalRange::from(&region).range(0, length)?;
    connection.start(Request::write(bytes, remote.range(0, length)?))?.progress(&mut report).wait()?;
    let took = start.elapsed();
    let digest = LocalRange::from(&region).range(behind, DIGEST)?;
    connection.write_with_imm(digest, remote.range(behind, DIGEST)?, 1)?;
    bar.finish();
    ui::sent(length, took);
    Ok(())
}

/// The buffer that holds so many bytes and their digest.
fn whole(length: u64) -> Result<u64> {
    let pages = length.checked_next_multiple_of(PAGE).and_then(|pages| pages.checked_add(PAGE));
    pages.ok_or_else(|| format!("no buffer has {length} bytes").into())
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    (host, port).to_socket_addrs()?.next().ok_or_else(|| format!("{host} has no address").into())
}
