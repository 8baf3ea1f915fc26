//! Registers a buffer with any device.

use dmabuf_rdma::MemoryRegion;
use dmabuf_rdma::exporter::Allocation;
use dmabuf_rdma::mr::{Access, RegisterError};
use dmabuf_rdma::verbs::ProtectionDomain;

/// What peers usually may do.
pub const READ_WRITE: Access = Access::LOCAL_WRITE.union(Access::REMOTE_WRITE).union(Access::REMOTE_READ);

/// Registers the whole buffer for peers to read and write; see [`register_as`].
pub fn register(domain: &ProtectionDomain, allocation: &Allocation) -> Result<MemoryRegion, RegisterError> {
    register_as(domain, allocation, allocation.dmabuf.size(), READ_WRITE)
}

/// Registers the first `length` bytes. If the device cannot import dma-bufs, it registers the host pages behind a
/// udmabuf instead; [`MemoryRegion::path`] says which path it took.
pub fn register_as(
    domain: &ProtectionDomain,
    allocation: &Allocation,
    length: u64,
    access: Access,
) -> Result<MemoryRegion, RegisterError> {
    let mut registration = MemoryRegion::builder(domain, &allocation.dmabuf).range(..length).access(access);
    if let Some(backing) = &allocation.backing {
        registration = registration.host_mapping(backing);
    }
    registration.register()
}
