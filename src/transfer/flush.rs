//! Makes received bytes visible to a GPU, by a read of the same device.

use std::sync::{Mutex, PoisonError};

use super::RequestError;
use super::error::Result;
use crate::mr::{Loopback, RegionSlice};
use crate::verbs::ProtectionDomain;

/// The queue pair for flushes, created by the first one.
#[derive(Default)]
pub(super) struct Flush {
    loopback: Mutex<Option<Loopback>>,
}

impl Flush {
    /// Reads the last byte of each region of the slice.
    pub(super) fn read(&self, domain: &ProtectionDomain, slice: &RegionSlice) -> Result<()> {
        let mut offset = 0;
        for segment in slice.segments() {
            if segment.region.domain().id() != domain.id() {
                return Err(RequestError::ForeignRegion { offset }.into());
            }
            offset += segment.length;
        }
        let mut loopback = self.loopback.lock().unwrap_or_else(PoisonError::into_inner);
        // A failed read leaves the queue pair in the error state: it is kept only after a success.
        let present = match loopback.take() {
            Some(present) => present,
            None => Loopback::new(domain)?,
        };
        for segment in slice.segments() {
            present.touch(segment.region, segment.offset + segment.length - 1)?;
        }
        *loopback = Some(present);
        Ok(())
    }
}
