//! rping with dma-bufs. It has the protocol and the options of rdmacm-utils' `rping`, and works with that
//! program in either role.
//!
//! ```text
//! rping -s -a 192.0.2.1 -v -C 10                       # one side
//! rping -c -a 192.0.2.1 -v -V -C 10 --exporter udmabuf  # the other
//! ```
//!
//! Each round:
//! 1. The client fills a buffer, and sends its address, key and length.
//! 2. The server reads the buffer by RDMA READ, and sends a reply.
//! 3. The client sends address, key and length of another buffer.
//! 4. The server writes the same bytes there by RDMA WRITE, and sends a reply.
//! 5. The client compares the two.

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
use dmabuf_rdma::Connection;
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Device, ProtectionDomain, QueuePairOptions};

use memory::{LARGEST, SMALLEST};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Timeout for establishing a connection. The kernel repeats a request without a reply for most of a minute.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Parser, Clone)]
#[command(about = "Pings over RDMA from dma-buf to dma-buf, with the protocol of rdmacm-utils' rping")]
struct Options {
    /// Run as the server.
    #[arg(short = 's', conflicts_with = "client")]
    server: bool,
    /// Run as the client.
    #[arg(short = 'c', required_unless_present = "server", requires = "address")]
    client: bool,
    /// The server's address; by default the server listens on all of its addresses.
    #[arg(short = 'a')]
    address: Option<String>,
    /// Local address for the client to connect from.
    #[arg(short = 'I')]
    source: Option<IpAddr>,
    /// Port.
    #[arg(short = 'p', default_value_t = 7174)]
    port: u16,
    /// Number of pings; 0 pings until the program is stopped.
    #[arg(short = 'C', default_value_t = 0)]
    count: u32,
    /// Size of a ping in bytes.
    #[arg(short = 'S', default_value_t = 64, value_parser = clap::value_parser!(u64).range(SMALLEST..=LARGEST))]
    size: u64,
    /// Print the data.
    #[arg(short = 'v')]
    verbose: bool,
    /// Compare the data.
    #[arg(short = 'V')]
    validate: bool,
    /// Serve any number of clients, several at once.
    #[arg(short = 'P')]
    persistent: bool,
    /// The exporter of the buffers: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
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

/// A connection on the device that the route leads through, still to be connected.
fn connection(device: &str, port: u8) -> Result<Connection> {
    let domain = ProtectionDomain::new(&Device::by_name(device)?.open()?)?;
    // Few messages are in flight at once.
    let options = ConnectionOptions::default()
        .window(4)
        .queue_pair(QueuePairOptions::default().port(port).rd_atomic(1));
    Ok(Connection::new(&domain, options)?)
}
