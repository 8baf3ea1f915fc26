//! The buffers of one side, all in one dma-buf.

use dma_sg::RangeError;
use dmabuf_rdma::dmabuf::{self, BufferId, Mapping};
use dmabuf_rdma::mr::{Access, RemoteRun};
use dmabuf_rdma::verbs::{ProtectionDomain, Rkey};
use dmabuf_rdma::{Iova, MemoryRegion, RegionSlice, RemoteRegion};

use crate::{Result, exporter, register};

/// Bytes of a ping: at least the text before its data, at most what the other rping's buffers hold.
pub const SMALLEST: u64 = 16;
pub const LARGEST: u64 = (64 << 10) - 1;

/// Offsets in the dma-buf.
pub const PING: u64 = 0;
pub const PONG: u64 = 64 << 10;
const OUTBOX: u64 = 128 << 10;
const INBOX: u64 = OUTBOX + 4096;
const SIZE: u64 = OUTBOX + 8192;

/// Bytes of each message: the address (8 bytes), key (4) and length (4) of a client's buffer, big-endian. The
/// server's messages have no contents.
const MESSAGE: u64 = 16;

/// A dma-buf, registered and mapped.
pub struct Memory {
    region: MemoryRegion,
    mapping: Mapping,
}

impl Memory {
    pub fn new(domain: &ProtectionDomain, exporter: &str) -> Result<Self> {
        let allocation = exporter::by_name(exporter)?.allocate(SIZE)?;
        let region = register::register(domain, &allocation)?;
        Ok(Self { region, mapping: allocation.dmabuf.map()? })
    }

    pub fn slice(&self, offset: u64, length: u64) -> Result<RegionSlice, RangeError> {
        self.region.slice(offset..offset + length)
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), dmabuf::Error> {
        self.mapping.write(offset, bytes)
    }

    pub fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>, dmabuf::Error> {
        let mut bytes = vec![0; length as usize];
        self.mapping.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// The message to send.
    pub fn outbox(&self) -> Result<RegionSlice, RangeError> {
        self.slice(OUTBOX, MESSAGE)
    }

    /// Where a message is received.
    pub fn inbox(&self) -> Result<RegionSlice, RangeError> {
        self.slice(INBOX, MESSAGE)
    }

    /// Describes a range of this memory in the outbox.
    pub fn put_description(&self, offset: u64, length: u64) -> Result<()> {
        let place = self.region.remote().slice(offset..offset + length)?.addr()?;
        let mut message = [0; MESSAGE as usize];
        message[..8].copy_from_slice(&place.addr.to_be_bytes());
        message[8..12].copy_from_slice(&place.rkey.0.to_be_bytes());
        message[12..].copy_from_slice(&(length as u32).to_be_bytes());
        Ok(self.write(OUTBOX, &message)?)
    }

    /// The client's buffer that the message in the inbox describes.
    pub fn described(&self) -> Result<RemoteRegion> {
        let message = self.read(INBOX, MESSAGE)?;
        let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|byte| message[at + byte]));
        let (addr, rkey) = (u64::from(word(0)) << 32 | u64::from(word(4)), word(8));
        let length = u64::from(word(12));
        if length > LARGEST + 1 {
            let message = format!("the client's buffer has {length} bytes, this one only {}", LARGEST + 1);
            return Err(message.into());
        }
        let run = RemoteRun { iova: Iova(addr), length, rkey: Rkey(rkey) };
        // The message does not say what the key permits; the client's device checks it.
        Ok(RemoteRegion::new([run], Access::REMOTE, BufferId::UNKNOWN)?)
    }
}
