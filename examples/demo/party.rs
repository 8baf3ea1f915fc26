//! What both sides have: a device, a buffer, its region, and a connection.

use std::time::Instant;

use dmabuf_rdma::MemoryRegion;
use dmabuf_rdma::transfer::Connection;
use dmabuf_rdma::verbs::{Device, ProtectionDomain, devices};

use crate::wire::Introduction;
use crate::{Result, exporter, register};

pub struct Party {
    pub buffer: dmabuf_rdma::DmaBuf,
    pub region: MemoryRegion,
    pub connection: Connection,
    pub introduction: Introduction,
}

impl Party {
    pub fn new(device: Option<&str>, exporter: &str, size: u64) -> Result<Self> {
        let device = match device {
            Some(name) => Device::by_name(name)?,
            None => devices()?.into_iter().next().ok_or("this machine has no RDMA device")?,
        };
        let context = device.open()?;
        let domain = ProtectionDomain::new(&context)?;

        let exporter = exporter::by_name(exporter)?;
        let allocation = exporter.allocate(size)?;
        let start = Instant::now();
        let region = register::register(&domain, &allocation)?;
        let introduction = Introduction {
            device: context.device_name().into(),
            exporter: exporter.name(),
            path: region.path().to_string(),
            register_ms: start.elapsed().as_secs_f64() * 1e3,
        };

        let connection = Connection::new(&domain, Default::default())?;
        Ok(Self { buffer: allocation.dmabuf, region, connection, introduction })
    }
}
