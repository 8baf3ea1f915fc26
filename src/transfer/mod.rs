//! Descriptors of a peer's memory, and moving bytes of any length between it and ours.

mod remote;
mod wire;

pub use remote::{RemoteAddr, RemoteRange, RemoteRegion, RemoteRun};
