//! The gauges through the `metrics` crate.

use metrics::{counter, gauge};

use super::{Gauges, gauges};

/// Hands the figures of [`gauges`] to the recorder of the `metrics` crate and returns them. Call it at each
/// scrape, or every few seconds.
///
/// | metric | kind | label |
/// |---|---|---|
/// | `dmabuf_rdma_regions`, `dmabuf_rdma_mapped_bytes` | gauge | `path` |
/// | `dmabuf_rdma_fds`, `dmabuf_rdma_cache_entries`, `dmabuf_rdma_cache_bytes` | gauge | |
/// | `dmabuf_rdma_cache_hits`, `_misses`, `_evictions` | counter | |
/// | `dmabuf_rdma_cache_registering_microseconds` | counter | |
pub fn publish() -> Gauges {
    let now = gauges();
    for (path, of) in now.by_path() {
        gauge!("dmabuf_rdma_regions", "path" => path).set(of.regions as f64);
        gauge!("dmabuf_rdma_mapped_bytes", "path" => path).set(of.bytes as f64);
    }
    gauge!("dmabuf_rdma_fds").set(now.fds as f64);
    let cache = now.cache;
    gauge!("dmabuf_rdma_cache_entries").set(cache.entries as f64);
    gauge!("dmabuf_rdma_cache_bytes").set(cache.bytes as f64);
    counter!("dmabuf_rdma_cache_hits").absolute(cache.hits);
    counter!("dmabuf_rdma_cache_misses").absolute(cache.misses);
    counter!("dmabuf_rdma_cache_evictions").absolute(cache.evictions);
    let microseconds = u64::try_from(cache.registering.as_micros()).unwrap_or(u64::MAX);
    counter!("dmabuf_rdma_cache_registering_microseconds").absolute(microseconds);
    now
}
