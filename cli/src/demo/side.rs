//! What both sides have: a device, a buffer with its region, and a connection.

use std::time::Instant;

use dmabuf_rdma::verbs::{Device, ProtectionDomain, devices};
use dmabuf_rdma::{Connection, DmaBuf, MemoryRegion};

use super::wire::Summary;
use crate::{Result, exporter, register};

pub struct Side {
    pub buffer: DmaBuf,
    pub region: MemoryRegion,
    pub connection: Connection,
    pub summary: Summary,
}

impl Side {
    pub fn new(device: Option<&str>, exporter: &str, size: u64) -> Result<Self> {
        let device = match device {
            Some(name) => Device::by_name(name)?,
            None => devices()?.into_iter().next().ok_or("this machine has no RDMA device")?,
        };
        let domain = ProtectionDomain::new(&device.open()?)?;

        let exporter = exporter::by_name(exporter)?;
        let allocation = exporter.allocate(size)?;
        let start = Instant::now();
        let region = register::register(&domain, &allocation)?;
        let summary = Summary {
            device: device.name().into(),
            exporter: exporter.name(),
            path: region.path().to_string(),
            register_ms: start.elapsed().as_secs_f64() * 1e3,
        };

        let connection = Connection::new(&domain, Default::default())?;
        Ok(Self { buffer: allocation.dmabuf, region, connection, summary })
    }
}
