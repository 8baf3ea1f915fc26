//! Finds PCI devices in sysfs, by their address or by the name of their class device.

use std::fmt;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::address::PciAddress;
use super::config::Config;
use super::{Error, Result};

/// A sysfs: that of the running machine, or a copy in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysfs {
    root: PathBuf,
}

/// Where an RDMA device, a DRM card or a video device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// On the PCI bus.
    Pci(PciDevice),
    /// Not on the PCI bus: a software or platform device.
    NotPci {
        /// Name of the device: `rxe0`, `card1`.
        name: String,
        /// The network interface below a software RDMA device.
        netdev: Option<String>,
    },
}

/// A PCI function of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciDevice {
    address: PciAddress,
    /// The real path, through every port between the host bridge and the device.
    path: PathBuf,
    name: Option<String>,
}

/// The IOMMU group of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuGroup {
    /// Number of the group. Devices of one group are not isolated from each other.
    pub number: u32,
    /// Type of the group's domain: `DMA`, `DMA-FQ`, `identity`, `unmanaged`; `None` if it is unknown.
    pub domain: Option<String>,
}

impl IommuGroup {
    /// Whether the IOMMU translates addresses, so that the device uses IOVAs.
    pub fn translates(&self) -> bool {
        self.domain.as_deref() != Some("identity")
    }
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::new()
    }
}

impl Sysfs {
    /// The sysfs of the running machine, at `/sys`.
    pub fn new() -> Self {
        Self::at("/sys")
    }

    /// A sysfs in another folder, such as a copy of another machine's.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The PCI function with this address.
    ///
    /// # Errors
    /// - [`Error::NotInSysfs`] (`ENOENT`): there is none.
    /// - [`Error::Sysfs`]: it cannot be read.
    pub fn device(&self, address: PciAddress) -> Result<PciDevice> {
        let link = self.root.join("bus/pci/devices").join(address.to_string());
        let path = self.resolve(&link, || format!("PCI device {address}"))?;
        Ok(PciDevice { address, path, name: None })
    }

    /// Finds an RDMA device by its name: `mlx5_0`, `rxe0`.
    ///
    /// # Errors
    /// - [`Error::UnknownRdmaDevice`]: there is none.
    /// - [`Error::Sysfs`]: it cannot be read.
    pub fn rdma_device(&self, name: &str) -> Result<Location> {
        match self.class_device("infiniband", "RDMA device", name) {
            Err(Error::NotInSysfs { .. }) => {
                Err(Error::UnknownRdmaDevice { name: name.into(), present: self.names("infiniband")? })
            }
            answer => answer,
        }
    }

    /// All RDMA devices on the PCI bus, sorted by name; empty on a machine without RDMA.
    ///
    /// # Errors
    /// [`Error::Sysfs`]: sysfs cannot be read.
    pub fn rdma_pci_devices(&self) -> Result<Vec<PciDevice>> {
        let mut devices = Vec::new();
        for name in self.names("infiniband")? {
            if let Location::Pci(device) = self.rdma_device(&name)? {
                devices.push(device);
            }
        }
        Ok(devices)
    }

    /// Finds a DRM card by its name: `card0`, `renderD128`.
    ///
    /// # Errors
    /// - [`Error::NotInSysfs`] (`ENOENT`): there is none.
    /// - [`Error::Sysfs`]: it cannot be read.
    pub fn drm_card(&self, name: &str) -> Result<Location> {
        self.class_device("drm", "DRM card", name)
    }

    /// Finds a video device by its name: `video0`.
    ///
    /// # Errors
    /// - [`Error::NotInSysfs`] (`ENOENT`): there is none.
    /// - [`Error::Sysfs`]: it cannot be read.
    pub fn video_device(&self, name: &str) -> Result<Location> {
        self.class_device("video4linux", "video device", name)
    }

    fn names(&self, class: &str) -> Result<Vec<String>> {
        let folder = self.root.join("class").join(class);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed(&folder))?,
        };
        let mut names: Vec<_> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names)
    }

    fn class_device(&self, class: &str, what: &str, name: &str) -> Result<Location> {
        let entry = self.root.join("class").join(class).join(name);
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
        if !plain || !entry.exists() {
            let source = io::Error::from_raw_os_error(libc::ENOENT);
            return Err(Error::NotInSysfs { what: format!("{what} {name:?}"), source });
        }
        let software = || {
            let netdev = fs::read_to_string(entry.join("parent")).ok().map(|text| text.trim().to_string());
            Location::NotPci { name: name.into(), netdev: netdev.filter(|text| !text.is_empty()) }
        };
        let link = entry.join("device");
        if !link.exists() {
            return Ok(software());
        }
        // The link may name a child of the PCI function, on virtio or on an auxiliary bus.
        let path = self.resolve(&link, || format!("{what} {name}"))?;
        let function = path.ancestors().find_map(|path| Some((address_of(path)?, path.to_path_buf())));
        Ok(match function {
            Some((address, path)) => Location::Pci(PciDevice { address, path, name: Some(name.into()) }),
            None => software(),
        })
    }

    fn resolve(&self, link: &Path, what: impl Fn() -> String) -> Result<PathBuf> {
        fs::canonicalize(link).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::NotInSysfs { what: what(), source },
            _ => failed(link)(source),
        })
    }
}

impl Location {
    /// The PCI device.
    ///
    /// # Errors
    /// [`Error::NotOnPci`]: the device is not on the PCI bus.
    pub fn into_pci(self) -> Result<PciDevice> {
        match self {
            Self::Pci(device) => Ok(device),
            Self::NotPci { name, .. } => Err(Error::NotOnPci { name }),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(device) => write!(f, "{device}"),
            Self::NotPci { name, netdev: None } => write!(f, "{name} (not a PCI device)"),
            Self::NotPci { name, netdev: Some(netdev) } => {
                write!(f, "{name} (not a PCI device: software on {netdev})")
            }
        }
    }
}

impl PciDevice {
    /// The address of the function.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// The folder of the function in sysfs, with all links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name of the class device by which it was found: `mlx5_0`, `card0`.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The NUMA node that the function is attached to; `None` if firmware does not report it.
    pub fn numa_node(&self) -> Option<u32> {
        self.read("numa_node").ok()?.trim().parse().ok()
    }

    /// The IOMMU group of the function; `None` without an IOMMU.
    pub fn iommu_group(&self) -> Option<IommuGroup> {
        let group = fs::canonicalize(self.path.join("iommu_group")).ok()?;
        let number = group.file_name()?.to_str()?.parse().ok()?;
        let domain = fs::read_to_string(group.join("type")).ok().map(|text| text.trim().to_string());
        Some(IommuGroup { number, domain })
    }

    /// The PCI functions from this one up to the host bridge.
    pub(super) fn upward(&self) -> impl Iterator<Item = (PciAddress, &Path)> {
        self.path.ancestors().filter_map(|path| Some((address_of(path)?, path)))
    }

    pub(super) fn read(&self, file: &str) -> Result<String> {
        let path = self.path.join(file);
        fs::read_to_string(&path).map_err(failed(&path))
    }

    pub(super) fn config(&self) -> Result<Config> {
        config_at(&self.path)
    }
}

impl fmt::Display for PciDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} ({})", self.address),
            None => write!(f, "{}", self.address),
        }
    }
}

/// The part of a function's configuration space that this user may read.
pub(super) fn config_at(folder: &Path) -> Result<Config> {
    let path = folder.join("config");
    let mut bytes = Vec::with_capacity(4096);
    fs::File::open(&path).and_then(|file| file.take(4096).read_to_end(&mut bytes)).map_err(failed(&path))?;
    Ok(Config(bytes))
}

fn address_of(path: &Path) -> Option<PciAddress> {
    PciAddress::parse(path.file_name()?.to_str()?)
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::Sysfs { path: path.display().to_string(), source }
}

pub(super) fn invalid(path: &Path, expected: &str) -> Error {
    failed(path)(io::Error::new(io::ErrorKind::InvalidData, format!("expected {expected}")))
}
