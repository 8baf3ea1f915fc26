//! Two ranks of an MPI program swap the contents of their dma-bufs over an RDMA connection of their own.
//!
//! ```text
//! mpirun -n 2 target/release/examples/mpi
//! ```
//!
//! MPI carries 96 bytes from each rank to the other: the endpoint of its queue pair and the description of
//! its memory. The data goes from dma-buf to dma-buf.

#[path = "../common/exporter.rs"]
mod exporter;
mod mpi;
#[path = "../common/register.rs"]
mod register;

use std::time::Duration;

use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Endpoint, ProtectionDomain, devices};
use dmabuf_rdma::{Connection, RemoteRegion};

use mpi::Mpi;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Bytes that each rank sends. Its buffer has them first, and behind them as many from the peer.
const SIZE: u64 = 16 << 20;

/// The notification that a rank's bytes have arrived.
const SWAPPED: u32 = 1;
const TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of a rank's message: an endpoint, and a description of one region.
const MESSAGE: usize = Endpoint::BYTES + 52;

fn main() -> Result<()> {
    let mpi = Mpi::init()?;
    let (rank, ranks) = (mpi.rank()?, mpi.size()?);
    if ranks != 2 {
        return Err(format!("this program runs as 2 ranks, not {ranks}: mpirun -n 2").into());
    }
    let peer = 1 - rank;
    // If the machine has several devices, each rank uses its own.
    let devices = devices()?;
    let device = devices.get(rank % devices.len().max(1)).ok_or("this machine has no RDMA device")?;
    let domain = ProtectionDomain::new(&device.open()?)?;
    let allocation = exporter::by_name("heap")?.allocate(2 * SIZE)?;
    let region = register::register(&domain, &allocation)?;
    let connection = Connection::new(&domain, ConnectionOptions::default().notifications(1))?;

    // Exchange what the two sides of the connection must know of each other.
    let mut message = connection.endpoint().to_bytes().to_vec();
    message.extend(region.remote().to_bytes());
    let messages = mpi.all_gather(&message)?;
    let (endpoint, description) = messages[peer * MESSAGE..][..MESSAGE].split_at(Endpoint::BYTES);
    connection.connect(&Endpoint::from_bytes(endpoint)?)?;
    let remote = RemoteRegion::from_bytes(description)?;
    // Neither rank may write before both have connected.
    mpi.barrier()?;

    // Both ranks write at once, each into the second half of the other's buffer. The peer's notification arrives after
    // its bytes.
    let mapping = allocation.dmabuf.map()?;
    mapping.write(0, &pattern(rank))?;
    let writing = connection.write_notify(region.slice(..SIZE)?, remote.slice(SIZE..)?, SWAPPED)?;
    connection.notifications().wait(SWAPPED, 1, TIMEOUT)?;
    writing.wait()?;

    let mut received = vec![0; SIZE as usize];
    mapping.read(SIZE, &mut received)?;
    if received != pattern(peer) {
        return Err(format!("rank {rank} received other bytes than rank {peer} sent").into());
    }
    println!("rank {rank} on {}: {} MiB to and from rank {peer}, verified", device.name(), SIZE >> 20);
    // Neither rank may end the connection before both have received.
    mpi.barrier()?;
    Ok(mpi.finalize()?)
}

/// The bytes that a rank sends.
fn pattern(rank: usize) -> Vec<u8> {
    (0..SIZE).map(|at| (at >> 12) as u8 ^ at as u8 ^ (rank as u8 + 1)).collect()
}
