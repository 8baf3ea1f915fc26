//! Registering a range of a dma-buf as a memory region.
//!
//! [`MemoryRegion::builder`] checks what can be checked and tries the paths in order: [`Path::Verbs`],
//! [`Path::Uverbs`], and [`Path::HostMapping`] where the caller opted in. Which one it took is on the
//! region. [`probe`] asks a device beforehand.
//!
//! [`RegionSet`] registers any length as one region, in parallel chunks where it must, and on several
//! devices at once. [`RegionCache`] keeps registrations for the next request. `docs/registration.md` says
//! what each costs and promises.

mod access;
mod builder;
mod cache;
mod dma_handle;
mod parallel;
mod path;
mod probe;
mod region;
mod self_check;
mod set;

pub use access::Access;
pub use builder::MemoryRegionBuilder;
pub use cache::{CacheOptions, CachedRegion, Growth, RegionCache};
pub use dma_handle::{DmaHandle, DmaHandleOptions, TphMemory};
pub use path::Path;
pub use probe::{DmaBufSupport, Refusal, RefusalReason, probe};
pub use region::{DeregisterError, Lkey, MemoryRegion, Rkey};
pub use set::{DeregisterSetError, FdPolicy, Progress, RegionSet, RegionSetBuilder};

pub(crate) use cache::{PLACES, all_caches, own_place, shared_place};

#[cfg(test)]
mod tests;
