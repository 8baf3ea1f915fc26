//! Connections that transfer ranges of any length between local memory and a peer's.
//!
//! A [`Connection`] transfers between a [`RegionSlice`](crate::mr::RegionSlice) and a
//! [`RemoteSlice`](crate::mr::RemoteSlice), both with u64 lengths and possibly of several regions. It cuts the range
//! into messages at the message size and at the end of each remote run, gathers several local regions into one
//! work request, and keeps a bounded window of messages in flight. `docs/transfer.md` explains the rules.

mod connection;
mod error;
mod options;
mod request;
mod shared;
#[allow(clippy::module_inception)] // the type's name
mod transfer;
mod work_queue;

pub use connection::{Connection, Receiver, Sender};
pub use error::Error;
pub use options::ConnectionOptions;
pub use request::Request;
pub use transfer::{Transfer, Transferred};

pub(crate) use shared::Link;
