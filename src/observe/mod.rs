//! Gauges of what the library holds, and `tracing` spans of what it does.
//!
//! [`gauges`] is a snapshot for the whole process: regions and mapped bytes for each path, dma-buf descriptors,
//! and the caches' activity. With the feature `metrics`, `publish` hands the same figures to the recorder of the
//! `metrics` crate.
//!
//! The spans have level DEBUG and target `dmabuf_rdma`; durations are in microseconds:
//!
//! | span | fields |
//! |---|---|
//! | `export` | exporter, size, buffer, duration |
//! | `register` | device, buffer, offset, length, path, lkey, duration, error |
//! | `deregister` | device, buffer, offset, length, path, lkey, duration, error |
//!
//! `buffer` is the inode of the dma-buf, or the number of the host memory. Without a subscriber a span costs one load. A subscriber that logs closed
//! spans (`FmtSpan::CLOSE`) prints one line per span.

mod fork;
mod gauges;
#[cfg(feature = "metrics")]
mod publish;
mod span;

pub use gauges::{CacheGauges, Gauges, RegionGauges, gauges};
#[cfg(feature = "metrics")]
pub use publish::publish;

pub(crate) use fork::Process;
#[cfg(test)]
pub(crate) use fork::tests::in_a_child;
pub(crate) use gauges::{
    CountedCache, DATA_DIRECT, HOST_MAPPING, HOST_MEMORY, HeldFd, RegionCounter, UVERBS, VERBS, VERBS_EX,
    count_cache, remember_cache,
};
pub(crate) use span::{SpanFields, exporting, listening, span};
