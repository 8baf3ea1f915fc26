//! Spans with their duration.

use std::fmt::Display;
use std::time::Instant;

use tracing::field::{Empty, display};
use tracing::{Level, Span, debug_span};

/// Whether a subscriber listens to spans. One load, and no code if the level is compiled out.
pub(crate) fn listening() -> bool {
    tracing::level_enabled!(Level::DEBUG)
}

/// A span of a region: "register" or "deregister".
macro_rules! region_span {
    ($name:literal, $($field:tt)*) => {
        debug_span!(
            target: "dmabuf_rdma", $name, $($field)*, path = Empty, lkey = Empty, duration = Empty, error = Empty
        )
    };
}

/// The range that a registration or a deregistration is about.
pub(crate) struct SpanFields<'a> {
    pub device: &'a str,
    /// Inode of the dma-buf.
    pub buffer: u64,
    pub offset: u64,
    pub length: u64,
}

/// Runs an action in a span named "register" or "deregister".
pub(crate) fn span<T, E: Display>(
    registering: bool,
    fields: SpanFields<'_>,
    action: impl FnOnce(&Span) -> Result<T, E>,
) -> Result<T, E> {
    let SpanFields { device, buffer, offset, length } = fields;
    let span = if registering {
        region_span!("register", device, buffer, offset, length)
    } else {
        region_span!("deregister", device, buffer, offset, length)
    };
    timed(span, action)
}

/// The span of an exporter's allocation. Dropping it ends the span.
#[must_use]
pub(crate) struct Exporting {
    span: tracing::span::EnteredSpan,
    start: Instant,
}

impl Drop for Exporting {
    fn drop(&mut self) {
        self.span.record("duration", self.start.elapsed().as_micros() as u64);
    }
}

/// Opens the span of an exporter's allocation if a subscriber listens. `DmaBuf::from_fd` records the buffer in
/// it.
pub(crate) fn exporting(exporter: impl FnOnce() -> String, size: u64) -> Option<Exporting> {
    listening().then(|| {
        let exporter = exporter();
        let span =
            debug_span!(target: "dmabuf_rdma", "export", exporter, size, buffer = Empty, duration = Empty);
        Exporting { span: span.entered(), start: Instant::now() }
    })
}

fn timed<T, E: Display>(span: Span, action: impl FnOnce(&Span) -> Result<T, E>) -> Result<T, E> {
    let start = Instant::now();
    let result = span.in_scope(|| action(&span));
    span.record("duration", start.elapsed().as_micros() as u64);
    if let Err(error) = &result {
        span.record("error", display(error));
    }
    result
}
