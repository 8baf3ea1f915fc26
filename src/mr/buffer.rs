//! What a registration registers: a dma-buf or host memory.

use crate::dmabuf::{BufferId, DmaBuf};
use crate::host::{self, HostBuffer};

/// A buffer to register, by reference: a [`DmaBuf`] or a [`HostBuffer`]. Both convert into it, so registering functions
/// take either.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Buffer<'a> {
    /// A dma-buf, which the device imports.
    DmaBuf(&'a DmaBuf),
    /// Host memory, which the kernel pins.
    Host(&'a HostBuffer),
}

impl Buffer<'_> {
    /// Size of the buffer in bytes.
    pub fn size(self) -> u64 {
        match self {
            Self::DmaBuf(dmabuf) => dmabuf.size(),
            Self::Host(host) => host.size(),
        }
    }

    /// The buffer's identity.
    pub fn id(self) -> BufferId {
        match self {
            Self::DmaBuf(dmabuf) => dmabuf.id(),
            Self::Host(host) => host.id(),
        }
    }

    /// Whether a device may be permitted to write it.
    pub fn is_writable(self) -> bool {
        match self {
            Self::DmaBuf(dmabuf) => dmabuf.is_writable(),
            Self::Host(host) => host.is_writable(),
        }
    }

    /// Bytes from the page boundary to the first byte; 0 for a dma-buf. An iova must be congruent to this plus the
    /// offset.
    pub(super) fn page_offset(self) -> u64 {
        match self {
            Self::DmaBuf(_) => 0,
            Self::Host(host) => host.page_offset(),
        }
    }

    /// Checks that host memory is there up to `end`, an offset in the buffer.
    pub(super) fn check_present(self, end: u64) -> Result<(), host::Error> {
        match self {
            Self::DmaBuf(_) => Ok(()),
            Self::Host(host) => host.check_present(end),
        }
    }

    /// What it is, for an error message.
    pub(super) fn describe(self) -> String {
        match self {
            Self::DmaBuf(dmabuf) => format!("a {:?} dma-buf", dmabuf.exporter_name().unwrap_or_default()),
            Self::Host(_) => "host memory".into(),
        }
    }
}

impl<'a> From<&'a DmaBuf> for Buffer<'a> {
    fn from(dmabuf: &'a DmaBuf) -> Self {
        Self::DmaBuf(dmabuf)
    }
}

impl<'a> From<&'a HostBuffer> for Buffer<'a> {
    fn from(host: &'a HostBuffer) -> Self {
        Self::Host(host)
    }
}
