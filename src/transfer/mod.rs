//! Connections that transfer ranges of any length, and tables of blocks, between local memory and a peer's.
//!
//! A [`Connection`] cuts a transfer into messages at the message size and at the end of each remote run, gathers several
//! local pieces into one work request, and keeps a bounded window of messages in flight. Any number of [`Transfer`]s
//! may be in flight; each owns handles of its memory. `docs/transfer.md` explains the rules.

mod arrivals;
mod connection;
#[cfg(feature = "tokio")]
mod driver;
// Moves the jobs of all connections of a worker: a job is a transfer in its work queue.
mod engine;
mod error;
mod events;
mod flush;
mod half;
mod job;
mod notifications;
mod options;
mod pair;
mod pool;
mod queues;
mod request;
mod request_error;
mod shared;
mod state;
#[allow(clippy::module_inception)] // the type's name
mod transfer;
mod work_queue;
mod worker;

pub use connection::Connection;
pub use error::Error;
pub use half::{Receiver, Sender};
pub use notifications::{Notification, Notifications};
pub use options::{ConnectionOptions, WorkerOptions};
pub use request_error::RequestError;
pub use transfer::{Transfer, Transferred};
pub use worker::Worker;

#[cfg(feature = "tokio")]
pub(crate) use driver::watch;
pub(crate) use shared::{Link, Peer};

#[cfg(test)]
mod tests;
