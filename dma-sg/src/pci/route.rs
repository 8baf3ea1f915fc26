//! The peer-to-peer route between two PCI devices, and which of several devices is nearest.
//!
//! The real path of a device in sysfs names every port above it, so the deepest folder that two paths share
//! is the common ancestor of both devices. For two endpoints of a switch that is its upstream port; IOMMU
//! groups would not show it. Redirection past the common ancestor follows `drivers/pci/p2pdma.c`.

use std::cmp::Ordering;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::Result;
use super::address::PciAddress;
use super::config::PortType;
use super::sysfs::{IommuGroup, PciDevice, config_at};

/// The common ancestor of two PCI devices, nearest first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CommonAncestor {
    /// Both are functions of one device.
    SameDevice,
    /// A port of a switch.
    Switch {
        /// The deepest port above both. It is the upstream port if they are below two downstream ports.
        port: PciAddress,
    },
    /// A root port, without a switch in common.
    RootPort {
        /// Address of the root port.
        port: PciAddress,
    },
    /// A host bridge, in the root complex.
    HostBridge {
        /// Name of the bridge in sysfs: `pci0000:00`.
        bridge: String,
    },
    /// None: the devices are below two host bridges, of one socket as far as is known.
    TwoHostBridges {
        /// The NUMA node of both; `None` if firmware does not report it, so that the sockets are unknown.
        numa_node: Option<u32>,
    },
    /// None: the devices are below host bridges of two sockets.
    TwoSockets {
        /// The NUMA node of each device.
        numa_nodes: (u32, u32),
    },
}

/// Whether Access Control Services (ACS) of ports on the route redirect peer-to-peer traffic to the root.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AcsRedirect {
    /// No port redirects.
    No,
    /// The ACS settings of these ports need root to read.
    Unknown(Vec<PciAddress>),
    /// These ports redirect.
    By(Vec<PciAddress>),
}

/// The peer-to-peer route between two PCI devices. Its `Display` is a sentence that says what to make of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct P2pRoute {
    /// The device where the route starts.
    pub from: PciDevice,
    /// The device where the route ends.
    pub to: PciDevice,
    /// Where traffic turns around, if no port redirects it.
    pub common_ancestor: CommonAncestor,
    /// Number of ports of root complex and switches between the devices.
    pub ports: usize,
    /// Whether ports below the common ancestor redirect traffic. It is `No` if all traffic goes through the
    /// root anyway.
    pub redirect: AcsRedirect,
    /// The IOMMU group of each device; `None` without an IOMMU.
    pub iommu_groups: (Option<IommuGroup>, Option<IommuGroup>),
}

impl PciDevice {
    /// The peer-to-peer route from this device to another one.
    ///
    /// It describes wires and settings. Whether the kernel maps the memory of one device for the other also
    /// depends on their drivers; only a registration tells.
    ///
    /// # Errors
    /// [`Error::Sysfs`](super::Error::Sysfs): the configuration space of a port cannot be read.
    pub fn route_to(&self, to: &PciDevice) -> Result<P2pRoute> {
        let common = common_folder(self.path(), to.path());
        let port = self.upward().find(|(_, path)| *path == common);
        let bridge = common.file_name().and_then(|name| name.to_str()).filter(|name| is_host_bridge(name));
        let common_ancestor = match (port, bridge) {
            _ if self.is_one_device_with(to) => CommonAncestor::SameDevice,
            (Some((port, path)), _) => match port_type(path)? {
                PortType::Root => CommonAncestor::RootPort { port },
                _ => CommonAncestor::Switch { port },
            },
            (None, Some(bridge)) => CommonAncestor::HostBridge { bridge: bridge.into() },
            (None, None) => match (self.numa_node(), to.numa_node()) {
                (Some(one), Some(other)) if one != other => {
                    CommonAncestor::TwoSockets { numa_nodes: (one, other) }
                }
                (node, other) => CommonAncestor::TwoHostBridges { numa_node: node.and(other) },
            },
        };
        // Up from one device to the common ancestor, and down to the other one.
        let below = |device: &PciDevice| -> Vec<_> {
            let functions =
                device.upward().take_while(|(_, path)| path.starts_with(common) && *path != common);
            functions.map(|(address, path)| (address, path.to_path_buf())).collect()
        };
        let mut hops = below(self);
        let top = port.filter(|(port, _)| *port != self.address());
        hops.extend(top.map(|(port, path)| (port, path.to_path_buf())));
        hops.extend(below(to));
        let ends = [self.address(), to.address()];
        let ports = hops.iter().filter(|(address, _)| !ends.contains(address)).count();
        let local =
            matches!(common_ancestor, CommonAncestor::Switch { .. } | CommonAncestor::RootPort { .. })
                || common_ancestor == CommonAncestor::SameDevice && self.address() != to.address();
        let redirect = if local { redirect(&hops)? } else { AcsRedirect::No };
        let iommu_groups = (self.iommu_group(), to.iommu_group());
        Ok(P2pRoute { from: self.clone(), to: to.clone(), common_ancestor, ports, redirect, iommu_groups })
    }

    /// Whether both are functions of one slot. A virtual function, whose address may be in another slot,
    /// counts as its physical one.
    fn is_one_device_with(&self, other: &PciDevice) -> bool {
        self.path() == other.path() || self.physical().same_slot(&other.physical())
    }

    fn physical(&self) -> PciAddress {
        let physical = fs::canonicalize(self.path().join("physfn")).ok();
        let address = physical.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        address.and_then(PciAddress::parse).unwrap_or(self.address())
    }
}

/// The routes from one device to each of the others, nearest first. Equally near ones keep their order.
///
/// # Errors
/// See [`PciDevice::route_to`].
pub fn nearest(from: &PciDevice, to: &[PciDevice]) -> Result<Vec<P2pRoute>> {
    let mut routes = to.iter().map(|to| from.route_to(to)).collect::<Result<Vec<_>>>()?;
    routes.sort_by(P2pRoute::cmp_distance);
    Ok(routes)
}

impl P2pRoute {
    /// Whether traffic stays below the root complex; `None` if that is unknown.
    pub fn stays_below_root(&self) -> Option<bool> {
        use CommonAncestor::{HostBridge, TwoHostBridges, TwoSockets};
        match (&self.common_ancestor, &self.redirect) {
            (HostBridge { .. } | TwoHostBridges { .. } | TwoSockets { .. }, _) => Some(false),
            (_, AcsRedirect::By(_)) => Some(false),
            (_, AcsRedirect::No) => Some(true),
            (_, AcsRedirect::Unknown(_)) => None,
        }
    }

    /// Compares the distance: by common ancestor, then by redirection, then by the number of ports. `Less` is
    /// nearer.
    pub fn cmp_distance(&self, other: &Self) -> Ordering {
        self.distance().cmp(&other.distance())
    }

    fn distance(&self) -> (u8, u8, usize) {
        let ancestor = match &self.common_ancestor {
            CommonAncestor::SameDevice => 0,
            CommonAncestor::Switch { .. } => 1,
            CommonAncestor::RootPort { .. } => 2,
            CommonAncestor::HostBridge { .. } => 3,
            CommonAncestor::TwoHostBridges { numa_node: Some(_) } => 4,
            CommonAncestor::TwoHostBridges { numa_node: None } => 5,
            CommonAncestor::TwoSockets { .. } => 6,
        };
        let redirect = match self.redirect {
            AcsRedirect::No => 0,
            AcsRedirect::Unknown(_) => 1,
            AcsRedirect::By(_) => 2,
        };
        (ancestor, redirect, self.ports)
    }

    /// What the IOMMU does to traffic through the root, for a message.
    fn translation(&self) -> &'static str {
        match (&self.iommu_groups.0, &self.iommu_groups.1) {
            (None, None) => "no IOMMU is on",
            (one, other) if one.iter().chain(other).any(IommuGroup::translates) => "the IOMMU translates it",
            _ => "the IOMMU passes it through",
        }
    }
}

impl fmt::Display for P2pRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}: {}", self.from, self.to, self.common_ancestor)?;
        match self.ports {
            0 => {}
            1 => write!(f, ", 1 port between")?,
            ports => write!(f, ", {ports} ports between")?,
        }
        match (&self.common_ancestor, &self.redirect) {
            (CommonAncestor::TwoSockets { numa_nodes: (node, _) }, _) => write!(
                f,
                "; traffic crosses the link between sockets, which is slow or does not forward it ({}): choose a device on node {node}",
                self.translation()
            ),
            (CommonAncestor::HostBridge { .. } | CommonAncestor::TwoHostBridges { .. }, _) => write!(
                f,
                "; traffic goes through the root complex ({}), which the kernel permits only for host bridges known to forward it: prefer a device below the same switch",
                self.translation()
            ),
            (_, AcsRedirect::No) => write!(f, "; traffic stays below the root: a good pair"),
            (_, AcsRedirect::Unknown(ports)) => write!(
                f,
                "; run this as root to learn whether ACS of {} redirects traffic to the root",
                listed(ports, ", ")
            ),
            (_, AcsRedirect::By(ports)) => write!(
                f,
                "; but ACS of {} redirects traffic through the root complex ({}): if the devices need no isolation from each other, boot with pci=disable_acs_redir={}",
                listed(ports, ", "),
                self.translation(),
                listed(ports, ";")
            ),
        }
    }
}

impl fmt::Display for CommonAncestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameDevice => write!(f, "one device"),
            Self::Switch { port } => write!(f, "below one switch ({port})"),
            Self::RootPort { port } => write!(f, "below one root port ({port})"),
            Self::HostBridge { bridge } => write!(f, "below one host bridge ({bridge})"),
            Self::TwoHostBridges { numa_node: Some(node) } => {
                write!(f, "below two host bridges of node {node}")
            }
            Self::TwoHostBridges { numa_node: None } => {
                write!(f, "below two host bridges, NUMA nodes unknown")
            }
            Self::TwoSockets { numa_nodes: (one, other) } => {
                write!(f, "on two sockets (nodes {one} and {other})")
            }
        }
    }
}

fn listed(ports: &[PciAddress], separator: &str) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}

/// The deepest folder that contains both paths, or is one of them.
fn common_folder<'a>(one: &'a Path, other: &Path) -> &'a Path {
    one.ancestors().find(|path| other.starts_with(path)).unwrap_or(Path::new(""))
}

/// Whether the name is `pci` with the domain and bus of a host bridge: `pci0000:00`.
fn is_host_bridge(name: &str) -> bool {
    let bus = name.strip_prefix("pci").and_then(|bus| bus.split_once(':'));
    bus.is_some_and(|(domain, bus)| {
        domain.len() >= 4
            && bus.len() == 2
            && (domain.chars().chain(bus.chars())).all(|c| c.is_ascii_hexdigit())
    })
}

/// The type of a port. If this user cannot read it, the depth tells: root ports are directly below a host
/// bridge, and further down upstream and downstream ports alternate.
fn port_type(path: &Path) -> Result<PortType> {
    if let Some(known) = config_at(path)?.port_type() {
        return Ok(known);
    }
    let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).map(str::to_string);
    let above = path.ancestors().skip(1).map_while(name);
    let depth = above.take_while(|name| PciAddress::parse(name).is_some()).count();
    Ok(match depth {
        0 => PortType::Root,
        depth if depth % 2 == 1 => PortType::Upstream,
        _ => PortType::Downstream,
    })
}

fn redirect(hops: &[(PciAddress, PathBuf)]) -> Result<AcsRedirect> {
    let (mut by, mut unknown) = (Vec::new(), Vec::new());
    for (address, path) in hops {
        match config_at(path)?.redirects() {
            Some(true) => by.push(*address),
            Some(false) => {}
            None => unknown.push(*address),
        }
    }
    Ok(match (by.is_empty(), unknown.is_empty()) {
        (false, _) => AcsRedirect::By(by),
        (true, false) => AcsRedirect::Unknown(unknown),
        (true, true) => AcsRedirect::No,
    })
}
