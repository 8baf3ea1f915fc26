//! The memory of a trial, and how its bytes are seen: by the CPU, or through the device into host memory.

use dmabuf_rdma::dmabuf::Mapping;
use dmabuf_rdma::exporter::{Allocation, Exporter, PageKind};
use dmabuf_rdma::mr::MemoryRegion;
use dmabuf_rdma::verbs::ProtectionDomain;
use dmabuf_rdma::{Connection, Error, HostBuffer};

use crate::register::{READ_WRITE, register};

/// Size of a buffer. GPUs and cards round it up.
pub const SIZE: u64 = 256 << 10;

pub enum Memory {
    DmaBuf {
        allocation: Allocation,
        /// `None` for memory that the CPU does not map, as that of GPUs.
        mapping: Option<Mapping>,
    },
    Host(HostBuffer),
}

impl Memory {
    pub fn of_exporter(exporter: &dyn Exporter) -> Result<Self, Error> {
        let allocation = exporter.allocate(SIZE)?;
        let mapping = allocation.dmabuf.map().ok();
        Ok(Self::DmaBuf { allocation, mapping })
    }

    pub fn of_host() -> Result<Self, Error> {
        Ok(Self::Host(HostBuffer::allocate(SIZE, PageKind::Base)?))
    }

    pub fn is_dmabuf(&self) -> bool {
        matches!(self, Self::DmaBuf { .. })
    }

    pub fn register(&self, domain: &ProtectionDomain) -> Result<MemoryRegion, Error> {
        Ok(match self {
            Self::DmaBuf { allocation, .. } => register(domain, allocation)?,
            Self::Host(host) => MemoryRegion::builder(domain, host).access(READ_WRITE).register()?,
        })
    }

    /// The bytes of a registered buffer, as somebody other than the device under test sees them if possible.
    pub fn view<'a>(
        &'a self,
        region: &'a MemoryRegion,
        connection: &'a Connection,
    ) -> Result<View<'a>, Error> {
        Ok(match self {
            Self::DmaBuf { mapping: Some(mapping), .. } => View::Cpu(mapping),
            Self::DmaBuf { mapping: None, .. } => {
                let host = HostBuffer::allocate(region.len(), PageKind::Base)?;
                let of_host = MemoryRegion::builder(region.domain(), &host).access(READ_WRITE).register()?;
                View::Device { host, of_host, region, connection }
            }
            Self::Host(host) => View::Host(host),
        })
    }
}

pub enum View<'a> {
    Cpu(&'a Mapping),
    Host(&'a HostBuffer),
    Device { host: HostBuffer, of_host: MemoryRegion, region: &'a MemoryRegion, connection: &'a Connection },
}

impl View<'_> {
    pub fn fill(&self, bytes: &[u8]) -> Result<(), Error> {
        match self {
            Self::Cpu(mapping) => mapping.write(0, bytes)?,
            Self::Host(host) => host.write(0, bytes)?,
            Self::Device { host, of_host, region, connection } => {
                host.write(0, bytes)?;
                connection.write(of_host, region.remote())?.wait()?;
            }
        }
        Ok(())
    }

    pub fn contents(&self, length: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; length as usize];
        match self {
            Self::Cpu(mapping) => mapping.read(0, &mut bytes)?,
            Self::Host(host) => host.read(0, &mut bytes)?,
            Self::Device { host, of_host, region, connection } => {
                connection.read(of_host, region.remote())?.wait()?;
                host.read(0, &mut bytes)?;
            }
        }
        Ok(bytes)
    }
}
