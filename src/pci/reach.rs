//! The way from one PCI device to another, and which of several is nearest.
//!
//! The real path of a device in sysfs goes through every port above it, so the deepest folder that two
//! paths share is where their traffic meets. Two endpoints of a switch share its upstream port; IOMMU
//! groups would not show it. What sends traffic past that place is read as `drivers/pci/p2pdma.c` does.

use std::cmp::Ordering;
use std::fmt;
use std::fs;
use std::path::Path;

use super::address::PciAddress;
use super::config::PortType;
use super::sysfs::{Iommu, PciDevice, config_at};
use crate::Result;

/// Where the ways of two devices meet, the nearest first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Meeting {
    /// Both are functions of one device.
    SameDevice,
    /// Inside a switch.
    Switch {
        /// The deepest port that both are below; the upstream port when they are at two downstream ports.
        port: PciAddress,
    },
    /// Below one root port, with no switch in common.
    RootPort {
        /// The root port.
        port: PciAddress,
    },
    /// Only at the host bridge: in the root complex.
    HostBridge {
        /// Its name in sysfs: `pci0000:00`.
        bridge: String,
    },
    /// Nowhere in PCI: two host bridges, as far as is known of one socket.
    OtherHostBridge {
        /// The NUMA node of both; `None` where firmware does not tell, so that the socket is unknown.
        numa_node: Option<u32>,
    },
    /// Two host bridges of two sockets.
    OtherSocket {
        /// NUMA nodes of the one and the other device.
        numa_nodes: (u32, u32),
    },
}

/// Whether ports on the way send peer-to-peer traffic up to the root (Access Control Services).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Redirect {
    /// None of them.
    No,
    /// These were not readable: it takes root to see the extended configuration space.
    Unknown(Vec<PciAddress>),
    /// These do.
    By(Vec<PciAddress>),
}

/// The way between two PCI devices. Its `Display` says in a sentence what to make of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    /// The one device.
    pub from: PciDevice,
    /// The other device.
    pub to: PciDevice,
    /// Where their ways meet.
    pub meeting: Meeting,
    /// How many ports of root complex and switches lie between them.
    pub ports: usize,
    /// Whether ports below the meeting place send traffic past it. Nothing is looked at where traffic
    /// goes through the root anyway.
    pub redirect: Redirect,
    /// The IOMMU groups of both, where there is an IOMMU.
    pub iommu: (Option<Iommu>, Option<Iommu>),
}

impl PciDevice {
    /// The way from this device to another one.
    ///
    /// The answer is about wires and settings. Whether the kernel maps one device's memory for the other
    /// depends on their drivers too; a registration tells.
    ///
    /// # Errors
    /// [`AddressError::Sysfs`](crate::error::AddressError::Sysfs): the configuration space of a port cannot be read.
    pub fn reach(&self, to: &PciDevice) -> Result<Reach> {
        let common = common_folder(self.path(), to.path());
        let port = self.way_up().find(|(_, path)| *path == common);
        let bridge = common.file_name().and_then(|name| name.to_str()).filter(|name| is_host_bridge(name));
        let meeting = match (port, bridge) {
            _ if self.is_one_device_with(to) => Meeting::SameDevice,
            (Some((port, path)), _) => match port_type(path)? {
                PortType::Root => Meeting::RootPort { port },
                _ => Meeting::Switch { port },
            },
            (None, Some(bridge)) => Meeting::HostBridge { bridge: bridge.into() },
            (None, None) => match (self.numa_node(), to.numa_node()) {
                (Some(one), Some(other)) if one != other => Meeting::OtherSocket { numa_nodes: (one, other) },
                (node, other) => Meeting::OtherHostBridge { numa_node: node.and(other) },
            },
        };
        // From the one device to the meeting place, that included, and from the other up to it.
        let below = |device: &PciDevice| -> Vec<_> {
            let way = device.way_up().take_while(|(_, path)| path.starts_with(common) && *path != common);
            way.map(|(address, path)| (address, path.to_path_buf())).collect()
        };
        let mut way = below(self);
        let meets_at_port = port.filter(|(port, _)| *port != self.address());
        way.extend(meets_at_port.map(|(port, path)| (port, path.to_path_buf())));
        way.extend(below(to));
        let ends = [self.address(), to.address()];
        let ports = way.iter().filter(|(address, _)| !ends.contains(address)).count();
        let local = matches!(meeting, Meeting::Switch { .. } | Meeting::RootPort { .. })
            || meeting == Meeting::SameDevice && self.address() != to.address();
        let redirect = if local { redirect(&way)? } else { Redirect::No };
        let iommu = (self.iommu(), to.iommu());
        Ok(Reach { from: self.clone(), to: to.clone(), meeting, ports, redirect, iommu })
    }

    /// Functions of one slot, virtual functions included, which have addresses of their own.
    fn is_one_device_with(&self, other: &PciDevice) -> bool {
        self.path() == other.path() || self.physical().same_slot(&other.physical())
    }

    fn physical(&self) -> PciAddress {
        let physical = fs::canonicalize(self.path().join("physfn")).ok();
        let address = physical.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        address.and_then(PciAddress::parse).unwrap_or(self.address())
    }
}

/// The ways from one device to each of the others, the nearest first; equals stay in order.
///
/// # Errors
/// As [`PciDevice::reach`].
pub fn nearest(from: &PciDevice, to: &[PciDevice]) -> Result<Vec<Reach>> {
    let mut ways = to.iter().map(|to| from.reach(to)).collect::<Result<Vec<_>>>()?;
    ways.sort_by(Reach::cmp_distance);
    Ok(ways)
}

impl Reach {
    /// Whether traffic between the two stays below the root complex; `None` where that is unknown.
    pub fn stays_below_root(&self) -> Option<bool> {
        match (&self.meeting, &self.redirect) {
            (Meeting::HostBridge { .. } | Meeting::OtherHostBridge { .. }, _) => Some(false),
            (Meeting::OtherSocket { .. }, _) | (_, Redirect::By(_)) => Some(false),
            (_, Redirect::No) => Some(true),
            (_, Redirect::Unknown(_)) => None,
        }
    }

    /// Compares by distance, `Less` being nearer: by the meeting place, then by whether traffic stays
    /// there, then by the ports on the way.
    pub fn cmp_distance(&self, other: &Self) -> Ordering {
        self.distance().cmp(&other.distance())
    }

    fn distance(&self) -> (u8, u8, usize) {
        let place = match &self.meeting {
            Meeting::SameDevice => 0,
            Meeting::Switch { .. } => 1,
            Meeting::RootPort { .. } => 2,
            Meeting::HostBridge { .. } => 3,
            Meeting::OtherHostBridge { numa_node: Some(_) } => 4,
            Meeting::OtherHostBridge { numa_node: None } => 5,
            Meeting::OtherSocket { .. } => 6,
        };
        let redirect = match self.redirect {
            Redirect::No => 0,
            Redirect::Unknown(_) => 1,
            Redirect::By(_) => 2,
        };
        (place, redirect, self.ports)
    }

    /// Whether an IOMMU translates what goes through the root: as a word for a message.
    fn translation(&self) -> &'static str {
        match (&self.iommu.0, &self.iommu.1) {
            (None, None) => "no IOMMU is on",
            (one, other) if one.iter().chain(other).any(Iommu::translates) => "the IOMMU translates it",
            _ => "the IOMMU passes it through",
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}: {}", self.from, self.to, self.meeting)?;
        match self.ports {
            0 => {}
            1 => write!(f, ", 1 port between")?,
            ports => write!(f, ", {ports} ports between")?,
        }
        match (&self.meeting, &self.redirect) {
            (Meeting::SameDevice | Meeting::Switch { .. } | Meeting::RootPort { .. }, redirect) => {
                match redirect {
                    Redirect::No => write!(f, "; traffic stays there: a good pair"),
                    Redirect::Unknown(ports) => write!(
                        f,
                        "; whether ACS of {} sends traffic up to the root is visible to root only",
                        listed(ports, ", ")
                    ),
                    Redirect::By(ports) => write!(
                        f,
                        "; but ACS of {} sends traffic up through the root complex ({}): where devices need no isolation from each other, boot with pci=disable_acs_redir={}",
                        listed(ports, ", "),
                        self.translation(),
                        listed(ports, ";")
                    ),
                }
            }
            (Meeting::OtherSocket { numa_nodes: (node, _) }, _) => write!(
                f,
                "; traffic crosses the link between sockets, which is slow or not forwarded ({}): choose a device on node {node}",
                self.translation()
            ),
            _ => write!(
                f,
                "; traffic goes through the root complex ({}), which the kernel permits only on host bridges known to forward it: prefer a device below one switch, if there is one",
                self.translation()
            ),
        }
    }
}

impl fmt::Display for Meeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameDevice => write!(f, "one device"),
            Self::Switch { port } => write!(f, "below one switch ({port})"),
            Self::RootPort { port } => write!(f, "below one root port ({port})"),
            Self::HostBridge { bridge } => write!(f, "one host bridge ({bridge})"),
            Self::OtherHostBridge { numa_node: Some(node) } => write!(f, "two host bridges of node {node}"),
            Self::OtherHostBridge { numa_node: None } => write!(f, "two host bridges, NUMA nodes unknown"),
            Self::OtherSocket { numa_nodes: (one, other) } => {
                write!(f, "two sockets (nodes {one} and {other})")
            }
        }
    }
}

fn listed(ports: &[PciAddress], separator: &str) -> String {
    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator)
}

/// The deepest folder that both paths are in, or are.
fn common_folder<'a>(one: &'a Path, other: &Path) -> &'a Path {
    one.ancestors().find(|path| other.starts_with(path)).unwrap_or(Path::new(""))
}

/// `pci` and the bridge's domain and bus: `pci0000:00`.
fn is_host_bridge(name: &str) -> bool {
    let bus = name.strip_prefix("pci").and_then(|bus| bus.split_once(':'));
    bus.is_some_and(|(domain, bus)| {
        domain.len() >= 4
            && bus.len() == 2
            && (domain.chars().chain(bus.chars())).all(|c| c.is_ascii_hexdigit())
    })
}

/// The type of a port. Where this user may not read so far, its depth tells: below a host bridge come
/// root ports, and further down upstream and downstream ports in turn.
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

fn redirect(way: &[(PciAddress, std::path::PathBuf)]) -> Result<Redirect> {
    let (mut by, mut unknown) = (Vec::new(), Vec::new());
    for (address, path) in way {
        match config_at(path)?.redirects() {
            Some(true) => by.push(*address),
            Some(false) => {}
            None => unknown.push(*address),
        }
    }
    Ok(match (by.is_empty(), unknown.is_empty()) {
        (false, _) => Redirect::By(by),
        (true, false) => Redirect::Unknown(unknown),
        (true, true) => Redirect::No,
    })
}
