//! The buffers of one side, all in one dma-buf.

use dmabuf_rdma::dmabuf::{BufferId, Mapping};
use dmabuf_rdma::mr::{Access, Rkey};
use dmabuf_rdma::transfer::{LocalRange, RemoteRegion, RemoteRun};
use dmabuf_rdma::verbs::ProtectionDomain;
use dmabuf_rdma::{Iova, MemoryRegion};

use crate::{Result, exporter, register};

/// Bytes of a ping: what the text before the data takes at the least, and the buffers of the other rping.
pub const SMALLEST: u64 = 16;
pub const LARGEST: u64 = (64 << 10) - 1;

/// Places in the dma-buf.
pub const PING: u64 = 0;
pub const PONG: u64 = 64 << 10;
const SENT: u64 = 128 << 10;
const RECEIVED: u64 = SENT + 4096;
const WHOLE: u64 = SENT + 8192;

/// What a client tells of a buffer: address (8 bytes), key (4), length (4), big-endian.
const NOTE: u64 = 16;

/// A dma-buf, registered and mapped.
pub struct Memory {
    region: MemoryRegion,
    mapping: Mapping,
}

impl Memory {
    pub fn new(domain: &ProtectionDomain, exporter: &str) -> Result<Self> {
        let make = || -> std::result::Result<Self, Box<dyn std::error::Error>> {
            let allocation = exporter::by_name(exporter)?.allocate(WHOLE)?;
            let region = register::register(domain, &allocation)?;
            Ok(Self { region, mapping: allocation.dmabuf.map()? })
        };
        make().map_err(|error| error.to_string().into())
    }

    pub fn range(&self, offset: u64, length: u64) -> Result<LocalRange<'_>> {
        Ok(LocalRange::from(&self.region).range(offset, length)?)
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.mapping.write(offset, bytes)?)
    }

    pub fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        self.mapping.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Where a note is put before it is sent, and where one is received.
    pub fn sent(&self) -> Result<LocalRange<'_>> {
        self.range(SENT, NOTE)
    }

    pub fn received(&self) -> Result<LocalRange<'_>> {
        self.range(RECEIVED, NOTE)
    }

    /// Writes the note about a range of this side's memory.
    pub fn put_note(&self, offset: u64, length: u64) -> Result<()> {
        let place = self.region.remote().at(offset, length)?;
        let mut note = [0; NOTE as usize];
        note[..8].copy_from_slice(&place.addr.to_be_bytes());
        note[8..12].copy_from_slice(&place.rkey.0.to_be_bytes());
        note[12..].copy_from_slice(&(length as u32).to_be_bytes());
        self.write(SENT, &note)
    }

    /// Reads the note that was received.
    pub fn note(&self) -> Result<RemoteRegion> {
        let note = self.read(RECEIVED, NOTE)?;
        let four = |at: usize| u32::from_be_bytes([note[at], note[at + 1], note[at + 2], note[at + 3]]);
        let addr = u64::from(four(0)) << 32 | u64::from(four(4));
        let length = four(12).into();
        if length > LARGEST + 1 {
            return Err(format!("the client has {length} bytes, and the buffer here {}", LARGEST + 1).into());
        }
        let run = RemoteRun { iova: Iova(addr), length, rkey: Rkey(four(8)) };
        // The note does not say what is permitted; the device will.
        Ok(RemoteRegion::new([run], Access::REMOTE, BufferId::UNKNOWN)?)
    }
}
