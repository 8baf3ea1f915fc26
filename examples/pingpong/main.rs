//! How long a small message takes: two sides write it to and fro.
//!
//! ```text
//! pingpong --listen 192.0.2.1            # one side
//! pingpong --connect 192.0.2.1           # the other
//! ```
//!
//! Each side has a dma-buf, describes it in the handshake, and watches for the peer's number in it. Both
//! look all the time instead of sleeping, which is what makes it quick.

#[path = "../common/exporter.rs"]
mod exporter;
#[path = "../common/register.rs"]
mod register;

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use clap::Parser;
use dmabuf_rdma::RemoteRegion;
use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::dmabuf::{CpuAccess, CpuGuard};
use dmabuf_rdma::transfer::{Connection, ConnectionOptions, LocalRange, Wait};
use dmabuf_rdma::verbs::{Device, ProtectionDomain};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const LIMIT: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(about = "Measures the latency of RDMA WRITEs between two dma-bufs")]
struct Options {
    /// Wait at this address of an RDMA device for the other side.
    #[arg(long, required_unless_present = "connect")]
    listen: Option<String>,
    /// Connect to the side that waits there.
    #[arg(long, conflicts_with = "listen")]
    connect: Option<String>,
    #[arg(long, default_value_t = 18516)]
    port: u16,
    /// Round trips.
    #[arg(long, default_value_t = 1000)]
    count: u64,
    /// What makes the buffer: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
    #[arg(long, default_value = "heap")]
    exporter: String,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let first = options.connect.is_some();
    let host = options.connect.as_ref().or(options.listen.as_ref()).ok_or("no address")?;
    let address = (host.as_str(), options.port).to_socket_addrs()?.next().ok_or("the host has no address")?;

    // The address decides the device.
    if first {
        let outgoing = Outgoing::resolve(address, None, LIMIT)?;
        let domain = domain(&outgoing.device_name())?;
        play(&options, &domain, first, |connection, ours| {
            Ok(outgoing.connect(connection, &ours.to_bytes(), LIMIT)?)
        })
    } else {
        let incoming = wait(address)?;
        let domain = domain(&incoming.device_name())?;
        play(&options, &domain, first, |connection, ours| {
            let theirs = incoming.private_data().to_vec();
            incoming.accept(connection, &ours.to_bytes(), LIMIT)?;
            Ok(theirs)
        })
    }
}

fn wait(address: SocketAddr) -> Result<dmabuf_rdma::cm::Incoming> {
    let listener = Listener::bind(address)?;
    println!("listening on {}", listener.local_address());
    Ok(listener.next(Duration::from_secs(3600))?)
}

fn domain(device: &str) -> Result<ProtectionDomain> {
    Ok(ProtectionDomain::new(&Device::by_name(device)?.open()?)?)
}

fn play(
    options: &Options,
    domain: &ProtectionDomain,
    first: bool,
    connect: impl FnOnce(&mut Connection, &RemoteRegion) -> Result<Vec<u8>>,
) -> Result<()> {
    let allocation = exporter::by_name(&options.exporter)?.allocate(4096)?;
    let region = register::register(domain, &allocation)?;
    let mapping = allocation.dmabuf.map()?;
    let mut connection =
        Connection::new(domain, ConnectionOptions { wait: Wait::Busy, ..Default::default() })?;
    let (peer, _) = RemoteRegion::split_from(&connect(&mut connection, &region.remote())?)?;

    // Ours goes out from 0, the peer's comes in at 64.
    let memory = mapping.begin(CpuAccess::ReadWrite)?;
    let (here, there) = (LocalRange::from(&region).range(0, 8)?, peer.range(64, 8)?);
    let mut tell = |number: u64| -> Result<()> {
        memory.write(0, &number.to_le_bytes())?;
        connection.write(here.clone(), there)?;
        Ok(())
    };
    let mut times = Vec::with_capacity(options.count as usize);
    for number in 1..=options.count {
        let start = Instant::now();
        if first {
            tell(number)?;
        }
        while seen(&memory)? != number {
            if start.elapsed() > LIMIT {
                return Err("the other side has stopped".into());
            }
        }
        if !first {
            tell(number)?;
        }
        times.push(start.elapsed());
    }
    if first {
        times.sort();
        let micros = |time: Duration| time.as_secs_f64() * 1e6 / 2.0;
        let at = |part: usize| micros(times[(times.len() - 1) * part / 100]);
        println!("one way: median {:.2} us, 99% {:.2} us, least {:.2} us", at(50), at(99), at(0));
    }
    Ok(())
}

fn seen(memory: &CpuGuard<'_>) -> Result<u64> {
    let mut bytes = [0; 8];
    memory.read(64, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
