//! Transfers of any length between two devices.

mod connecting;
mod endings;
mod faults;
mod ibverbs_peer;
mod limits;
mod moving;
mod mtu;
mod programs;
mod refusals;
mod rping;
