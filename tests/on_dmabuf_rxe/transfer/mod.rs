//! Transfers of any length between two devices.

mod asynchronous;
mod blocks;
mod connecting;
mod device_events;
pub mod endings;
mod faults;
mod ibverbs_peer;
mod in_flight;
mod limits;
mod lossy_blocks;
mod moving;
mod mtu;
mod notifications;
mod programs;
mod refusals;
mod rping;
