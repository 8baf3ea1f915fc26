//! Two ranks of an MPI program that move a dma-buf over a connection of their own.
//!
//! ```text
//! mpirun -n 2 target/release/examples/mpi
//! ```
//!
//! MPI carries 92 bytes from each rank to the other: where its queue pair is and what its memory is. All
//! else goes over that queue pair, in place.

#[path = "../common/exporter.rs"]
mod exporter;
mod mpi;
#[path = "../common/register.rs"]
mod register;

use std::process::ExitCode;

use dmabuf_rdma::RemoteRegion;
use dmabuf_rdma::transfer::Connection;
use dmabuf_rdma::verbs::{Endpoint, ProtectionDomain, devices};

use mpi::Mpi;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SIZE: u64 = 16 << 20;

/// What a rank tells: an endpoint, and a region of one run.
const CARD: usize = Endpoint::BYTES + 52;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mpi: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mpi = Mpi::init()?;
    let (rank, ranks) = (mpi.rank()?, mpi.size()?);
    if ranks != 2 {
        return Err("start it as two ranks: mpirun -n 2".into());
    }
    // One device a rank, where there are several.
    let devices = devices()?;
    let device = devices.get(rank % devices.len().max(1)).ok_or("this machine has no RDMA device")?;
    let domain = ProtectionDomain::new(&device.open()?)?;
    let allocation = exporter::by_name("heap")?.allocate(SIZE)?;
    let region = register::register(&domain, &allocation)?;
    let mut connection = Connection::new(&domain, Default::default())?;

    let mut card = connection.endpoint().to_bytes().to_vec();
    card.extend(region.remote().to_bytes());
    let cards = mpi.all_gather(&card)?;
    let peer = 1 - rank;
    let (endpoint, memory) = cards[peer * CARD..][..CARD].split_at(Endpoint::BYTES);
    connection.connect(&Endpoint::from_bytes(endpoint)?)?;
    let remote = RemoteRegion::from_bytes(memory)?;
    // Nobody sends before both are connected.
    mpi.barrier()?;

    // Rank 0 fills its buffer and writes it to rank 1, which writes it back changed.
    let mapping = allocation.dmabuf.map()?;
    let bytes = |seed: u8| -> Vec<u8> { (0..SIZE).map(|at| (at >> 12) as u8 ^ at as u8 ^ seed).collect() };
    let mut seen = vec![0; SIZE as usize];
    if rank == 0 {
        mapping.write(0, &bytes(1))?;
        connection.write_with_imm(&region, &remote, 1)?;
        connection.recv_imm()?;
        mapping.read(0, &mut seen)?;
    } else {
        connection.recv_imm()?;
        mapping.read(0, &mut seen)?;
        if seen != bytes(1) {
            return Err("other bytes came than rank 0 wrote".into());
        }
        mapping.write(0, &bytes(2))?;
        connection.write_with_imm(&region, &remote, 2)?;
        seen = bytes(2);
    }
    if seen != bytes(2) {
        return Err("other bytes came than rank 1 wrote".into());
    }
    println!("rank {rank} on {}: {} MiB to and from rank {peer}, verified", device.name(), SIZE >> 20);
    mpi.barrier()?;
    Ok(mpi.finalize()?)
}
