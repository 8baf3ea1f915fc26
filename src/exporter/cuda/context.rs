//! Primary contexts.
//!
//! `unsafe` is here for the functions in `api.rs` that require something of their caller.

use std::sync::Arc;

use super::api::{Answer, Context};
use super::{Driver, Heap, no_device};
use crate::exporter::PointerError;
use crate::observe::Process;

/// A retained primary context of a GPU. CUDA frees the context's memory when its last user releases it.
#[derive(Debug)]
pub(super) struct Primary {
    driver: Arc<Driver>,
    device: i32,
    /// A `CUcontext` as an integer, which is `Send`.
    context: usize,
    creator: Process,
}

impl Primary {
    pub(super) fn retain(driver: &Arc<Driver>, ordinal: usize) -> Result<Self, PointerError> {
        let device = driver.devices.get(ordinal).ok_or_else(no_device)?.handle;
        let context = driver.api.retain(device).map_err(|refused| driver.api.error(refused))?;
        let (context, creator) = (context as usize, Process::current());
        Ok(Self { driver: Arc::clone(driver), device, context, creator })
    }

    /// Runs a closure with the context current.
    pub(super) fn inside<T>(&self, run: impl FnOnce() -> Answer<T>) -> Result<T, PointerError> {
        let api = &self.driver.api;
        let error = |refused| api.error(refused);
        // SAFETY: `self` retains the context and outlives the guard.
        let _entered = unsafe { api.enter(self.context as Context) }.map_err(error)?;
        run().map_err(error)
    }
}

impl Heap for Primary {
    fn free(&self, address: u64) {
        // SAFETY: `DeviceMemory`, the only owner of this allocation, calls this once.
        if let Err(error) = self.inside(|| unsafe { self.driver.api.free(address) }) {
            tracing::warn!(%error, "cannot free GPU memory");
        }
    }

    fn fill(&self, address: u64, word: u32, count: usize) -> Result<(), PointerError> {
        // SAFETY: `DeviceMemory` owns the words and checked the range.
        self.inside(|| unsafe { self.driver.api.fill(address, word, count) })
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        if !self.creator.is_current() {
            return;
        }
        if let Err(refused) = self.driver.api.release(self.device) {
            tracing::warn!(error = %self.driver.api.error(refused), "cannot release a CUDA context");
        }
    }
}
