//! Registering what an exporter made, on whatever device there is.

use std::error::Error;

use dmabuf_rdma::MemoryRegion;
use dmabuf_rdma::exporter::Allocation;
use dmabuf_rdma::mr::{Access, probe};
use dmabuf_rdma::verbs::ProtectionDomain;

/// All of the buffer, for peers to read and write. A device that cannot import is served from the host
/// pages, where there are any; the region says which path it was.
pub fn register(domain: &ProtectionDomain, allocation: &Allocation) -> Result<MemoryRegion, Box<dyn Error>> {
    let mut registration = MemoryRegion::builder(domain, &allocation.dmabuf)
        .access(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ);
    if let (None, Some(backing)) = (probe(domain.context())?.path(), &allocation.backing) {
        registration = registration.paths(&[]).host_mapping(backing);
    }
    Ok(registration.register()?)
}
