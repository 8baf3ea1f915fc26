//! Registers a buffer with any device.

use dmabuf_rdma::MemoryRegion;
use dmabuf_rdma::exporter::Allocation;
use dmabuf_rdma::mr::{Access, RegisterError};
use dmabuf_rdma::verbs::ProtectionDomain;

/// Registers the whole buffer for peers to read and write. If the device cannot import dma-bufs, it
/// registers the host pages behind a udmabuf instead; [`MemoryRegion::path`] says which path it took.
pub fn register(domain: &ProtectionDomain, allocation: &Allocation) -> Result<MemoryRegion, RegisterError> {
    let mut registration = MemoryRegion::builder(domain, &allocation.dmabuf)
        .access(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ);
    if let Some(backing) = &allocation.backing {
        registration = registration.host_mapping(backing);
    }
    registration.register()
}
