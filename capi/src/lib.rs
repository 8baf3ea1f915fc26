//! The C library `libdmabuf_rdma`. `cargo xtask api --update` writes `include/dmabuf_rdma.h` from this source.
//!
//! Every exported function runs its body in [`status::call`], which catches panics and keeps the error, or in
//! [`status::query`], which returns a value. `unsafe` is here for what C passes: each body relies on the rules that the header
//! states for handles, pointers and strings (`capi/cbindgen.toml`), and checks for NULL.

#[macro_use]
mod handle;

mod address;
mod arguments;
mod blocks;
mod connection;
mod domain;
mod notifications;
mod queue_pair;
mod region;
mod remote;
mod status;
#[cfg(test)]
mod tests;
mod transfer;

use address::{drdma_incoming, drdma_listener};
use blocks::drdma_blocks;
use connection::drdma_connection;
use domain::drdma_domain;
use queue_pair::drdma_queue_pair;
use region::drdma_region;
use remote::drdma_remote;
use transfer::drdma_transfer;

handles! {
    1 drdma_domain: domain::Domain;
    2 drdma_region: dmabuf_rdma::RegionSlice;
    3 drdma_remote: dmabuf_rdma::RemoteSlice;
    4 drdma_blocks: blocks::Table;
    5 drdma_connection: connection::Connection;
    6 drdma_transfer: dmabuf_rdma::Transfer;
    7 drdma_listener: dmabuf_rdma::cm::Listener;
    8 drdma_incoming: address::Incoming;
    9 drdma_queue_pair: dmabuf_rdma::verbs::QueuePair;
}
