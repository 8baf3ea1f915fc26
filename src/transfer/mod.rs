//! Descriptors of a peer's memory.

mod remote;

pub use remote::{RemoteAddr, RemoteRegion};
