//! A real NVIDIA GPU of this machine: `cargo xtask test --gpu`. Without one, these tests fail.

use dmabuf_rdma::exporter::{Cuda, Exporter, Runtime, Runtimes};

use crate::common::gpu::{self, Gpu};

fn cuda() -> Cuda {
    Cuda::load().expect("`--gpu` needs an NVIDIA GPU and its driver")
}

#[test]
fn sub_allocations_come_out_exact() {
    gpu::sub_allocations_come_out_exact(&cuda());
}

#[test]
fn wrong_pointers_are_refused() {
    gpu::wrong_pointers_are_refused(&cuda());
}

#[test]
fn exports_leave_no_descriptors() {
    gpu::exports_leave_no_descriptors(&cuda());
}

#[test]
fn allocates() {
    gpu::allocates(&cuda());
}

#[test]
fn an_allocation_has_an_identity_of_its_own() {
    let cuda = cuda();
    let (one, other) = (cuda.memory(2 << 20).unwrap(), cuda.memory(2 << 20).unwrap());
    let id = |address| cuda.find(address).unwrap().unwrap().id.expect("CUDA numbers allocations");
    assert_eq!(id(one.address()), id(one.address() + 4096));
    assert_ne!(id(one.address()), id(other.address()));
    let before = id(one.address());
    drop(one);
    let again = cuda.memory(2 << 20).unwrap();
    assert_ne!(id(again.address()), before, "CUDA does not reuse a number");
}

#[test]
fn the_loaded_driver_finds_its_memory() {
    let cuda = cuda();
    assert!(cuda.devices().all(|address| address.is_some()), "{cuda:?}");
    let memory = cuda.memory(1 << 20).unwrap();
    let all = Runtimes::loaded().unwrap();
    assert!(all.names().any(|name| name == Runtime::name(&cuda)));
    assert_eq!(all.find(memory.address()).unwrap().unwrap().base, memory.address());
    assert!(Exporter::name(&cuda).starts_with("CUDA device 0"));
}

/// For machines that also have an RDMA device.
mod registered {
    use super::*;

    #[test]
    fn a_sub_allocation_crosses_the_wire() {
        gpu::a_sub_allocation_crosses_the_wire(&cuda());
    }
}
