//! Moving ranges of any length between two devices.

mod connecting;
mod faults;
mod ibverbs_peer;
mod limits;
mod moving;
mod programs;
mod refusals;
mod rping;
