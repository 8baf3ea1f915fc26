//! The roles of this program: the library, and the same queue pair with the loop of `by_hand.c`. Both register the
//! memory as a dma-buf.
//!
//! `unsafe` is here to call the loop.

use std::fs::{self, File};
use std::io::BufRead;
use std::path::Path;
use std::time::Instant;

use bench_bare::{Writes, write_blocks};
use dmabuf_rdma::exporter::Udmabuf;
use dmabuf_rdma::mr::{Access, RemoteSlice};
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{CompletionQueue, Device, Endpoint, ProtectionDomain, QueuePair, QueuePairOptions};
use dmabuf_rdma::{Connection, MemoryRegion, RegionSlice, RemoteRegion};
use serde::{Deserialize, Serialize};

use super::common::Result;
use super::process::MARK;
use super::{CHAIN, FAR_TABLE, WINDOW};

/// The option before a role's arguments.
pub const ROLE: &str = "--role";

/// What the sides exchange to connect.
#[derive(Serialize, Deserialize)]
struct Offer {
    endpoint: Endpoint,
    region: RemoteRegion,
}

/// Plays the role of these arguments: its name, then those of `side.py`.
pub fn play(words: &[String]) -> Result<()> {
    let [role, device, side, size, memory, table] = words else {
        return Err("a role has six arguments".into());
    };
    let domain = ProtectionDomain::new(&Device::by_name(device)?.open()?)?;
    let memfd = File::options().read(true).write(true).open(memory)?;
    let length = memfd.metadata()?.len();
    let buffer = Udmabuf::open()?.from_memfds([(memfd.into(), 0..length)])?.dmabuf;
    let region = MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register()?;
    let ours = offsets(Path::new(table))?;
    let theirs = match side.as_str() {
        "near" => offsets(Path::new(&std::env::var(FAR_TABLE)?))?,
        _ => Vec::new(),
    };
    let blocks = Tables { size: size.parse()?, ours, theirs };
    match role.as_str() {
        "hand" | "hand-polling" => by_hand(&domain, &region, blocks, role == "hand"),
        _ => library(&domain, &region, blocks, role == "library"),
    }
}

struct Tables {
    size: u64,
    ours: Vec<u64>,
    /// The far side's, on the near side.
    theirs: Vec<u64>,
}

fn library(domain: &ProtectionDomain, region: &MemoryRegion, tables: Tables, asleep: bool) -> Result<()> {
    let options = ConnectionOptions::default().window(WINDOW).chain(CHAIN).busy_poll(!asleep);
    let connection = Connection::new(domain, options)?;
    let peer = exchange(Offer { endpoint: connection.endpoint(), region: region.remote() })?;
    connection.connect(&peer.endpoint)?;
    if tables.theirs.is_empty() {
        return serve(|| Err("the far side does not write".into()));
    }
    let local = RegionSlice::from(region).blocks(tables.size, tables.ours)?;
    let remote = RemoteSlice::from(peer.region).blocks(tables.size, tables.theirs)?;
    serve(|| {
        let start = Instant::now();
        connection.write(&local, &remote)?.wait()?;
        Ok(start.elapsed().as_secs_f64())
    })
}

fn by_hand(domain: &ProtectionDomain, region: &MemoryRegion, tables: Tables, asleep: bool) -> Result<()> {
    let queue = CompletionQueue::new(domain.context(), 2 * WINDOW)?;
    let pair = QueuePair::new(domain, &queue, &queue, QueuePairOptions::default().send_depth(WINDOW))?;
    let endpoint = pair.endpoint().ok_or("a new queue pair has an endpoint")?;
    let peer = exchange(Offer { endpoint, region: region.remote() })?;
    pair.connect(&peer.endpoint)?;
    let run = peer.region.runs()[0];
    let local: Vec<u64> = tables.ours.iter().map(|offset| region.iova().0 + offset).collect();
    let remote: Vec<u64> = tables.theirs.iter().map(|offset| run.iova.0 + offset).collect();
    serve(|| {
        let writes = Writes {
            local: (&local, region.lkey().0),
            remote: (&remote, run.rkey.0),
            size: tables.size as u32,
            window: WINDOW.into(),
            chain: CHAIN.into(),
            asleep,
        };
        // SAFETY: the queue pair is connected and this is its only user; it has room for the window.
        let time =
            unsafe { write_blocks(pair.as_raw().as_ptr().cast(), queue.as_raw().as_ptr().cast(), writes) };
        Ok(time?.as_secs_f64())
    })
}

fn offsets(table: &Path) -> Result<Vec<u64>> {
    let words = fs::read(table)?;
    Ok(words.chunks_exact(8).map(|word| u64::from_le_bytes(std::array::from_fn(|at| word[at]))).collect())
}

fn exchange(offer: Offer) -> Result<Offer> {
    println!("{MARK}{}", serde_json::to_string(&offer)?);
    Ok(serde_json::from_str(&line()?.ok_or("the benchmark has ended")?)?)
}

/// Writes whenever the benchmark says so, and answers how many seconds that took.
fn serve(mut write: impl FnMut() -> Result<f64>) -> Result<()> {
    println!("{MARK}ready");
    while line()?.is_some() {
        println!("{MARK}{}", write()?);
    }
    Ok(())
}

fn line() -> Result<Option<String>> {
    let mut line = String::new();
    let length = std::io::stdin().lock().read_line(&mut line)?;
    Ok((length > 0).then_some(line))
}
