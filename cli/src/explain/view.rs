//! Where the list comes from.

use dma_sg::device_view::{DeviceView, DmaDevice};
use dma_sg::pci::{Location, PciDevice, Sysfs};
use dma_sg::{DmaMap, DmaSgList, Identity, SegmentLimits};
use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::Backing;

use crate::Result;

/// A list with a description of its addresses.
pub struct Seen {
    pub list: DmaSgList,
    pub addresses: String,
    /// Whether they are physical, so that /proc/iomem names them.
    pub physical: bool,
    /// Keeps the addresses true.
    _view: Option<DeviceView>,
}

/// The physical pages: from pagemap for memory of this process, from the module otherwise.
pub fn physical(buffer: &DmaBuf, backing: Option<&Backing>) -> Result<Seen> {
    if let Some(backing) = backing {
        let pages = backing.page_list()?;
        let list = DmaMap::new(Identity, SegmentLimits::NONE).map(&pages)?;
        let addresses = "physical pages, from /proc/self/pagemap".into();
        return Ok(Seen { list, addresses, physical: true, _view: None });
    }
    let view = DeviceView::new(buffer, DmaDevice::Untranslated)?;
    let addresses = "physical, as for a device without address translation".into();
    Ok(Seen { list: view.list()?, addresses, physical: true, _view: Some(view) })
}

pub fn by_device(buffer: &DmaBuf, name: &str) -> Result<Seen> {
    let sysfs = Sysfs::new();
    let (device, location) = match name.parse() {
        Ok(address) => (DmaDevice::Pci(address), Location::Pci(sysfs.device(address)?)),
        Err(_) => (DmaDevice::Rdma(name), sysfs.rdma_device(name)?),
    };
    let (kind, physical) = match &location {
        Location::Pci(device) => kind(device),
        Location::NotPci { .. } => ("physical, since it copies with the CPU", true),
    };
    let view = DeviceView::new(buffer, device)?;
    let addresses = format!("for {location} ({kind})");
    Ok(Seen { list: view.list()?, addresses, physical, _view: Some(view) })
}

/// The kind of a device's addresses, and whether they are physical.
fn kind(device: &PciDevice) -> (&'static str, bool) {
    match device.iommu_group() {
        Some(group) if group.translates() => ("iovas, which the IOMMU translates", false),
        _ => ("bus addresses, without an IOMMU in between", true),
    }
}
