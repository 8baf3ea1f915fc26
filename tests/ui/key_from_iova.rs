//! An address is not a key, and a peer's key is not one of ours.

use dmabuf_rdma::MemoryRegion;
use dmabuf_rdma::verbs::Lkey;

fn post(_key: Lkey) {}

fn mixed_up(region: &MemoryRegion) {
    post(region.iova()); //~ E0308
    post(region.rkey()); //~ E0308
    post(region.len()); //~ E0308
    post(region.lkey());
}

fn main() {}
