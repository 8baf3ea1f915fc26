//! Both ends of a measurement, and the bytes in them.
//!
//! A third buffer of host memory fills and shows what the CPU does not map, through the device.

use std::net::SocketAddr;

use dmabuf_rdma::cm::Outgoing;
use dmabuf_rdma::dmabuf::Mapping;
use dmabuf_rdma::exporter::{Allocation, PageKind};
use dmabuf_rdma::verbs::{Device, ProtectionDomain, devices};
use dmabuf_rdma::{Connection, HostBuffer, MemoryRegion, RemoteRegion};

use crate::net::TIMEOUT;
use crate::register::{READ_WRITE, register};
use crate::{Result, exporter, pattern, ui};

pub struct Ends {
    pub connection: Connection,
    /// The near buffer.
    pub region: MemoryRegion,
    /// The far buffer.
    pub remote: RemoteRegion,
    pub near: String,
    pub far: String,
    memory: Memory,
    host: HostBuffer,
    of_host: MemoryRegion,
    /// The far end, if it is on this machine.
    _far: Option<(Connection, MemoryRegion, Memory)>,
}

/// The memory of an end.
enum Memory {
    Host(HostBuffer),
    /// The mapping is `None` for memory that the CPU does not map, as that of GPUs.
    DmaBuf(Allocation, Option<Mapping>),
}

impl Memory {
    fn allocate(name: &str, size: u64) -> Result<(Self, String)> {
        if name == "host" {
            return Ok((Self::Host(HostBuffer::allocate(size, PageKind::Base)?), "host memory".into()));
        }
        let exporter = exporter::by_name(name)?;
        let allocation = exporter.allocate(size)?;
        let mapping = allocation.dmabuf.map().ok();
        Ok((Self::DmaBuf(allocation, mapping), exporter.name()))
    }

    fn register(&self, domain: &ProtectionDomain) -> Result<MemoryRegion> {
        Ok(match self {
            Self::Host(host) => MemoryRegion::builder(domain, host).access(READ_WRITE).register()?,
            Self::DmaBuf(allocation, _) => register(domain, allocation)?,
        })
    }
}

fn open(device: Option<&str>) -> Result<ProtectionDomain> {
    let device = match device {
        Some(name) => Device::by_name(name)?,
        None => devices()?.into_iter().next().ok_or("this machine has no RDMA device")?,
    };
    Ok(ProtectionDomain::new(&device.open()?)?)
}

impl Ends {
    /// Two connected queue pairs of this machine.
    pub fn here(devices: [Option<&str>; 2], exporters: [&str; 2], size: u64) -> Result<Self> {
        let near = open(devices[0])?;
        let far = match devices[1] {
            Some(_) => open(devices[1])?,
            None => near.clone(),
        };
        let (memory, name) = Memory::allocate(exporters[1], size)?;
        let region = memory.register(&far)?;
        let ours = Connection::new(&near, Default::default())?;
        let theirs = Connection::new(&far, Default::default())?;
        ours.connect(&theirs.endpoint())?;
        theirs.connect(&ours.endpoint())?;
        let remote = region.remote();
        let far = described(&name, &region);
        Self::new(&near, ours, exporters[0], size, remote, far, Some((theirs, region, memory)))
    }

    /// A connection to `dmabuf-rdma serve`.
    pub fn connect(address: SocketAddr, exporter: &str, size: u64) -> Result<Self> {
        let outgoing = Outgoing::resolve(address, None, TIMEOUT)?;
        let domain = open(Some(&outgoing.device_name()))?;
        let mut connection = Connection::new(&domain, Default::default())?;
        let answer = outgoing.connect(&mut connection, &[], TIMEOUT)?;
        let (remote, _padding) = RemoteRegion::split_from(&answer)?;
        let far = format!("{} served at {address}", ui::bytes(remote.len()));
        Self::new(&domain, connection, exporter, size.min(remote.len()), remote, far, None)
    }

    fn new(
        domain: &ProtectionDomain,
        connection: Connection,
        exporter: &str,
        size: u64,
        remote: RemoteRegion,
        far: String,
        keep: Option<(Connection, MemoryRegion, Memory)>,
    ) -> Result<Self> {
        let (memory, name) = Memory::allocate(exporter, size)?;
        let region = memory.register(domain)?;
        let host = HostBuffer::allocate(size, PageKind::Base)?;
        let of_host = MemoryRegion::builder(domain, &host).access(READ_WRITE).register()?;
        let near = described(&name, &region);
        Ok(Self { connection, region, remote, near, far, memory, host, of_host, _far: keep })
    }

    /// The bytes that both buffers have.
    pub fn size(&self) -> u64 {
        self.region.len().min(self.remote.len()).min(self.host.size())
    }

    /// Puts a pattern into the source of an operation, and zeros into its target.
    pub fn prepare(&self, length: u64, writes: bool) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(length)?];
        pattern::write(&mut bytes, 0, 1);
        let zeros = vec![0; bytes.len()];
        let (near, far) = if writes { (&bytes, &zeros) } else { (&zeros, &bytes) };
        self.set_near(near)?;
        self.set_far(far)
    }

    /// Compares the target with the pattern.
    pub fn compare(&self, length: u64, writes: bool) -> Result<()> {
        let mut expected = vec![0; usize::try_from(length)?];
        pattern::write(&mut expected, 0, 1);
        if !writes {
            self.show_near(length)?;
        }
        if writes || matches!(self.memory, Memory::DmaBuf(_, None)) {
            let host = self.of_host.slice(..length)?;
            self.connection.read(host, self.remote.slice(..length)?)?.wait()?;
        }
        let mut seen = vec![0; expected.len()];
        self.host.read(0, &mut seen)?;
        match seen.iter().zip(&expected).position(|(seen, expected)| seen != expected) {
            Some(at) => {
                Err(format!("byte {at:#x} is {:#04x} instead of {:#04x}", seen[at], expected[at]).into())
            }
            None => Ok(()),
        }
    }

    fn set_far(&self, bytes: &[u8]) -> Result<()> {
        self.host.write(0, bytes)?;
        let length = bytes.len() as u64;
        self.connection.write(self.of_host.slice(..length)?, self.remote.slice(..length)?)?.wait()?;
        Ok(())
    }

    fn set_near(&self, bytes: &[u8]) -> Result<()> {
        match &self.memory {
            Memory::Host(host) => host.write(0, bytes)?,
            Memory::DmaBuf(_, Some(mapping)) => mapping.write(0, bytes)?,
            Memory::DmaBuf(_, None) => {
                self.set_far(bytes)?;
                let length = bytes.len() as u64;
                self.connection.read(self.region.slice(..length)?, self.remote.slice(..length)?)?.wait()?;
            }
        }
        Ok(())
    }

    /// Copies the near bytes to the host's buffer; those that the CPU does not map go to the far end first.
    fn show_near(&self, length: u64) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(length)?];
        match &self.memory {
            Memory::Host(host) => host.read(0, &mut bytes)?,
            Memory::DmaBuf(_, Some(mapping)) => mapping.read(0, &mut bytes)?,
            Memory::DmaBuf(_, None) => {
                self.set_far(&bytes)?;
                self.connection.write(self.region.slice(..length)?, self.remote.slice(..length)?)?.wait()?;
                return Ok(());
            }
        }
        Ok(self.host.write(0, &bytes)?)
    }
}

fn described(exporter: &str, region: &MemoryRegion) -> String {
    let device = region.domain().context().device_name();
    format!("{exporter}, {}, registered with {device} by {}", ui::bytes(region.len()), region.path())
}
