//! Where the list comes from.

use dmabuf_rdma::exporter::Allocation;
use dmabuf_rdma::pci::Sysfs;
use dmabuf_rdma::sg::{DmaMap, DmaSgList, Identity, SegmentLimits, pagemap};

use crate::Result;

/// A list, and what its addresses are.
pub struct Seen {
    pub list: DmaSgList,
    pub addresses: String,
    /// Whether /proc/iomem knows them.
    pub physical: bool,
}

/// The physical pages, from pagemap where the memory is ours.
pub fn physical(allocation: &Allocation) -> Result<Seen> {
    let Some(backing) = &allocation.backing else {
        return Err("pagemap shows udmabufs only; other buffers take a device's view (kernel/dma_sg)".into());
    };
    let pages = pagemap::of_backing(backing)?;
    let list = DmaMap::new(Identity, SegmentLimits::NONE).map(&pages)?;
    Ok(Seen { list, addresses: "physical pages, from /proc/self/pagemap".into(), physical: true })
}

/// The addresses that a device is given; names that are nobody's are refused as such.
pub fn by_device(_: &Allocation, name: &str) -> Result<Seen> {
    let sysfs = Sysfs::new();
    let device = match name.parse() {
        Ok(address) => sysfs.device(address)?.to_string(),
        Err(_) => sysfs.rdma_device(name)?.to_string(),
    };
    Err(format!("what {device} is given takes a device's view (kernel/dma_sg)").into())
}
