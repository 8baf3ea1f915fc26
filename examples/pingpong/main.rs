//! Measures the latency of small messages: two sides take turns to write 8 bytes into each other's dma-buf.
//!
//! ```text
//! pingpong --listen 192.0.2.1            # one side
//! pingpong --connect 192.0.2.1           # the other
//! ```
//!
//! The sides describe their buffers to each other while they connect. Then each polls its own buffer, without
//! a pause, for the counter that the peer writes.

#[path = "../common/exporter.rs"]
mod exporter;
#[path = "../common/register.rs"]
mod register;

use std::net::ToSocketAddrs;
use std::time::{Duration, Instant};

use clap::Parser;
use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::dmabuf::{CpuAccess, CpuGuard};
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use dmabuf_rdma::{Connection, DmaBuf, MemoryRegion, RemoteRegion};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Timeout for the peer's reply.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for a peer to connect.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(3600);

/// Offsets in each buffer: of the counter that this side sends, and of the one that the peer writes.
const OURS: u64 = 0;
const THEIRS: u64 = 64;

#[derive(Parser)]
#[command(about = "Measures the latency of RDMA WRITEs between two dma-bufs")]
struct Options {
    /// Address of an RDMA device to listen on.
    #[arg(long, required_unless_present = "connect")]
    listen: Option<String>,
    /// Address that the other side listens on.
    #[arg(long, conflicts_with = "listen")]
    connect: Option<String>,
    #[arg(long, default_value_t = 18516)]
    port: u16,
    /// Round trips.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// The exporter of the buffer: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
    #[arg(long, default_value = "heap")]
    exporter: String,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let host = options.connect.as_ref().or(options.listen.as_ref()).ok_or("give --listen or --connect")?;
    let address = (host.as_str(), options.port).to_socket_addrs()?.next();
    let address = address.ok_or_else(|| format!("{host} has no address"))?;

    // The route to the address decides which RDMA device to use.
    if options.connect.is_some() {
        let outgoing = Outgoing::resolve(address, None, TIMEOUT)?;
        let mut side = Side::new(&outgoing.device_name(), &options.exporter)?;
        let ours = side.region.remote().to_bytes();
        let theirs = outgoing.connect(&mut side.connection, &ours, TIMEOUT)?;
        side.play(&theirs, options.count, true)
    } else {
        let listener = Listener::bind(address)?;
        println!("listening on {}", listener.local_addr());
        let incoming = listener.accept_request(ACCEPT_TIMEOUT)?;
        let mut side = Side::new(&incoming.device_name(), &options.exporter)?;
        let ours = side.region.remote().to_bytes();
        let theirs = incoming.private_data().to_vec();
        incoming.accept(&mut side.connection, &ours, TIMEOUT)?;
        side.play(&theirs, options.count, false)
    }
}

/// A side's buffer, its region, and the connection.
struct Side {
    buffer: DmaBuf,
    region: MemoryRegion,
    connection: Connection,
}

impl Side {
    fn new(device: &str, exporter: &str) -> Result<Self> {
        let domain = ProtectionDomain::new(&Device::by_name(device)?.open()?)?;
        let allocation = exporter::by_name(exporter)?.allocate(4096)?;
        let region = register::register(&domain, &allocation)?;
        let connection = Connection::new(&domain, ConnectionOptions::default().busy_poll(true))?;
        Ok(Self { buffer: allocation.dmabuf, region, connection })
    }

    /// Plays `count` rounds with the peer that sent this description.
    fn play(self, description: &[u8], count: u64, starts: bool) -> Result<()> {
        let (peer, _padding) = RemoteRegion::split_from(description)?;
        let (from, to) = (self.region.slice(OURS..OURS + 8)?, peer.slice(THEIRS..THEIRS + 8)?);
        let mapping = self.buffer.map()?;
        let memory = mapping.begin(CpuAccess::ReadWrite)?;
        let write = |round: u64| -> Result<()> {
            memory.write(OURS, &round.to_le_bytes())?;
            self.connection.write(&from, &to)?.wait()?;
            Ok(())
        };
        let mut times = Vec::with_capacity(count as usize);
        for round in 1..=count {
            let start = Instant::now();
            if starts {
                write(round)?;
            }
            while last_from_peer(&memory)? != round {
                if start.elapsed() > TIMEOUT {
                    return Err(format!("the peer did not write within {TIMEOUT:?}").into());
                }
            }
            if !starts {
                write(round)?;
            }
            times.push(start.elapsed());
        }
        if starts {
            times.sort();
            let micros = |time: Duration| time.as_secs_f64() * 1e6 / 2.0;
            let at = |percent: usize| micros(times[(times.len() - 1) * percent / 100]);
            println!("one way: median {:.2} us, 99% {:.2} us, minimum {:.2} us", at(50), at(99), at(0));
        }
        Ok(())
    }
}

fn last_from_peer(memory: &CpuGuard<'_>) -> Result<u64> {
    let mut bytes = [0; 8];
    memory.read(THEIRS, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
