//! What the library holds and does: a snapshot of gauges, and spans.
//!
//! [`gauges`] counts, for the whole process, regions and bytes mapped by path, dma-buf descriptors, and
//! what the caches did. With the feature `metrics`, `publish` hands the same figures to the recorder of
//! the `metrics` crate.
//!
//! Spans of `tracing`, level DEBUG, target `dmabuf_rdma`; a duration is in microseconds:
//!
//! | span | fields |
//! |---|---|
//! | `export` | exporter, size, buffer, duration |
//! | `register` | device, buffer, offset, length, path, lkey, duration, error |
//! | `deregister` | device, buffer, offset, length, path, lkey, duration, error |
//!
//! They cost one load where nobody listens. A subscriber that logs the closing of spans
//! (`FmtSpan::CLOSE`) prints a line for each.

mod fork;
mod gauges;
#[cfg(feature = "metrics")]
mod publish;
mod span;

pub use gauges::{ByPath, CacheGauges, Gauges, PathGauges, gauges};
#[cfg(feature = "metrics")]
pub use publish::publish;

pub(crate) use fork::{generation, watch_forks};
pub(crate) use gauges::{HeldFd, count_region, discount_region};
pub(crate) use span::{About, exporting, listening, span};
