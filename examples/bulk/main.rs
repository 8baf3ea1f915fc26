//! Sends a file, or a buffer of any size, from a dma-buf to a dma-buf of another host.
//!
//! ```text
//! bulk receive --listen 192.0.2.1 --to copy.bin     # the other host
//! bulk send --connect 192.0.2.1 --file original.bin
//! bulk send --connect 192.0.2.1 --size 20G          # a generated pattern instead of a file
//! ```
//!
//! 1. The sender's connection request has the number of bytes.
//! 2. The receiver allocates a buffer of that size and replies with its description.
//! 3. The sender writes all bytes with one call, then notifies the receiver, with their digest.
//! 4. The receiver compares the digest with that of its buffer.

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
use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use dmabuf_rdma::{Connection, RemoteRegion};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Timeout for the peer's reply.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for a sender to connect.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(3600);

#[derive(Parser)]
#[command(about = "Sends a file or a buffer of any size over RDMA, from dma-buf to dma-buf")]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Receive into a buffer, and optionally save it as a file.
    Receive {
        #[command(flatten)]
        options: Options,
        /// Address of an RDMA device to listen on.
        #[arg(long)]
        listen: String,
        /// Save the received bytes in this file.
        #[arg(long)]
        to: Option<PathBuf>,
    },
    /// Send a file or a pattern.
    Send {
        #[command(flatten)]
        options: Options,
        /// Address that the receiver listens on.
        #[arg(long)]
        connect: String,
        /// File to send.
        #[arg(long, required_unless_present = "size")]
        file: Option<PathBuf>,
        /// Send a pattern of this size instead, such as 20G.
        #[arg(long, conflicts_with = "file", value_parser = size::parse_size)]
        size: Option<u64>,
    },
}

#[derive(Args)]
struct Options {
    #[arg(long, default_value_t = 18517)]
    port: u16,
    /// The exporter of the buffer: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
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
    ui::listening(listener.local_addr());
    let incoming = listener.accept_request(ACCEPT_TIMEOUT)?;
    let length = incoming.private_data().first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    let length = length.filter(|length| *length > 0).ok_or("the sender's request has no number of bytes")?;

    let domain = ProtectionDomain::new(&Device::by_name(&incoming.device_name())?.open()?)?;
    let allocation = exporter::by_name(&options.exporter)?.allocate(length)?;
    let region = register::register(&domain, &allocation)?;
    let mut connection = Connection::new(&domain, ConnectionOptions::default().notifications(1))?;
    incoming.accept(&mut connection, &region.remote().to_bytes(), TIMEOUT)?;

    // The notification arrives after all bytes, however long these take. If the sender disconnects, the wait fails at
    // once.
    let sent = connection.notifications().take_timeout(Duration::MAX)?.payload;
    let sent = sent.try_into().map_err(|_| "the sender's notification has no digest")?;
    let mapping = allocation.dmabuf.map()?;
    let received = digest::digest(&mapping, length)?;
    ui::compared(length, received, u64::from_le_bytes(sent))?;
    if let Some(path) = to {
        file::save(&mapping, length, &path)?;
    }
    Ok(())
}

fn send(options: &Options, host: &str, path: Option<PathBuf>, size: Option<u64>) -> Result<()> {
    let length = match (&path, size) {
        (Some(path), _) => std::fs::metadata(path).map_err(|e| format!("{}: {e}", path.display()))?.len(),
        (None, size) => size.ok_or("neither a file nor a size is given")?,
    };
    let outgoing = Outgoing::resolve(address(host, options.port)?, None, TIMEOUT)?;
    let domain = ProtectionDomain::new(&Device::by_name(&outgoing.device_name())?.open()?)?;
    let allocation = exporter::by_name(&options.exporter)?.allocate(length)?;
    let mapping = allocation.dmabuf.map()?;
    let digest = match &path {
        Some(path) => {
            file::load(path, &mapping, length)?;
            digest::digest(&mapping, length)?
        }
        None => digest::fill(&mapping, length, 1, |_| {})?,
    };

    let region = register::register(&domain, &allocation)?;
    let mut connection = Connection::new(&domain, Default::default())?;
    let answer = outgoing.connect(&mut connection, &length.to_le_bytes(), TIMEOUT)?;
    let (remote, _padding) = RemoteRegion::split_from(&answer)?;

    let bar = ui::Bar::new(length);
    let start = Instant::now();
    let bytes = connection.write(region.slice(..length)?, remote.slice(..length)?)?;
    bytes.wait_with_progress(|done| bar.set(done))?;
    let took = start.elapsed();
    connection.notify(0, &digest.to_le_bytes())?.wait()?;
    bar.finish();
    ui::sent(length, took);
    Ok(())
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    (host, port).to_socket_addrs()?.next().ok_or_else(|| format!("{host} has no address").into())
}
