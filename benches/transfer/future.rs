//! What it costs to await a transfer in tokio instead of waiting for it.

use std::time::Instant;

use dmabuf_rdma::exporter::{DmaHeap, Exporter};
use dmabuf_rdma::mr::Access;
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use dmabuf_rdma::{Connection, MemoryRegion};
use tokio::runtime::Builder;

use super::common::{Peer, Result, Rows, Spread, pairs};
use super::{FAR, NEAR};

/// Writes of 8 bytes, one after the other, in each turn.
const WRITES: u32 = 200;

struct End {
    connection: Connection,
    region: MemoryRegion,
}

fn end(device: &str) -> Result<End> {
    let domain = ProtectionDomain::new(&Device::by_name(device)?.open()?)?;
    let connection = Connection::new(&domain, ConnectionOptions::default())?;
    let buffer = DmaHeap::open("system")?.allocate(4096)?.dmabuf;
    let region = MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register()?;
    Ok(End { connection, region })
}

/// Compares the two in microseconds a write. Each has a connection of its own.
pub fn measure(rows: &mut Rows, count: usize) -> Result<()> {
    let connected = || -> Result<(End, End)> {
        let (near, far) = (end(NEAR)?, end(FAR)?);
        near.connection.connect(&far.connection.endpoint())?;
        far.connection.connect(&near.connection.endpoint())?;
        Ok((near, far))
    };
    let (awaited, waited) = (connected()?, connected()?);
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let each = |start: Instant| start.elapsed().as_secs_f64() * 1e6 / f64::from(WRITES);
    let turns = pairs(
        count,
        || {
            let (near, far) = &awaited;
            let (local, remote) = (near.region.slice(..8)?, far.region.remote().slice(..8)?);
            runtime.block_on(async {
                let start = Instant::now();
                for _ in 0..WRITES {
                    near.connection.write(&local, &remote)?.await?;
                }
                Ok(each(start))
            })
        },
        || {
            let (near, far) = &waited;
            let (local, remote) = (near.region.slice(..8)?, far.region.remote().slice(..8)?);
            let start = Instant::now();
            for _ in 0..WRITES {
                near.connection.write(&local, &remote)?.wait()?;
            }
            Ok(each(start))
        },
    )?;
    let of = Spread::of(turns.iter().map(|turn| turn.library));
    rows.add("a write of 8 bytes that is awaited", "us", of, Some(Peer::of(&turns)), None)
}
