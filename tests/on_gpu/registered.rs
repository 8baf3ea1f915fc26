//! For machines that also have an RDMA device.

use dmabuf_rdma::exporter::Runtime;
use dmabuf_rdma::mr::{Access, RegionCache};

use super::{each_cuda, gpus};
use crate::common::cuda::Segment;
use crate::common::gpu;
use crate::common::peers::domain;
use crate::common::report::say;

#[test]
fn a_sub_allocation_crosses_the_wire() {
    gpus().iter().for_each(|gpu| gpu::a_sub_allocation_crosses_the_wire(gpu.as_ref()));
}

#[test]
fn tensors_of_a_pool_are_one_region() {
    for gpu in gpus() {
        let (domain, cache) = (domain(), RegionCache::default());
        let memory = gpu.memory(64 << 20).unwrap();
        let start = std::time::Instant::now();
        for tensor in 0..10_000 {
            let address = memory.address() + tensor * 4096;
            cache.get_pointer(&domain, gpu.as_ref(), address, 4000, Access::REMOTE).unwrap();
        }
        let each = start.elapsed() / 10_000;
        say(&format!("note: {}: {each:?} for each of 10000 look-ups", Runtime::name(gpu.as_ref())));
        assert_eq!((cache.gauges().misses, cache.gauges().entries), (1, 1));
    }
}

#[test]
fn a_segment_that_is_mapped_anew_is_registered_anew() {
    each_cuda(|cuda, driver, ordinal| {
        let (domain, cache) = (domain(), RegionCache::default());
        let mut segment = Segment::reserve(driver, ordinal, 2);
        if let Err(reason) = segment.map(0, true) {
            return say(&format!("note: GPU {ordinal}: no mapped memory: {reason}"));
        }
        let get = |at| cache.get_pointer(&domain, cuda, at, 4096, Access::REMOTE).unwrap().region().rkey();
        let key = get(segment.base);
        assert_eq!(get(segment.base + 4096), key);
        segment.unmap(0);
        segment.map(0, true).unwrap();
        assert_ne!(get(segment.base), key, "a stale key");
        assert_eq!((cache.gauges().entries, cache.gauges().misses), (1, 2));
    });
}
