//! The receives of a worker: a shared receive queue that is kept filled, for the notifications of all its connections.

use super::Notifications;
use super::error::Result;
use crate::exporter::udmabuf::PageKind;
use crate::host::{self, HostBuffer};
use crate::mr::{Access, MemoryRegion, RegionSlice, RegisterError, SliceCursor};
use crate::verbs::{self, Context, ProtectionDomain, RecvBatch, SharedReceiveQueue, ffi};

/// Bytes of a receive.
const SLOT: u64 = Notifications::MAX_PAYLOAD as u64;

/// Maximum number of receives in a chain.
const CHAIN: usize = 64;

/// The bit of a receive's identifier that tells it from the work requests of connections.
const BIT: u64 = 1 << 62;

pub(super) struct Pool {
    pub queue: SharedReceiveQueue,
    batch: RecvBatch,
    /// Numbers of the receives that are not posted.
    free: Vec<u32>,
    buffer: HostBuffer,
    slice: RegionSlice,
    context: Context,
}

impl Pool {
    /// Posts `depth` receives.
    pub(super) fn new(domain: &ProtectionDomain, depth: u32) -> Result<Self> {
        let queue = SharedReceiveQueue::new(domain, depth)?;
        let buffer =
            HostBuffer::allocate(u64::from(depth) * SLOT, PageKind::Base).map_err(RegisterError::from);
        let region = buffer.and_then(|buffer| {
            let region = MemoryRegion::builder(domain, &buffer).access(Access::LOCAL_WRITE).register()?;
            Ok((buffer, region))
        });
        let (buffer, region) = region.map_err(Box::new)?;
        let mut pool = Self {
            queue,
            batch: RecvBatch::new(CHAIN, 1),
            free: (0..depth).collect(),
            buffer,
            slice: region.into(),
            context: domain.context().clone(),
        };
        pool.refill()?;
        Ok(pool)
    }

    /// Number of receives.
    pub(super) fn depth(&self) -> usize {
        (self.slice.len() / SLOT) as usize
    }

    /// The number of the receive that a completion is of; `None` if it is of a connection's work request.
    pub(super) fn slot(completion: &ffi::ibv_wc) -> Option<u32> {
        (completion.wr_id() & BIT != 0).then_some(completion.wr_id() as u32)
    }

    /// The payload that a receive has got.
    pub(super) fn payload(&self, slot: u32, length: u64) -> Result<Vec<u8>, host::Error> {
        let mut payload = vec![0; length.min(SLOT) as usize];
        if !payload.is_empty() {
            self.buffer.read(u64::from(slot) * SLOT, &mut payload)?;
        }
        Ok(payload)
    }

    /// Has a receive posted again by the next `refill`.
    pub(super) fn free(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Posts all receives that are free.
    pub(super) fn refill(&mut self) -> Result<(), verbs::Error> {
        while !self.free.is_empty() {
            for slot in self.free.drain(self.free.len().saturating_sub(CHAIN)..) {
                let (wr, elements) = self.batch.next();
                let mut cursor = SliceCursor::new(&self.slice, u64::from(slot) * SLOT);
                let mut sges = 0;
                cursor.gather(&self.slice, SLOT, elements, &mut sges);
                (wr.wr_id, wr.num_sge) = (BIT | u64::from(slot), sges as i32);
                self.batch.add();
            }
            let failed = self.context.failed("post the receives of notifications");
            self.batch.post_shared(&self.queue).map_err(failed)?;
        }
        Ok(())
    }
}
