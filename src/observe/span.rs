//! Spans with the time they took.

use std::time::Instant;

use tracing::field::{Empty, display};
use tracing::{Level, Span, debug_span};

use crate::dmabuf::BufferId;
use crate::{Error, Result};

/// Whether anybody listens to spans. One load, and no code where the level is compiled out.
#[inline]
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

/// What a registration or its end is about.
pub(crate) struct About<'a> {
    pub device: &'a str,
    pub buffer: BufferId,
    pub offset: u64,
    pub length: u64,
}

/// Runs an action in a span of that name.
pub(crate) fn span<T>(
    registering: bool,
    about: About<'_>,
    action: impl FnOnce(&Span) -> Result<T>,
) -> Result<T> {
    let About { device, buffer, offset, length } = about;
    let span = if registering {
        region_span!("register", device, buffer = buffer.inode(), offset, length)
    } else {
        region_span!("deregister", device, buffer = buffer.inode(), offset, length)
    };
    timed(span, action)
}

/// The span of an exporter's allocation, until it is dropped.
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

/// Opens the span of an exporter's allocation, where anybody listens. The buffer is recorded in it when
/// its descriptor is taken.
pub(crate) fn exporting(exporter: impl FnOnce() -> String, size: u64) -> Option<Exporting> {
    listening().then(|| {
        let exporter = exporter();
        let span =
            debug_span!(target: "dmabuf_rdma", "export", exporter, size, buffer = Empty, duration = Empty);
        Exporting { span: span.entered(), start: Instant::now() }
    })
}

fn timed<T>(span: Span, action: impl FnOnce(&Span) -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = span.in_scope(|| action(&span));
    span.record("duration", start.elapsed().as_micros() as u64);
    if let Err(error) = &result {
        record_error(&span, error);
    }
    result
}

fn record_error(span: &Span, error: &Error) {
    span.record("error", display(error));
}
