//! `copy`: a file, or a pattern of any size, from a dma-buf to a dma-buf of another host.
//!
//! 1. The sender's request has the length and the size of a block.
//! 2. The receiver replies with its buffer of a few blocks, how many blocks of the file it has already, and their
//!    digest.
//! 3. The sender writes block after block and notifies the receiver of each, with its digest. The receiver verifies
//!    and saves the block, and gives its place back.
//! 4. At the end both compare the digest of all digests.

mod file;
mod receiver;
mod sender;

use std::path::PathBuf;

use clap::Subcommand;
use dmabuf_rdma::transfer::ConnectionOptions;

use crate::{Result, exporter, size};

/// Copy a file or a pattern to another host, from dma-buf to dma-buf, verified.
///
/// A copy that was interrupted goes on where it stopped: start both sides again. The receiver keeps what it has in
/// FILE.part.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Receive, and optionally save what comes as a file.
    Receive {
        #[command(flatten)]
        options: Options,
        /// Address of an RDMA device to listen on.
        #[arg(long)]
        listen: String,
        /// Save the received bytes in this file.
        #[arg(long)]
        to: Option<PathBuf>,
    },
    /// Send a file or a pattern.
    Send {
        #[command(flatten)]
        options: Options,
        /// Address that the receiver listens on.
        #[arg(long)]
        connect: String,
        /// File to send.
        #[arg(long, required_unless_present = "size")]
        file: Option<PathBuf>,
        /// Send a pattern of this size instead, such as 20G.
        #[arg(long, conflicts_with = "file", value_parser = size::parse_size)]
        size: Option<u64>,
        /// Size of a block, a multiple of 8.
        #[arg(long, default_value = "8M", value_parser = size::parse_size)]
        block: u64,
    },
}

#[derive(clap::Args)]
struct Options {
    #[arg(long, default_value_t = 18517)]
    port: u16,
    #[arg(long, default_value = "heap", help = format!("The exporter of the buffer: {}", exporter::NAMES))]
    exporter: String,
}

/// Blocks that each side's buffer holds.
const SLOTS: u64 = 4;
/// The largest block that a receiver takes.
const MAX_BLOCK: u64 = 1 << 30;

/// Notifications: a block is there (index, digest); all blocks are there (digest of the digests); a block's place is
/// free again (index).
const BLOCK: u32 = 1;
const END: u32 = 2;
const FREE: u32 = 3;

pub fn run(args: Args) -> Result<()> {
    match args.role {
        Role::Receive { options, listen, to } => receiver::receive(&options, &listen, to),
        Role::Send { options, connect, file, size, block } => {
            sender::send(&options, &connect, file, size, block)
        }
    }
}

fn connection_options() -> ConnectionOptions {
    // Both sides announce each block, and the end.
    ConnectionOptions::default().notifications(2 * SLOTS as u32)
}

/// The two numbers of a notification, or of a part of a request.
fn pair(bytes: &[u8]) -> Result<(u64, u64)> {
    let (first, rest) = bytes.split_first_chunk().ok_or("a message of the peer is too short")?;
    let second = rest.first_chunk().ok_or("a message of the peer is too short")?;
    Ok((u64::from_le_bytes(*first), u64::from_le_bytes(*second)))
}

fn pack(first: u64, second: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&second.to_le_bytes());
    bytes
}

/// The bytes of a block.
fn extent(index: u64, block: u64, length: u64) -> std::ops::Range<u64> {
    let start = index * block;
    start..length.min(start + block)
}
