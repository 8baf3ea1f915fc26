//! Where the list comes from.

use dmabuf_rdma::exporter::Allocation;
use dmabuf_rdma::pci::{Location, PciDevice, Sysfs};
use dmabuf_rdma::sg::{
    DeviceView, DmaDevice, DmaMap, DmaSgList, Identity, SegmentLimits, device_view, pagemap,
};

use crate::Result;

/// A list, and what its addresses are.
pub struct Seen {
    pub list: DmaSgList,
    pub addresses: String,
    /// Whether /proc/iomem knows them.
    pub physical: bool,
    /// What keeps the addresses true.
    _view: Option<DeviceView>,
}

/// The physical pages: from pagemap where the memory is ours, from the module otherwise.
pub fn physical(allocation: &Allocation) -> Result<Seen> {
    if let Some(backing) = &allocation.backing {
        let pages = pagemap::of_backing(backing)?;
        let list = DmaMap::new(Identity, SegmentLimits::NONE).map(&pages)?;
        let addresses = "physical pages, from /proc/self/pagemap".into();
        return Ok(Seen { list, addresses, physical: true, _view: None });
    }
    let view = device_view(&allocation.dmabuf, DmaDevice::None)?;
    let addresses = "physical, as a device without translation is given them".into();
    Ok(Seen { list: view.list()?, addresses, physical: true, _view: Some(view) })
}

pub fn by_device(allocation: &Allocation, name: &str) -> Result<Seen> {
    let sysfs = Sysfs::new();
    let (device, location) = match name.parse() {
        Ok(address) => (DmaDevice::Pci(address), Location::Pci(sysfs.device(address)?)),
        Err(_) => (DmaDevice::Rdma(name), sysfs.rdma_device(name)?),
    };
    let (kind, physical) = match &location {
        Location::Pci(device) => kind(device),
        Location::NotPci { .. } => ("physical, as it copies with the CPU", true),
    };
    let view = device_view(&allocation.dmabuf, device)?;
    let addresses = format!("as {location} is given them ({kind})");
    Ok(Seen { list: view.list()?, addresses, physical, _view: Some(view) })
}

/// What a device's addresses are, and whether those are physical ones.
fn kind(device: &PciDevice) -> (&'static str, bool) {
    match device.iommu() {
        Some(iommu) if iommu.translates() => ("iovas, which the IOMMU translates", false),
        _ => ("bus addresses, with no IOMMU in between", true),
    }
}
