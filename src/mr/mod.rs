//! Registration: memory regions, sets of regions, the cache, and descriptions for a peer.
//!
//! - [`MemoryRegion::builder`] checks its arguments and registers a range of a [`Buffer`]. For a dma-buf it tries
//!   [`Path::Verbs`], then [`Path::Uverbs`], then [`Path::HostMapping`] if the caller permits it;
//!   [`MemoryRegion::path`] is the one that succeeded. [`probe`] tells in advance which path a device has. Host memory
//!   has one path, [`Path::HostMemory`].
//! - [`RegionSet`] registers a range of any length as one region or as chunks, in parallel, on one device or on
//!   several.
//! - [`RegionCache`] keeps registrations for later requests.
//!
//! All of them give a [`RegionSlice`], which transfers and work requests take. A [`RemoteRegion`] describes the
//! same memory to a peer. `docs/registration.md` explains costs and guarantees.

mod access;
mod blocks;
mod buffer;
mod builder;
mod cache;
mod error;
mod parallel;
mod path;
mod probe;
mod region;
mod remote;
mod self_check;
mod set;
mod slice;
mod umem;

pub use access::Access;
pub use blocks::Blocks;
pub use buffer::Buffer;
pub use builder::MemoryRegionBuilder;
pub use cache::{CacheOptions, Growth, RegionCache};
pub use error::{DeregisterError, RegisterError, SelfCheckError, SetError, SliceError};
pub use path::Path;
pub use probe::{Refusal, probe, probe_path};
pub use region::MemoryRegion;
pub use remote::{RemoteRegion, RemoteRun, RemoteSlice};
pub use set::{RegionSet, RegionSetBuilder};
pub use slice::RegionSlice;
pub use umem::Umem;

pub(crate) use remote::RemoteCursor;
pub(crate) use self_check::Loopback;
pub(crate) use slice::SliceCursor;

#[cfg(test)]
pub(crate) mod tests;
