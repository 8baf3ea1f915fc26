//! Registering a range of a dma-buf as a memory region.
//!
//! [`MemoryRegion::builder`] checks what can be checked and tries the paths in order: [`Path::Verbs`],
//! [`Path::Uverbs`], and [`Path::HostMapping`] where the caller opted in. Which one it took is on the
//! region. [`probe`] asks a device beforehand.

mod access;
mod builder;
mod path;
mod probe;
mod region;

pub use access::Access;
pub use builder::MemoryRegionBuilder;
pub use path::Path;
pub use probe::{DmaBufSupport, Refusal, RefusalReason, probe};
pub use region::{DeregisterError, Lkey, MemoryRegion, Rkey};
