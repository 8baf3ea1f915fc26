//! The memory to send: its exporter, its bytes, and the dma-bufs that it lies in.

use std::ops::Range;
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
    /// The device or CPU that wrote the bytes.
    pub written_by: &'static str,
    /// The dma-bufs, each with the range to send, in order.
    pub parts: Vec<(DmaBuf, Range<u64>)>,
    /// Digest of the bytes that were written.
    pub digest: u128,
    /// Keeps the memory allocated until it is sent.
    _memory: Option<DeviceMemory>,
}

const STEP: u64 = 64 << 10;

/// The word to fill the 64 KiB at an offset with.
fn word(offset: u64) -> u32 {
    (offset / STEP + 1).wrapping_mul(0x9e37_79b1) as u32
}

/// The ranges to fill, each with its word.
fn words(size: u64) -> impl Iterator<Item = (Range<u64>, u32)> {
    (0..size.div_ceil(STEP)).map(move |at| (at * STEP..size.min((at + 1) * STEP), word(at * STEP)))
}

/// The bytes of a range filled with a word.
fn filled(range: &Range<u64>, word: u32) -> Vec<u8> {
    word.to_le_bytes().repeat((range.end - range.start) as usize / 4)
}

/// The digest of memory filled with [`words`].
fn digest_of_words(size: u64) -> u128 {
    let mut digest = Xxh3::new();
    for (range, word) in words(size) {
        digest.update(&filled(&range, word));
    }
    digest.digest128()
}

pub fn make(kind: Kind, size: u64) -> Result<Source> {
    // Devices fill whole words.
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
                parts: vec![(buffer.export()?, 0..size)],
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

/// GPU memory that the GPU fills, exported by its pointer as any allocator's memory would be.
fn device(runtime: &dyn Runtime, name: String, memory: DeviceMemory, size: u64) -> Result<Source> {
    for (range, word) in words(size) {
        memory.fill(range, word)?;
    }
    let parts = runtime.export_at(memory.address(), size)?.into_iter();
    let parts = parts.map(|part| {
        let range = part.range();
        (part.dmabuf, range)
    });
    Ok(Source {
        name,
        written_by: "the device",
        parts: parts.collect(),
        digest: digest_of_words(size),
        _memory: Some(memory),
    })
}

/// A buffer that the CPU fills.
fn host(exporter: &dyn Exporter, size: u64) -> Result<Source> {
    let buffer = exporter.allocate(size)?.dmabuf;
    let mapping = buffer.map()?;
    for (range, word) in words(size) {
        mapping.write(range.start, &filled(&range, word))?;
    }
    Ok(Source {
        name: exporter.name(),
        written_by: "the CPU",
        parts: vec![(buffer, 0..size)],
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
    let mut camera = match (found, refused) {
        (Some(camera), _) => camera,
        (None, Some(error)) => return Err(error.into()),
        (None, None) => unreachable!("each number gave a camera or an error"),
    };
    let name = format!("v4l2 {}", camera.driver());
    camera.start(2)?;
    let frame = camera.next_frame(Duration::from_secs(30))?;
    let buffer = camera.buffers()[frame.buffer as usize].try_clone()?;
    let mut bytes = vec![0; frame.bytes as usize];
    buffer.map()?.read(0, &mut bytes)?;
    let mut digest = Xxh3::new();
    digest.update(&bytes);
    let parts = vec![(buffer, 0..frame.bytes)];
    Ok(Source { name, written_by: "the camera", parts, digest: digest.digest128(), _memory: None })
}

/// GBM on the first card that makes linear images.
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
