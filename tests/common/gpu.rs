//! Checks that run on every GPU runtime, on a real GPU and on the stubs.

use dma_sg::{RangeError, page_size};
use dmabuf_rdma::RemoteSlice;
use dmabuf_rdma::exporter::{
    Cuda, DeviceMemory, Error, ExportOptions, Exporter, Extent, Hsa, LevelZero, MemoryKind, PointerError,
    Runtime,
};
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::Operation;

use super::buffers::heap;
use super::census::fds;
use super::peers::Peers;
use super::{assert_same, contents};
use crate::assert_refused;

type Result<T> = std::result::Result<T, Error>;

/// A runtime from which a test allocates device memory.
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

/// The word that [`fill`] writes at an offset: another one in each 64 KiB.
fn word(offset: u64) -> u32 {
    (offset / STEP + 1).wrapping_mul(0x9e37_79b1) as u32
}

/// Has the device write all of its memory.
pub fn fill(memory: &DeviceMemory) {
    for offset in (0..memory.size()).step_by(STEP as usize) {
        memory.fill(offset..(offset + STEP).min(memory.size()), word(offset)).expect("fill");
    }
}

/// The bytes that [`fill`] leaves in a range.
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

/// Looks up addresses inside an allocation and exports from there.
pub fn sub_allocations_come_out_exact(gpu: &dyn Gpu) {
    let memory = gpu.memory(4 << 20).unwrap();
    let (base, size) = (memory.address(), memory.size());
    for (offset, length) in [(0, size), (0x1_a340, 0x10_0004), (size - 1, 1), (4096, 4096)] {
        let address = base + offset;
        let info = gpu.find(address).unwrap().expect("its own memory");
        assert_eq!((info.runtime, info.address), (Runtime::name(gpu), address));
        assert_eq!((info.base, info.size, info.kind), (base, size, MemoryKind::Device));
        assert!(info.device.is_some(), "{info:?}");
        for extent in [Extent::Range, Extent::Allocation] {
            let exported = gpu.export(&info, length, ExportOptions::default().extent(extent)).unwrap();
            let [part] = exported.as_slice() else { panic!("one allocation, {exported:?}") };
            assert_eq!(part.len(), length);
            assert_eq!(part.dmabuf.pci_device(), info.device);
            assert!(part.dmabuf.is_writable() && part.range().end <= part.dmabuf.size());
            let whole = part.memory() == (0..size) && part.range() == (offset..offset + length);
            // CUDA exports less than the allocation.
            let pages = part.range().start == offset % page_size();
            assert!(whole || extent == Extent::Range && pages, "{extent:?} {offset} {part:?}");
        }
    }
}

/// A peer reads bytes that the device wrote; a second export shows bytes that a peer wrote.
pub fn a_sub_allocation_crosses_the_wire(gpu: &dyn Gpu) {
    let peers = Peers::new();
    // CUDA rounds this up to 2 MiB.
    let memory = gpu.memory(1 << 20).unwrap();
    fill(&memory);
    let (offset, length) = (0x1_a340, 0x8_0004);
    let exported = gpu.export_at(memory.address() + offset, length).unwrap();
    let [part] = exported.as_slice() else { panic!("one allocation, {exported:?}") };
    let builder = MemoryRegion::builder(&peers.domain, &part.dmabuf);
    let region = builder.range(part.range()).access(Access::REMOTE).register().unwrap();
    let other = heap(length);
    let other_region = peers.register(&other);
    let local = other_region.sge(..length).unwrap();
    let remote = RemoteSlice::from(region.remote()).addr().unwrap();
    peers.ours.succeed(Operation::Read { remote }, &[local]);
    assert_same(&contents(&other)[..length as usize], &filled(offset, length), "what the device wrote");

    // The peer writes them back in reverse; the bytes around them must not change.
    let mut put = filled(offset, length);
    put.reverse();
    other.map().unwrap().write(0, &put).unwrap();
    peers.ours.succeed(Operation::Write { remote }, &[local]);
    let whole = gpu.export_at(memory.address(), memory.size()).unwrap().remove(0);
    let region =
        MemoryRegion::builder(&peers.domain, &whole.dmabuf).access(Access::REMOTE).register().unwrap();
    let all = heap(memory.size());
    let all_region = peers.register(&all);
    let remote = region.remote().slice(..memory.size()).unwrap().addr().unwrap();
    peers.ours.succeed(Operation::Read { remote }, &[all_region.sge(..memory.size()).unwrap()]);
    let mut expected = filled(0, memory.size());
    expected[offset as usize..][..length as usize].copy_from_slice(&put);
    assert_same(&contents(&all), &expected, "the allocation after a WRITE into it");
}

/// Null, foreign and freed pointers and ranges past the allocation are refused.
pub fn wrong_pointers_are_refused(gpu: &dyn Gpu) {
    let memory = gpu.memory(2 << 20).unwrap();
    let (base, size) = (memory.address(), memory.size());
    assert_refused!(gpu.find(0), PointerError::NullPointer);
    assert_refused!(gpu.export_at(base, 0), PointerError::Range(RangeError::Empty { .. }));
    let past = assert_refused!(gpu.export_at(base + 4096, size), PointerError::PastAllocation { .. });
    assert!(past.contains(&format!("{size} bytes from {base:#x}")), "{past}");
    assert_refused!(gpu.export_at(base, u64::MAX), PointerError::PastAllocation { .. });

    let local = 7_u64;
    let address = (&raw const local) as u64;
    assert_eq!(gpu.find(address).unwrap(), None);
    assert_refused!(gpu.export_at(address, 8), PointerError::ForeignPointer { .. });

    let info = gpu.find(base).unwrap().unwrap();
    drop(memory);
    assert_eq!(gpu.find(base).unwrap(), None, "freed");
    let message = assert_refused!(gpu.export(&info, 1, ExportOptions::default()), PointerError::Freed { .. });
    assert!(message.contains("was freed after it was looked up"), "{message}");
    assert_refused!(gpu.export_at(base, 1), PointerError::ForeignPointer { .. });
}

/// Exports leave no descriptor behind, not even those that are refused.
pub fn exports_leave_no_descriptors(gpu: &dyn Gpu) {
    let memory = gpu.memory(2 << 20).unwrap();
    // Has the driver open what it opens once.
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

/// The exporter's own buffers have the requested size, or are refused.
pub fn allocates(gpu: &dyn Gpu) {
    let buffer = gpu.allocate(3 << 20).unwrap();
    assert!(buffer.dmabuf.size() >= 3 << 20 && buffer.dmabuf.is_writable() && buffer.backing.is_none());
    assert_refused!(gpu.allocate(0), Error::Range(RangeError::Empty { .. }));
    assert_refused!(gpu.allocate(u64::MAX), Error::SizeTooLarge { .. });
    // CUDA and ROCm also report how much there is.
    assert_refused!(gpu.allocate(1 << 45), Error::OutOfMemory { requested: 0x2000_0000_0000, .. });
}
