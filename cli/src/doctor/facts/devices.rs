//! The RDMA devices of the kernel, with ports, links, MTUs and GIDs, from sysfs.

use std::net::{IpAddr, Ipv6Addr};

use dma_sg::pci::Location;
use serde::{Deserialize, Serialize};

use super::super::look::{Fact, Look};
use super::PciPlace;

/// An RDMA device of the kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Device {
    pub name: String,
    /// Its kernel driver: that of its PCI function, or `rxe` or `siw`.
    pub driver: Option<String>,
    /// `CA` for InfiniBand and RoCE, `RNIC` for iWARP.
    pub node_type: Option<String>,
    pub firmware: Option<String>,
    /// Its node in /dev/infiniband; none if ib_uverbs does not have it.
    pub uverbs: Option<String>,
    pub pci: Option<PciPlace>,
    /// The network interface of a device that is software.
    pub netdev: Option<String>,
    pub ports: Vec<Port>,
}

/// A port of a device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Port {
    pub number: u8,
    /// `ACTIVE`, `DOWN`, `INIT`, …
    pub state: Fact<String>,
    pub physical_state: Fact<String>,
    /// `Ethernet` or `InfiniBand`.
    pub link_layer: Fact<String>,
    pub rate: Fact<String>,
    /// The MTU of RDMA in bytes, once the device was opened.
    pub mtu: Fact<u32>,
    /// The network interfaces of its GIDs with their MTUs.
    pub netdevs: Vec<(String, Fact<u64>)>,
    pub gids: Vec<Gid>,
}

/// A GID of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gid {
    pub index: u32,
    pub gid: Ipv6Addr,
    /// `RoCE v2`, `IB/RoCE v1`, …
    pub kind: Option<String>,
    pub netdev: Option<String>,
}

impl Device {
    pub fn is_iwarp(&self) -> bool {
        self.node_type.as_deref() == Some("RNIC")
    }

    pub fn is_software(&self) -> bool {
        matches!(self.driver.as_deref(), Some("rxe" | "siw"))
    }
}

impl Gid {
    pub fn address(&self) -> IpAddr {
        IpAddr::from(self.gid).to_canonical()
    }

    pub fn is_link_local(&self) -> bool {
        match self.address() {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        }
    }

    pub fn is_roce_v2(&self) -> bool {
        self.kind.as_deref() == Some("RoCE v2")
    }
}

pub fn gather(look: &Look) -> Vec<Device> {
    look.names("/sys/class/infiniband").into_iter().map(|name| device(look, name)).collect()
}

fn device(look: &Look, name: String) -> Device {
    let folder = format!("/sys/class/infiniband/{name}");
    let text = |file: &str| look.any_text(&format!("{folder}/{file}")).filter(|text| !text.is_empty());
    let (pci, netdev) = match look.sysfs().rdma_device(&name) {
        Ok(Location::Pci(device)) => (Some(PciPlace::of(&device)), None),
        Ok(Location::NotPci { netdev, .. }) => (None, netdev),
        Err(_) => (None, None),
    };
    // Software devices have no device link. Their names are chosen by whoever adds them.
    let node_type = text("node_type").map(after_colon);
    let software = || {
        let name = if node_type.as_deref() == Some("RNIC") { "siw" } else { "rxe" };
        (!look.exists(&format!("{folder}/device"))).then(|| name.to_owned())
    };
    let driver = look.link(&format!("{folder}/device/driver")).or_else(software);
    let verbs = look.names("/sys/class/infiniband_verbs").into_iter();
    let uverbs = verbs.filter(|uverbs| uverbs.starts_with("uverbs")).find(|uverbs| {
        look.any_text(&format!("/sys/class/infiniband_verbs/{uverbs}/ibdev")) == Some(name.clone())
    });
    let numbers = look.names(&format!("{folder}/ports")).into_iter().filter_map(|port| port.parse().ok());
    let ports = numbers.map(|number| port(look, &format!("{folder}/ports/{number}"), number)).collect();
    Device { driver, node_type, firmware: text("fw_ver"), uverbs, pci, netdev, ports, name }
}

fn port(look: &Look, folder: &str, number: u8) -> Port {
    let gid = |index: u32| {
        let text = look.any_text(&format!("{folder}/gids/{index}"))?;
        let gid: Ipv6Addr = text.parse().ok().filter(|gid: &Ipv6Addr| !gid.is_unspecified())?;
        let attribute = |name| look.any_text(&format!("{folder}/gid_attrs/{name}/{index}"));
        Some(Gid { index, gid, kind: attribute("types"), netdev: attribute("ndevs") })
    };
    // The table has hundreds of entries, most of which are empty; the kernel fills it from its start.
    let (mut gids, mut empty) = (Vec::new(), 0);
    for index in 0..256 {
        match gid(index) {
            Some(gid) => gids.push(gid),
            None => empty += 1,
        }
        if empty > 8 {
            break;
        }
    }
    let mut netdevs: Vec<String> = gids.iter().filter_map(|gid: &Gid| gid.netdev.clone()).collect();
    netdevs.sort();
    netdevs.dedup();
    let mtu = |name: String| {
        let mtu = look.number(&format!("/sys/class/net/{name}/mtu"));
        (name, mtu)
    };
    Port {
        number,
        state: look.text(&format!("{folder}/state")).map(after_colon),
        physical_state: look.text(&format!("{folder}/phys_state")).map(after_colon),
        link_layer: look.text(&format!("{folder}/link_layer")),
        rate: look.text(&format!("{folder}/rate")),
        mtu: Fact::unknown("the device was not opened"),
        netdevs: netdevs.into_iter().map(mtu).collect(),
        gids,
    }
}

/// `ACTIVE` of `4: ACTIVE`.
fn after_colon(text: String) -> String {
    text.split_once(": ").map(|(_, name)| name.to_owned()).unwrap_or(text)
}
