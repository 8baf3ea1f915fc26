//! GPUs, where they and the NICs are on the PCI bus, and the IOMMU in between.

use dma_sg::pci::{self, BarKind, PciDevice, nearest};
use serde::{Deserialize, Serialize};

use super::super::look::{Fact, Look};

/// Where a device is on the PCI bus.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PciPlace {
    pub address: String,
    pub numa_node: Option<u32>,
    pub iommu_group: Option<u32>,
    /// The type of its IOMMU domain: `DMA`, `DMA-FQ`, `identity`, …
    pub iommu_domain: Option<String>,
}

impl PciPlace {
    pub fn of(device: &PciDevice) -> Self {
        let group = device.iommu_group();
        Self {
            address: device.address().to_string(),
            numa_node: device.numa_node(),
            iommu_group: group.as_ref().map(|group| group.number),
            iommu_domain: group.and_then(|group| group.domain),
        }
    }
}

/// A GPU or accelerator.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gpu {
    pub place: PciPlace,
    /// Vendor and device, as in `10de:2330`.
    pub id: String,
    /// `NVIDIA`, `AMD`, `Intel`; none of others.
    pub vendor: Option<String>,
    pub driver: Option<String>,
    /// Size of the largest memory BAR in bytes: what a NIC can reach at once.
    pub largest_bar: Fact<u64>,
    /// Why DMA cannot go to that BAR.
    pub bar_problem: Option<String>,
    /// The routes to the NICs, nearest first.
    pub routes: Fact<Vec<Route>>,
}

/// The route from a GPU to a NIC.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Route {
    pub nic: String,
    /// Where traffic between them turns around.
    pub through: String,
    /// Whether it stays below the root complex; `None` if that needs root to know.
    pub below_root: Option<bool>,
    /// Whether it crosses the link between two sockets.
    pub two_sockets: bool,
    /// The ports whose ACS sends it through the root complex.
    pub acs: Vec<String>,
    /// A sentence on what to make of it.
    pub advice: String,
}

/// The IOMMU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Iommu {
    /// The units that the kernel uses: `dmar0`, `ivhd0`, …
    pub units: Vec<String>,
    /// Parameters of the kernel's command line about it.
    pub parameters: Vec<String>,
}

pub fn iommu(look: &Look) -> Iommu {
    let about = ["iommu", "intel_iommu", "amd_iommu", "iommu.passthrough", "pcie_acs_override", "pci"];
    let line = look.any_text("/proc/cmdline").unwrap_or_default();
    let parameters =
        line.split_whitespace().filter(|word| about.contains(&word.split('=').next().unwrap_or(word)));
    Iommu { units: look.names("/sys/class/iommu"), parameters: parameters.map(str::to_owned).collect() }
}

pub fn gpus(look: &Look) -> Fact<Vec<Gpu>> {
    if !look.exists("/sys/bus") {
        return Fact::unknown("/sys/bus: there is no sysfs here");
    }
    let sysfs = look.sysfs();
    let nics = sysfs.rdma_pci_devices();
    let gpu = |name: String| {
        let folder = format!("/sys/bus/pci/devices/{name}");
        let text = |file: &str| look.any_text(&format!("{folder}/{file}"));
        let class = u32::from_str_radix(text("class")?.trim_start_matches("0x"), 16).ok()?;
        let (vendor, device) = (text("vendor")?, text("device")?);
        // Display controllers and processing accelerators, but not the ones of management controllers.
        let of_management = ["0x1a03", "0x102b"].contains(&vendor.as_str());
        if !matches!(class >> 16, 0x03 | 0x12) || of_management {
            return None;
        }
        let found = sysfs.device(name.parse().ok()?).ok()?;
        let known = match vendor.as_str() {
            "0x10de" => Some("NVIDIA"),
            "0x1002" => Some("AMD"),
            "0x8086" => Some("Intel"),
            _ => None,
        };
        let routes = match &nics {
            Ok(nics) => Fact::from(nearest(&found, nics).map(|routes| routes.iter().map(route).collect())),
            Err(error) => Fact::unknown(error),
        };
        let largest = found.bars().map(|bars| {
            let memory = bars.into_iter().filter(|bar| bar.kind == BarKind::Memory && bar.is_prefetchable);
            memory.max_by_key(|bar| bar.size)
        });
        let bar_problem =
            largest.as_ref().ok().and_then(Option::as_ref).and_then(|bar| found.bar(bar.index).err());
        Some(Gpu {
            place: PciPlace::of(&found),
            id: format!("{}:{}", vendor.trim_start_matches("0x"), device.trim_start_matches("0x")),
            vendor: known.map(str::to_owned),
            driver: look.link(&format!("{folder}/driver")),
            largest_bar: Fact::from(largest.map(|bar| bar.map_or(0, |bar| bar.size))),
            bar_problem: bar_problem.map(|error| error.to_string()),
            routes,
        })
    };
    Fact::Known(look.names("/sys/bus/pci/devices").into_iter().filter_map(gpu).collect())
}

fn route(route: &pci::P2pRoute) -> Route {
    let acs = match &route.redirect {
        pci::AcsRedirect::No => Vec::new(),
        pci::AcsRedirect::By(ports) | pci::AcsRedirect::Unknown(ports) => {
            ports.iter().map(ToString::to_string).collect()
        }
    };
    Route {
        nic: route.to.name().unwrap_or_default().to_owned(),
        through: route.common_ancestor.to_string(),
        below_root: route.stays_below_root(),
        two_sockets: matches!(route.common_ancestor, pci::CommonAncestor::TwoSockets { .. }),
        acs,
        advice: route.to_string(),
    }
}
