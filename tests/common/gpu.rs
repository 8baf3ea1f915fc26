//! GPUs, real ones or stubs: what is checked alike on all.

use dmabuf_rdma::error::ExporterError;
use dmabuf_rdma::exporter::{Cuda, DeviceMemory, Exporter, Hsa, LevelZero, MemoryKind, Runtime};
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::Operation;
use dmabuf_rdma::{Error, Result};

use super::buffers::heap;
use super::census::fds;
use super::peers::Peers;
use super::{assert_same, contents};
use crate::assert_refused;

/// A runtime whose device memory a test can have.
pub trait Gpu: Runtime + Exporter {
    fn memory(&self, size: u64) -> Result<DeviceMemory>;
}

impl Gpu for Cuda {
    fn memory(&self, size: u64) -> Result<DeviceMemory> {
        self.device_memory(size)
    }
}

impl Gpu for Hsa {
    fn memory(&self, size: u64) -> Result<DeviceMemory> {
        self.device_memory(size)
    }
}

impl Gpu for LevelZero {
    fn memory(&self, size: u64) -> Result<DeviceMemory> {
        self.device_memory(size)
    }
}

const STEP: u64 = 64 << 10;

/// What [`fill`] puts at a place: another word in each 64 KiB.
fn word(offset: u64) -> u32 {
    (offset / STEP + 1).wrapping_mul(0x9e37_79b1) as u32
}

/// Has the device write all of its memory.
pub fn fill(memory: &DeviceMemory) {
    for offset in (0..memory.size()).step_by(STEP as usize) {
        memory.fill(offset, STEP.min(memory.size() - offset), word(offset)).expect("fill");
    }
}

/// The bytes that are there then.
pub fn filled(offset: u64, length: u64) -> Vec<u8> {
    let end = (offset + length).next_multiple_of(STEP);
    let mut bytes = Vec::new();
    for at in (offset - offset % STEP..end).step_by(STEP as usize) {
        bytes.extend(word(at).to_le_bytes().repeat(STEP as usize / 4));
    }
    bytes.drain(..(offset % STEP) as usize);
    bytes.truncate(length as usize);
    bytes
}

/// Memory that was allocated, found from the middle of it and exported from there.
pub fn sub_allocations_come_out_exact(gpu: &dyn Gpu) {
    let memory = gpu.memory(4 << 20).unwrap();
    let (base, size) = (memory.address(), memory.size());
    for (offset, length) in [(0, size), (0x1_a340, 0x10_0004), (size - 1, 1), (4096, 4096)] {
        let address = base + offset;
        let found = gpu.find(address).unwrap().expect("its own memory");
        assert_eq!((found.runtime, found.address), (Runtime::name(gpu), address));
        assert_eq!((found.base, found.size, found.kind), (base, size, MemoryKind::Device));
        assert!(found.device.is_some(), "{found:?}");
        let exported = gpu.export(&found, length).unwrap();
        assert_eq!(exported.len(), length);
        let [piece] = exported.pieces() else { panic!("one allocation, {:?}", exported.pieces()) };
        assert_eq!((piece.offset, piece.length), (offset, length), "the allocation begins at a page");
        assert!(piece.dmabuf.size() >= offset + length && piece.dmabuf.is_writable());
    }
}

/// Bytes that the device wrote, read by a peer; bytes that a peer wrote, as a second export shows them.
pub fn a_sub_allocation_crosses_the_wire(gpu: &dyn Gpu) {
    let peers = Peers::new();
    // CUDA makes it 2 MiB.
    let memory = gpu.memory(1 << 20).unwrap();
    fill(&memory);
    let (offset, length) = (0x1_a340, 0x8_0004);
    let exported = gpu.export_at(memory.address() + offset, length).unwrap();
    let [piece] = exported.pieces() else { panic!("one allocation") };
    let register = |access| {
        let builder = MemoryRegion::builder(&peers.domain, &piece.dmabuf);
        builder.range(piece.offset, piece.length).access(access).register().unwrap()
    };
    let region = register(Access::REMOTE);
    let other = heap(length);
    let other_region = peers.register(&other);
    let local = other_region.sge(0, length).unwrap();
    let remote = region.remote().at(0, length).unwrap();
    peers.ours.succeed(Operation::Read { remote }, &[local]);
    assert_same(&contents(&other)[..length as usize], &filled(offset, length), "what the device wrote");

    // And back, turned around; all around it stays.
    let mut put = filled(offset, length);
    put.reverse();
    other.map().unwrap().write(0, &put).unwrap();
    peers.ours.succeed(Operation::Write { remote }, &[local]);
    let whole = gpu.export_at(memory.address(), memory.size()).unwrap().into_pieces().remove(0);
    let region =
        MemoryRegion::builder(&peers.domain, &whole.dmabuf).access(Access::REMOTE).register().unwrap();
    let all = heap(memory.size());
    let all_region = peers.register(&all);
    let remote = region.remote().at(0, memory.size()).unwrap();
    peers.ours.succeed(Operation::Read { remote }, &[all_region.sge(0, memory.size()).unwrap()]);
    let mut expected = filled(0, memory.size());
    expected[offset as usize..][..length as usize].copy_from_slice(&put);
    assert_same(&contents(&all), &expected, "the allocation after a WRITE into it");
}

/// A range has to be in its allocation, and the allocation to be there.
pub fn wrong_pointers_are_refused(gpu: &dyn Gpu) {
    let memory = gpu.memory(2 << 20).unwrap();
    let (base, size) = (memory.address(), memory.size());
    assert_refused!(gpu.find(0), Error::Exporters(ExporterError::NullPointer));
    assert_refused!(gpu.export_at(base, 0), Error::ZeroLength { .. });
    let past = assert_refused!(
        gpu.export_at(base + 4096, size),
        Error::Exporters(ExporterError::PastAllocation { .. })
    );
    assert!(past.contains(&format!("{size} bytes from {base:#x}")), "{past}");
    assert_refused!(gpu.export_at(base, u64::MAX), Error::Exporters(ExporterError::PastAllocation { .. }));

    let local = 7_u64;
    let address = (&raw const local) as u64;
    assert_eq!(gpu.find(address).unwrap(), None);
    assert_refused!(gpu.export_at(address, 8), Error::Exporters(ExporterError::ForeignPointer { .. }));

    let found = gpu.find(base).unwrap().unwrap();
    drop(memory);
    assert_eq!(gpu.find(base).unwrap(), None, "freed");
    let message = assert_refused!(gpu.export(&found, 1), Error::Exporters(ExporterError::Freed { .. }));
    assert!(message.contains("was freed since it was found"), "{message}");
    assert_refused!(gpu.export_at(base, 1), Error::Exporters(ExporterError::ForeignPointer { .. }));
}

/// Exports one after the other leave no descriptor, also those that are refused.
pub fn exports_leave_no_descriptors(gpu: &dyn Gpu) {
    let memory = gpu.memory(2 << 20).unwrap();
    // Whatever the driver opens once.
    drop(gpu.export_at(memory.address(), memory.size()).unwrap());
    let before = fds();
    for _ in 0..20 {
        let one = gpu.export_at(memory.address(), memory.size()).unwrap();
        let other = gpu.export_at(memory.address() + 4096, 1).unwrap();
        assert_eq!(fds(), before + 2);
        drop((one, other));
        gpu.export_at(memory.address(), memory.size() + 1).unwrap_err();
    }
    assert_eq!(fds(), before);
}

/// The exporter's own buffers: zeroed, of the size, refused beyond what there is.
pub fn allocates(gpu: &dyn Gpu) {
    let buffer = gpu.allocate(3 << 20).unwrap();
    assert!(buffer.dmabuf.size() >= 3 << 20 && buffer.dmabuf.is_writable() && buffer.backing.is_none());
    assert_refused!(gpu.allocate(0), Error::ZeroLength { .. });
    assert_refused!(gpu.allocate(u64::MAX), Error::SizeTooLarge { .. });
    let refused = gpu.allocate(1 << 45);
    let refused = refused.map_err(|error| match error {
        // CUDA and ROCm say how much there is.
        Error::OutOfMemory { requested: size, .. } => {
            Error::Exporters(ExporterError::TooLarge { runtime: Runtime::name(gpu), size })
        }
        other => other,
    });
    assert_refused!(refused, Error::Exporters(ExporterError::TooLarge { size: 0x2000_0000_0000, .. }));
}
