//! `ping`: two sides take turns to write 8 bytes into each other's dma-buf.
//!
//! The sides describe their buffers to each other while they connect. Then each polls its own buffer, without
//! a pause, for the counter that the peer writes.

use std::time::{Duration, Instant};

use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::dmabuf::{CpuAccess, CpuGuard};
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use dmabuf_rdma::{Connection, DmaBuf, MemoryRegion, RemoteRegion};
use hdrhistogram::Histogram;

use crate::net::{ACCEPT_TIMEOUT, TIMEOUT, address};
use crate::{Result, exporter, register, ui};

/// Offsets in each buffer: of the counter that this side sends, and of the one that the peer writes.
const OURS: u64 = 0;
const THEIRS: u64 = 64;

/// Measure the latency of RDMA WRITEs of 8 bytes between two dma-bufs.
#[derive(clap::Args)]
pub struct Args {
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
    /// The exporter of the buffer.
    #[arg(long, default_value = "heap", help = format!("The exporter of the buffer: {}", exporter::NAMES))]
    exporter: String,
}

pub fn run(args: &Args) -> Result<()> {
    // The route to the address decides which RDMA device to use.
    if let Some(host) = &args.connect {
        let outgoing = Outgoing::resolve(address(host, args.port)?, None, TIMEOUT)?;
        let mut side = Side::new(&outgoing.device_name(), &args.exporter)?;
        let ours = side.region.remote().to_bytes();
        let theirs = outgoing.connect(&mut side.connection, &ours, TIMEOUT)?;
        return side.play(&theirs, args.count, true);
    }
    let host = args.listen.as_deref().ok_or("give --listen or --connect")?;
    let listener = Listener::bind(address(host, args.port)?)?;
    ui::listening(listener.local_addr());
    let incoming = listener.accept_request(ACCEPT_TIMEOUT)?;
    let mut side = Side::new(&incoming.device_name(), &args.exporter)?;
    let ours = side.region.remote().to_bytes();
    let theirs = incoming.private_data().to_vec();
    incoming.accept(&mut side.connection, &ours, TIMEOUT)?;
    side.play(&theirs, args.count, false)
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
        // Nanoseconds, to three digits.
        let mut times = Histogram::<u64>::new(3)?;
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
            times.record(start.elapsed().as_nanos() as u64)?;
        }
        if starts {
            let at = |quantile| micros(Duration::from_nanos(times.value_at_quantile(quantile)) / 2);
            ui::line(format!(
                "one way: median {:.2} us, 99% {:.2} us, 99.9% {:.2} us, minimum {:.2} us",
                at(0.5),
                at(0.99),
                at(0.999),
                micros(Duration::from_nanos(times.min()) / 2)
            ));
        }
        Ok(())
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn last_from_peer(memory: &CpuGuard<'_>) -> Result<u64> {
    let mut bytes = [0; 8];
    memory.read(THEIRS, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
