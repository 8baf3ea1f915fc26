//! Pushes the KV cache of a request from a prefill worker to a decode worker, layer by layer.
//!
//! ```text
//! kv_cache decode --listen 192.0.2.1       # the other host
//! kv_cache prefill --connect 192.0.2.1
//! ```
//!
//! Each worker keeps its cache in one dma-buf: for each layer a pool of pages. The pages of the request lie scattered on
//! both sides.
//!
//! 1. The decode worker replies to the connection with the description of its cache, and sends the indices of the pages
//!    that it has set aside.
//! 2. The prefill worker computes a layer, starts to write its pages, and computes the next one meanwhile.
//! 3. A notification tells the decode worker that a layer is complete. It verifies the pages of that layer while others
//!    arrive, and answers with their digest.
//! 4. The prefill worker compares the digest with that of its own pages.

mod cache;
#[path = "../common/exporter.rs"]
mod exporter;
#[path = "../common/register.rs"]
mod register;

use std::net::{SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use dmabuf_rdma::cm::{Listener, Outgoing};
use dmabuf_rdma::mr::{RegionSlice, RemoteSlice};
use dmabuf_rdma::transfer::{ConnectionOptions, Transfer};
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use dmabuf_rdma::{Connection, RemoteRegion};

use cache::Cache;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const TIMEOUT: Duration = Duration::from_secs(60);
/// The pool of the decode worker has so many times the pages of a request; the rest belongs to others.
const DECODE_SPARE: u32 = 2;
/// Timeout for a prefill worker to connect.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(3600);

#[derive(Parser)]
#[command(about = "Pushes a KV cache from a prefill to a decode worker over RDMA, layer by layer")]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Receive the pages of a request.
    Decode {
        #[command(flatten)]
        options: Options,
        /// Address of an RDMA device to listen on.
        #[arg(long)]
        listen: String,
    },
    /// Compute the pages of a request and push them.
    Prefill {
        #[command(flatten)]
        options: Options,
        /// Address that the decode worker listens on.
        #[arg(long)]
        connect: String,
    },
}

#[derive(Args)]
struct Options {
    #[arg(long, default_value_t = 18519)]
    port: u16,
    /// Layers of the model; the same on both sides, as the next two.
    #[arg(long, default_value_t = 8)]
    layers: u32,
    /// Pages of the request in each layer.
    #[arg(long, default_value_t = 2048)]
    pages: u32,
    /// Bytes of a page, a multiple of 8.
    #[arg(long, default_value_t = 16 << 10)]
    page_size: u64,
    /// The exporter of the cache: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M, drm:DRIVER.
    #[arg(long, default_value = "heap")]
    exporter: String,
}

fn main() -> ExitCode {
    let run = match Cli::parse().role {
        Role::Decode { options, listen } => decode(&options, &listen),
        Role::Prefill { options, connect } => prefill(&options, &connect),
    };
    if let Err(error) = run {
        eprintln!("kv_cache: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// One notification for each layer, and a few more.
fn connection(domain: &ProtectionDomain, options: &Options) -> Result<Connection> {
    Ok(Connection::new(domain, ConnectionOptions::default().notifications(options.layers + 1))?)
}

fn decode(options: &Options, host: &str) -> Result<()> {
    let listener = Listener::bind(address(host, options.port)?)?;
    println!("listening on {}", listener.local_addr());
    let incoming = listener.accept_request(ACCEPT_TIMEOUT)?;
    let domain = ProtectionDomain::new(&Device::by_name(&incoming.device_name())?.open()?)?;
    let cache = Cache::new(&domain, options, DECODE_SPARE)?;
    let mut connection = connection(&domain, options)?;
    incoming.accept(&mut connection, &cache.region.remote().to_bytes(), TIMEOUT)?;

    let indices = cache.scattered(7);
    cache.write_message(&indices)?;
    connection.send(cache.message()?)?.wait()?;

    let arrived = connection.notifications();
    for layer in 0..options.layers {
        arrived.wait(layer, 1, TIMEOUT)?;
        let digest = cache.verify(layer, &indices)?;
        connection.notify(layer, &digest.to_le_bytes())?.wait()?;
    }
    println!("received {} layers of {} pages, verified", options.layers, options.pages);
    Ok(())
}

fn prefill(options: &Options, host: &str) -> Result<()> {
    let outgoing = Outgoing::resolve(address(host, options.port)?, None, TIMEOUT)?;
    let domain = ProtectionDomain::new(&Device::by_name(&outgoing.device_name())?.open()?)?;
    let cache = Cache::new(&domain, options, 3)?;
    let mut connection = connection(&domain, options)?;
    let reply = outgoing.connect(&mut connection, &[], TIMEOUT)?;
    let (remote, _padding) = RemoteRegion::split_from(&reply)?;
    connection.recv(cache.message()?)?.timeout(TIMEOUT).wait()?;
    let (ours, theirs) = (cache.scattered(5), cache.read_message()?);

    // Made once, and used for every request: all pages, here and at the peer.
    let (size, their_pool) = (options.page_size, DECODE_SPARE as usize * options.pages as usize);
    let pages = RegionSlice::from(&cache.region).strided(size, size, cache.all_pages())?;
    let their_pages = RemoteSlice::from(remote).strided(size, size, options.layers as usize * their_pool)?;

    let start = Instant::now();
    let (digests, computing) = std::thread::scope(|scope| -> Result<_> {
        // Whoever waits makes progress, while this thread computes.
        let (pushing, pushed) = mpsc::channel::<Transfer>();
        let pusher = scope.spawn(move || pushed.iter().try_for_each(|layer| layer.wait().map(drop)));
        let (mut digests, mut computing) = (Vec::new(), Duration::ZERO);
        for layer in 0..options.layers {
            let began = Instant::now();
            digests.push(cache.compute(layer, &ours)?);
            computing += began.elapsed();
            let from = pages.select(cache.in_layer(layer, &ours))?;
            let to = theirs.iter().map(|page| layer as usize * their_pool + *page as usize);
            pushing.send(connection.write_notify(from, their_pages.select(to)?, layer)?)?;
        }
        drop(pushing);
        pusher.join().map_err(|_| "the thread that waits has panicked")??;
        Ok((digests, computing))
    })?;
    let took = start.elapsed();

    for (layer, digest) in (0..).zip(digests) {
        let answer = connection.notifications().take_timeout(TIMEOUT)?;
        if (answer.id, &answer.payload[..]) != (layer, &digest.to_le_bytes()) {
            return Err(format!("layer {layer} arrived with other bytes: {answer:?}").into());
        }
    }
    let blocks = u64::from(options.layers) * u64::from(options.pages);
    let (seconds, bytes) = (took.as_secs_f64(), blocks * options.page_size);
    println!(
        "pushed {} layers of {} pages in {seconds:.2} s, {:.2} s of them computing, verified: {:.0} blocks/s, {:.3} GiB/s",
        options.layers,
        options.pages,
        computing.as_secs_f64(),
        blocks as f64 / seconds,
        bytes as f64 / seconds / f64::from(1 << 30)
    );
    Ok(())
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    (host, port).to_socket_addrs()?.next().ok_or_else(|| format!("{host} has no address").into())
}
