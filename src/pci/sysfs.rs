//! Finding PCI devices in sysfs, by their address or by what they are known as.

use std::fmt;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::address::PciAddress;
use super::config::Config;
use crate::{Error, Result};

/// A sysfs: the running machine's, or one in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysfs {
    root: PathBuf,
}

/// Where a device that is known by its class is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// On the PCI bus.
    Pci(PciDevice),
    /// Not on the PCI bus: a device of software, or of a platform.
    NotPci {
        /// What it is known as: `rxe0`, `card1`.
        name: String,
        /// The network interface under an RDMA device of software.
        netdev: Option<String>,
    },
}

/// A PCI function that is present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciDevice {
    address: PciAddress,
    /// The real path, which goes through everything between the host bridge and the device.
    path: PathBuf,
    name: Option<String>,
}

/// The IOMMU group of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Iommu {
    /// Number of the group: devices of one group are not isolated from each other.
    pub group: u32,
    /// The kind of its domain: `DMA`, `DMA-FQ`, `identity`, `unmanaged`; `None` where the kernel does
    /// not tell.
    pub domain: Option<String>,
}

impl Iommu {
    /// Whether addresses are translated, so that the device is given IOVAs.
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
    /// The running machine's, at `/sys`.
    pub fn new() -> Self {
        Self::at("/sys")
    }

    /// One in a folder, such as a copy of another machine's.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The PCI function with this address.
    ///
    /// # Errors
    /// [`AddressError::NotInSysfs`](crate::error::AddressError::NotInSysfs): there is none. [`AddressError::Sysfs`](crate::error::AddressError::Sysfs): it cannot be read.
    pub fn device(&self, address: PciAddress) -> Result<PciDevice> {
        let link = self.root.join("bus/pci/devices").join(address.to_string());
        let path = self.resolve(&link, || format!("PCI device {address}"))?;
        Ok(PciDevice { address, path, name: None })
    }

    /// Where an RDMA device is: `mlx5_0`, `rxe0`.
    ///
    /// # Errors
    /// [`Error::UnknownDevice`]: there is none. [`AddressError::Sysfs`](crate::error::AddressError::Sysfs): it cannot be read.
    pub fn rdma_device(&self, name: &str) -> Result<Location> {
        match self.class_device("infiniband", "RDMA device", name) {
            Err(Error::Addresses(crate::error::AddressError::NotInSysfs { .. })) => {
                Err(Error::UnknownDevice { name: name.into(), present: self.names("infiniband")? })
            }
            answer => answer,
        }
    }

    /// All RDMA devices that are on the PCI bus, in order of their names.
    ///
    /// # Errors
    /// [`AddressError::Sysfs`](crate::error::AddressError::Sysfs): sysfs cannot be read. A machine without RDMA has none, which is no error.
    pub fn rdma_on_pci(&self) -> Result<Vec<PciDevice>> {
        let mut found = Vec::new();
        for name in self.names("infiniband")? {
            if let Location::Pci(device) = self.rdma_device(&name)? {
                found.push(device);
            }
        }
        Ok(found)
    }

    /// Where a DRM card is: `card0`, `renderD128`.
    ///
    /// # Errors
    /// [`AddressError::NotInSysfs`](crate::error::AddressError::NotInSysfs): there is none. [`AddressError::Sysfs`](crate::error::AddressError::Sysfs): it cannot be read.
    pub fn drm_card(&self, name: &str) -> Result<Location> {
        self.class_device("drm", "DRM card", name)
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
            return Err(Error::Addresses(crate::error::AddressError::NotInSysfs {
                what: format!("{what} {name:?}"),
                source,
            }));
        }
        let software = || {
            let netdev = fs::read_to_string(entry.join("parent")).ok().map(|text| text.trim().to_string());
            Location::NotPci { name: name.into(), netdev: netdev.filter(|text| !text.is_empty()) }
        };
        let link = entry.join("device");
        if !link.exists() {
            return Ok(software());
        }
        // What the link names may be a child of the PCI function: of virtio, or of an auxiliary bus.
        let path = self.resolve(&link, || format!("{what} {name}"))?;
        let function = path.ancestors().find_map(|path| Some((address_of(path)?, path.to_path_buf())));
        Ok(match function {
            Some((address, path)) => Location::Pci(PciDevice { address, path, name: Some(name.into()) }),
            None => software(),
        })
    }

    fn resolve(&self, link: &Path, what: impl Fn() -> String) -> Result<PathBuf> {
        fs::canonicalize(link).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                Error::Addresses(crate::error::AddressError::NotInSysfs { what: what(), source })
            }
            _ => failed(link)(source),
        })
    }
}

impl Location {
    /// The PCI device.
    ///
    /// # Errors
    /// [`AddressError::NotOnPci`](crate::error::AddressError::NotOnPci).
    pub fn pci(self) -> Result<PciDevice> {
        match self {
            Self::Pci(device) => Ok(device),
            Self::NotPci { name, .. } => Err(Error::Addresses(crate::error::AddressError::NotOnPci { name })),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(device) => write!(f, "{device}"),
            Self::NotPci { name, netdev: None } => write!(f, "{name} (no PCI device)"),
            Self::NotPci { name, netdev: Some(netdev) } => {
                write!(f, "{name} (no PCI device: software on {netdev})")
            }
        }
    }
}

impl PciDevice {
    /// Its address.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Its folder in sysfs, all links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it was looked up as, other than by its address: `mlx5_0`, `card0`.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The NUMA node that it is attached to; `None` where firmware does not tell.
    pub fn numa_node(&self) -> Option<u32> {
        self.read("numa_node").ok()?.trim().parse().ok()
    }

    /// Its IOMMU group; `None` without an IOMMU.
    pub fn iommu(&self) -> Option<Iommu> {
        let group = fs::canonicalize(self.path.join("iommu_group")).ok()?;
        let number = group.file_name()?.to_str()?.parse().ok()?;
        let domain = fs::read_to_string(group.join("type")).ok().map(|text| text.trim().to_string());
        Some(Iommu { group: number, domain })
    }

    /// The PCI functions from the device itself up to its host bridge.
    pub(super) fn way_up(&self) -> impl Iterator<Item = (PciAddress, &Path)> {
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

/// As much of a function's configuration space as this user may read.
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
    move |source| {
        Error::Addresses(crate::error::AddressError::Sysfs { path: path.display().to_string(), source })
    }
}

pub(super) fn invalid(path: &Path, expected: &str) -> Error {
    failed(path)(io::Error::new(io::ErrorKind::InvalidData, format!("expected {expected}")))
}
