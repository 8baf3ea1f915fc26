//! The memory that is sent: who made it, what is in it, and in which dma-bufs it is.

use std::time::Duration;

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::{
    CaptureDevice, Cuda, DeviceMemory, DmaHeap, Exporter, Gbm, Hsa, LevelZero, Runtime, Udmabuf, Vulkan,
};
use xxhash_rust::xxh3::Xxh3;

use crate::{Kind, Result};

/// Memory with known bytes in it.
pub struct Source {
    pub name: String,
    /// Who put the bytes there.
    pub written_by: &'static str,
    /// Buffer, offset and length of each part, in order.
    pub parts: Vec<(DmaBuf, u64, u64)>,
    /// Digest of the bytes as they were put there.
    pub digest: u128,
    /// What has to live on until it is sent.
    _memory: Option<DeviceMemory>,
}

const STEP: u64 = 64 << 10;

/// Another word in each 64 KiB.
fn word(offset: u64) -> u32 {
    (offset / STEP + 1).wrapping_mul(0x9e37_79b1) as u32
}

/// The ranges to fill, each with its word.
fn words(size: u64) -> impl Iterator<Item = (u64, u64, u32)> {
    (0..size.div_ceil(STEP)).map(move |at| (at * STEP, STEP.min(size - at * STEP), word(at * STEP)))
}

/// The digest of what filling them makes.
fn digest_of_words(size: u64) -> u128 {
    let mut digest = Xxh3::new();
    for (_, length, word) in words(size) {
        digest.update(&word.to_le_bytes().repeat(length as usize / 4));
    }
    digest.digest128()
}

pub fn make(kind: Kind, size: u64) -> Result<Source> {
    // Devices fill words.
    let size = size.next_multiple_of(4);
    match kind {
        Kind::Cuda => {
            let cuda = Cuda::load()?;
            device(&cuda, Exporter::name(&cuda), cuda.device_memory(size)?, size)
        }
        Kind::Hsa => {
            let hsa = Hsa::load()?;
            device(&hsa, Exporter::name(&hsa), hsa.device_memory(size)?, size)
        }
        Kind::LevelZero => {
            let ze = LevelZero::load()?;
            device(&ze, Exporter::name(&ze), ze.device_memory(size)?, size)
        }
        Kind::Vulkan => {
            let vulkan = Vulkan::load()?;
            let buffer = vulkan.buffer(size)?;
            buffer.fill_each(words(size))?;
            Ok(Source {
                name: vulkan.name(),
                written_by: "the device",
                parts: vec![(buffer.export()?, 0, size)],
                digest: digest_of_words(size),
                _memory: None,
            })
        }
        Kind::V4l2 => frame(),
        Kind::Gbm => host(&any_gbm()?, size),
        Kind::Heap => host(&DmaHeap::open("system")?, size),
        Kind::Udmabuf => host(&Udmabuf::open()?, size),
    }
}

/// Memory of a GPU, filled by it and found again by its pointer alone.
fn device(runtime: &dyn Runtime, name: String, memory: DeviceMemory, size: u64) -> Result<Source> {
    for (offset, length, word) in words(size) {
        memory.fill(offset, length, word)?;
    }
    let exported = runtime.export_at(memory.address(), size)?;
    let parts = exported.into_pieces().into_iter();
    Ok(Source {
        name,
        written_by: "the device",
        parts: parts.map(|piece| (piece.dmabuf, piece.offset, piece.length)).collect(),
        digest: digest_of_words(size),
        _memory: Some(memory),
    })
}

/// Memory that the processor fills.
fn host(exporter: &dyn Exporter, size: u64) -> Result<Source> {
    let buffer = exporter.allocate(size)?.dmabuf;
    let mapping = buffer.map()?;
    for (offset, length, word) in words(size) {
        mapping.write(offset, &word.to_le_bytes().repeat(length as usize / 4))?;
    }
    Ok(Source {
        name: exporter.name(),
        written_by: "the processor",
        parts: vec![(buffer, 0, size)],
        digest: digest_of_words(size),
        _memory: None,
    })
}

/// One frame of the first camera.
fn frame() -> Result<Source> {
    let cameras = (0..64).map(|number| CaptureDevice::open(format!("/dev/video{number}")));
    let (mut found, mut refused) = (None, None);
    for camera in cameras {
        match camera {
            Ok(camera) => found = found.or(Some(camera)),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    let camera = match (found, refused) {
        (Some(camera), _) => camera,
        (None, Some(error)) => return Err(error.into()),
        (None, None) => unreachable!("each of the numbers gave one or the other"),
    };
    let name = format!("v4l2 {}", camera.driver());
    let mut capture = camera.capture(2)?;
    let frame = capture.next(Duration::from_secs(30))?;
    let buffer = capture.buffers()[frame.buffer as usize].try_clone()?;
    let mut bytes = vec![0; frame.bytes as usize];
    buffer.map()?.read(0, &mut bytes)?;
    let mut digest = Xxh3::new();
    digest.update(&bytes);
    let parts = vec![(buffer, 0, frame.bytes.into())];
    Ok(Source { name, written_by: "the camera", parts, digest: digest.digest128(), _memory: None })
}

/// GBM on the first card that it works on.
fn any_gbm() -> Result<Gbm> {
    let mut last = None;
    for number in 0..64 {
        match Gbm::open(format!("/dev/dri/card{number}")) {
            Ok(gbm) if gbm.image(64, 64).is_ok() => return Ok(gbm),
            Ok(_) => {}
            Err(error) => last = last.or(Some(error)),
        }
    }
    Err(last.map_or("no card makes linear images".into(), Into::into))
}
