//! No reference to memory that a device may write: a mapping copies bytes in and out.

use dmabuf_rdma::dmabuf::Mapping;

fn borrow(mapping: &Mapping) {
    let _: &[u8] = mapping.as_slice(); //~ E0599
    let _: &[u8] = mapping.as_ref(); //~ E0599
    let _: &[u8] = &mapping[..]; //~ E0608
    let _: &[u8] = &**mapping; //~ E0614
}

fn main() {}
