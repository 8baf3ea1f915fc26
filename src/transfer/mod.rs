//! Descriptors of a peer's memory, and moving bytes of any length between it and ours.
//!
//! A [`RemoteRegion`] says what a peer must know of memory; a [`Connection`] moves a [`LocalRange`] to or
//! from a [`RemoteRange`]. Both ranges have u64 lengths and may be of several regions. The connection
//! splits them at the ends of both sides' regions and at a message size, gathers small pieces into one
//! request, and keeps a bounded window under way.

mod connection;
mod lane;
mod local;
mod remote;
mod request;
mod running;
mod wire;

pub use connection::{Connection, ConnectionOptions, Receiver, Sender, Wait};
pub use local::LocalRange;
pub use remote::{RemoteAddr, RemoteRange, RemoteRegion, RemoteRun};
pub use request::Request;
pub use running::{Moved, Transfer};
