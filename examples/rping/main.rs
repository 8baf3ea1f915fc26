//! rping with dma-bufs: the protocol, the roles and the options of the `rping` of rdmacm-utils, and works
//! with it in either role.
//!
//! ```text
//! rping -s -a 192.0.2.1 -v -C 10                       # one side
//! rping -c -a 192.0.2.1 -v -V -C 10 --exporter udmabuf  # the other
//! ```
//!
//! In each round the client fills a buffer and tells the server where it is; the server reads it by RDMA
//! READ and says so; the client tells where another buffer is; the server writes the same bytes there by
//! RDMA WRITE and says so; the client compares.

mod client;
#[path = "../common/exporter.rs"]
mod exporter;
mod memory;
#[path = "../common/register.rs"]
mod register;
mod server;
mod ui;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use dmabuf_rdma::transfer::{Connection, ConnectionOptions};
use dmabuf_rdma::verbs::{Device, ProtectionDomain, QueuePairOptions};

use memory::{LARGEST, SMALLEST};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Longest time for a connection to come about. A request that nobody listens for yet is repeated by the
/// kernel for most of a minute.
const CONNECT: Duration = Duration::from_secs(60);

#[derive(Parser, Clone)]
#[command(about = "Pings over RDMA, with dma-bufs, after the protocol of rdmacm-utils' rping")]
struct Options {
    /// Be the server.
    #[arg(short = 's', conflicts_with = "client")]
    server: bool,
    /// Be the client.
    #[arg(short = 'c', required_unless_present = "server", requires = "address")]
    client: bool,
    /// The server's address; the server's own default is every address.
    #[arg(short = 'a')]
    address: Option<String>,
    /// Address of this host for the client to go from.
    #[arg(short = 'I')]
    source: Option<IpAddr>,
    /// Port.
    #[arg(short = 'p', default_value_t = 7174)]
    port: u16,
    /// How often to ping; 0 goes on until somebody ends it.
    #[arg(short = 'C', default_value_t = 0)]
    count: u32,
    /// Bytes of a ping.
    #[arg(short = 'S', default_value_t = 64, value_parser = clap::value_parser!(u64).range(SMALLEST..=LARGEST))]
    size: u64,
    /// Show the data.
    #[arg(short = 'v')]
    verbose: bool,
    /// Compare the data.
    #[arg(short = 'V')]
    validate: bool,
    /// Serve any number of clients, at once and one after the other.
    #[arg(short = 'P')]
    persistent: bool,
    /// What makes the buffers: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
    #[arg(long, default_value = "heap")]
    exporter: String,
}

impl Options {
    fn address(&self) -> Result<SocketAddr> {
        let Some(host) = &self.address else { return Ok((Ipv4Addr::UNSPECIFIED, self.port).into()) };
        let mut found = (host.as_str(), self.port).to_socket_addrs()?;
        found.next().ok_or_else(|| format!("{host} has no address").into())
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let run = if options.server { server::run } else { client::run };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::failure(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

/// A connection to be, on the device that its way goes through.
fn connection(device: &str, port: u8) -> Result<Connection> {
    let domain = ProtectionDomain::new(&Device::by_name(device)?.open()?)?;
    let options = ConnectionOptions {
        // Little is under way at once, and the other side may take its time.
        window: 4,
        stall: Duration::MAX,
        queue_pair: QueuePairOptions { port, rd_atomic: 1, retry_count: 6, ..Default::default() },
        ..Default::default()
    };
    Ok(Connection::new(&domain, options)?)
}
