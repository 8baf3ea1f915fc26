//! What both sides have: a device, a buffer, its region, and a queue pair.

use std::time::Instant;

use dmabuf_rdma::exporter::Allocation;
use dmabuf_rdma::mr::{Access, MemoryRegion, probe};
use dmabuf_rdma::verbs::{CompletionQueue, Device, ProtectionDomain, QueuePair, QueuePairOptions, devices};

use crate::wire::Introduction;
use crate::{Result, exporter};

pub struct Party {
    pub buffer: dmabuf_rdma::DmaBuf,
    pub region: MemoryRegion,
    pub queue: CompletionQueue,
    pub pair: QueuePair,
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
        let Allocation { dmabuf: buffer, backing } = exporter.allocate(size)?;
        let mut registration = MemoryRegion::builder(&domain, &buffer)
            .access(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ);
        // A device that cannot import is served from the host pages, where there are any; the path
        // taken is shown.
        if let (None, Some(backing)) = (probe(&context)?.path(), &backing) {
            registration = registration.paths(&[]).host_mapping(backing);
        }
        let start = Instant::now();
        let region = registration.register()?;
        let introduction = Introduction {
            device: context.device_name().into(),
            exporter: exporter.name(),
            path: region.path().to_string(),
            register_ms: start.elapsed().as_secs_f64() * 1e3,
        };

        let queue = CompletionQueue::new(&context, 256)?;
        let pair = QueuePair::new(&domain, &queue, &queue, QueuePairOptions::default())?;
        Ok(Self { buffer, region, queue, pair, introduction })
    }
}
