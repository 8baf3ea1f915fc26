//! A kernel whose VFIO exports PCI BARs as dma-bufs. The machine has an IOMMU, a device with memory, and two
//! devices that can access it: one behind the IOMMU, the other not.

use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use dma_sg::device_view::{DeviceView, DmaDevice, Error as ViewError};
use dma_sg::pci::{self, Bar, BarRefusal, PciAddress, Sysfs};
use dma_sg::{DmaSg, RangeError};
use dmabuf_rdma::dmabuf;
use dmabuf_rdma::exporter::{VfioDevice, VfioError};
use dmabuf_rdma::mr::{MemoryRegion, RegisterError, probe};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::peers::{domain, import_path};
use crate::common::raw::alloc_dma_handle;
use crate::common::system::{driven_by, modprobe};

/// The BAR of ivshmem's memory, and that of its registers, which has 256 bytes.
const MEMORY: u8 = 2;
const REGISTERS: u8 = 0;

/// The configuration space's offset in the device's descriptor, the command register in it, and the bit that
/// enables memory decoding.
const CONFIG_REGION: u64 = 7 << 40;
const COMMAND: u64 = 4;
const MEMORY_DECODING: u16 = 1 << 1;

/// The only device of a vendor and model.
#[track_caller]
fn find(vendor: u16, device: u16) -> PciAddress {
    let id = |path: &std::path::Path, name| {
        let text = fs::read_to_string(path.join(name)).unwrap();
        u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
    };
    let entries = fs::read_dir("/sys/bus/pci/devices").unwrap().map(|entry| entry.unwrap());
    let mut found =
        entries.filter(|e| (id(&e.path(), "vendor"), id(&e.path(), "device")) == (vendor, device));
    let address = found.next().expect("a device of that model").file_name();
    assert!(found.next().is_none(), "more than one device of that model");
    address.to_str().unwrap().parse().unwrap()
}

/// QEMU's ivshmem: plain memory behind a BAR.
fn ivshmem() -> PciAddress {
    find(0x1af4, 0x1110)
}

/// Binds a device to vfio-pci.
fn bind(address: PciAddress) {
    modprobe("vfio_pci");
    modprobe("vfio_iommu_type1");
    // The emulated IOMMU does not remap interrupts, which VFIO must be told to accept.
    fs::write("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y").unwrap();
    let folder = format!("/sys/bus/pci/devices/{address}");
    fs::write(format!("{folder}/driver_override"), "vfio-pci").unwrap();
    if !fs::exists(format!("{folder}/driver")).unwrap() {
        fs::write("/sys/bus/pci/drivers_probe", address.to_string()).unwrap();
    }
}

fn device() -> VfioDevice {
    bind(ivshmem());
    VfioDevice::open(ivshmem()).unwrap()
}

fn memory() -> Bar {
    Sysfs::new().device(ivshmem()).unwrap().bar(MEMORY).unwrap()
}

/// A virtio device behind the IOMMU, and one on a host bridge that bypasses it.
fn readers() -> (DmaDevice<'static>, DmaDevice<'static>) {
    modprobe("dma_sg");
    let behind = "0000:00:1e.0".parse().unwrap();
    let all = driven_by("virtio-pci");
    assert!(all.contains(&behind), "{all:?}");
    let beside = all.into_iter().find(|address| address.bus > 0x80).expect("a device on the other bridge");
    (DmaDevice::Pci(behind), DmaDevice::Pci(beside))
}

/// Switches memory decoding through VFIO, which revokes the exported buffers and makes them valid again.
fn decode_memory(device: &VfioDevice, on: bool) {
    let file = File::from(device.as_fd().try_clone_to_owned().unwrap());
    let mut command = [0; 2];
    file.read_exact_at(&mut command, CONFIG_REGION + COMMAND).unwrap();
    let before = u16::from_le_bytes(command);
    let after = if on { before | MEMORY_DECODING } else { before & !MEMORY_DECODING };
    file.write_all_at(&after.to_le_bytes(), CONFIG_REGION + COMMAND).unwrap();
}

#[test]
fn a_bar_is_exported_whole_in_part_and_in_two_ranges() {
    let device = device();
    let size = memory().size;
    assert_eq!(size, 16 << 20);
    let census = Census::take();
    let whole = device.export(MEMORY, ..).unwrap();
    let part = device.export(MEMORY, 0x3000..0x7000).unwrap();
    let two = device.export_ranges(MEMORY, [size - 0x1000..size, 0..0x2000]).unwrap();
    assert_eq!([whole.size(), part.size(), two.size()], [size, 0x4000, 0x3000]);
    assert_eq!(whole.exporter_name().unwrap(), "vfio_pci_core");
    assert_ne!(whole.id(), part.id());
    assert_eq!((whole.pci_device(), two.pci_device()), (Some(device.address()), Some(device.address())));
    // The CPU cannot map it, and the error names the exporter.
    let refused = whole.map();
    let message =
        assert_refused!(refused, dmabuf::Error::Map { exporter, .. } if exporter == "vfio_pci_core");
    assert!(message.contains("vfio_pci_core"), "{message}");
    drop((whole, part, two));
    census.assert_unchanged();
}

/// The addresses at which another device accesses the BAR.
#[test]
fn another_device_sees_the_bus_addresses_of_the_bar() {
    let device = device();
    let bar = memory();
    let (behind, beside) = readers();
    let census = Census::take();
    let run = |offset, len| DmaSg { addr: bar.bus_address + offset, len };

    let whole = device.export(MEMORY, ..).unwrap();
    let list = DeviceView::new(&whole, beside).unwrap().list().unwrap();
    assert_eq!(list.runs(), [run(0, bar.size)]);
    assert_eq!(list, bar.sg().unwrap());

    let two = device.export_ranges(MEMORY, [0x8000..0xa000, 0x1000..0x2000]).unwrap();
    let list = DeviceView::new(&two, beside).unwrap().list().unwrap();
    assert_eq!(list.runs(), [run(0x8000, 0x2000), run(0x1000, 0x1000)]);

    // Behind the IOMMU the address is another one. (One range only: Linux 7.3.4 maps each range at the start
    // of the IOVAs, and fails with EADDRINUSE on the second.)
    let part = device.export(MEMORY, 0x8000..0xb000).unwrap();
    let list = DeviceView::new(&part, behind).unwrap().list().unwrap();
    assert_eq!((list.runs().len(), list.total_len()), (1, 0x3000));
    assert_ne!(list.runs()[0].addr, run(0x8000, 0).addr);
    drop((whole, two, part));
    census.assert_unchanged();
}

#[test]
fn soft_roce_refuses_memory_without_pages() {
    let device = device();
    let domain = domain();
    let census = Census::take();
    let buffer = device.export(MEMORY, ..).unwrap();
    // The exporter's EOPNOTSUPP, which a device that does not import dma-bufs also returns.
    let refused = MemoryRegion::builder(&domain, &buffer).register();
    let message = assert_refused!(refused, RegisterError::MemoryWithoutPages { source, .. } if source.raw_os_error() == Some(libc::EOPNOTSUPP));
    assert!(message.contains("rxe0 imports dma-bufs") && message.contains("vfio_pci_core"), "{message}");
    assert_eq!(probe(domain.context()).unwrap(), import_path());
    drop(buffer);
    census.assert_unchanged();
}

#[test]
fn revoking_the_buffer_ends_the_view() {
    let device = device();
    let (_, beside) = readers();
    let census = Census::take();
    let buffer = device.export(MEMORY, ..).unwrap();
    let view = DeviceView::new(&buffer, beside).unwrap();
    assert!(view.is_valid());
    decode_memory(&device, false);

    assert!(!view.is_valid());
    let mut fds = [PollFd::new(view.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI)];
    assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(1));
    assert_eq!(fds[0].revents(), Some(PollFlags::POLLIN | PollFlags::POLLPRI));
    assert_refused!(view.list(), ViewError::Ended { .. });
    // It cannot be mapped again until decoding is on.
    let refused = DeviceView::new(&buffer, beside);
    assert_refused!(refused, ViewError::Map { source, .. } if source.raw_os_error() == Some(libc::ENODEV));
    let refused = device.export(MEMORY, ..);
    assert_refused!(
        refused,
        VfioError::Pci(pci::Error::BarUnusable { bar: MEMORY, refusal: BarRefusal::NotDecoding, .. })
    );
    decode_memory(&device, true);
    assert_eq!(DeviceView::new(&buffer, beside).unwrap().list().unwrap(), memory().sg().unwrap());
    drop((view, buffer));
    census.assert_unchanged();
}

#[test]
fn bars_and_ranges_that_cannot_be_exported_are_refused() {
    let device = device();
    let size = memory().size;
    let census = Census::take();
    let range = |range: Range<u64>| device.export(MEMORY, range);
    let ranges = |ranges: &[Range<u64>]| device.export_ranges(MEMORY, ranges.iter().cloned());
    let small = VfioError::BarTooSmall { device: ivshmem(), bar: REGISTERS, size: 256, page_size: 4096 };
    let refused = device.export(REGISTERS, ..);
    assert_eq!(assert_refused!(refused, VfioError::BarTooSmall { size: 256, .. }), small.to_string());
    assert_refused!(device.export(6, ..), VfioError::NotABar { bar: 6, .. });
    assert_refused!(
        device.export(5, ..),
        VfioError::Pci(pci::Error::BarUnusable { refusal: BarRefusal::Absent { .. }, .. })
    );
    assert_refused!(ranges(&[]), VfioError::Range(RangeError::Empty { .. }));
    assert_refused!(range(0x1000..0x1000), VfioError::Range(RangeError::Empty { offset: 0x1000 }));
    assert_refused!(
        ranges(&[0..0x1000, size..size + 0x1000]),
        VfioError::Range(RangeError::OutOfRange { .. })
    );
    assert_refused!(range(u64::MAX - 0xfff..u64::MAX), VfioError::Range(RangeError::OutOfRange { .. }));
    assert_refused!(range(0x800..0x1800), VfioError::Unaligned { offset: 0x800, .. });
    assert_refused!(ranges(&[0..0x1000, 0..0x10]), VfioError::Unaligned { length: 0x10, .. });
    census.assert_unchanged();
}

#[test]
fn opening_says_what_vfio_needs() {
    let census = Census::take();
    let absent = "0000:fe:1f.7".parse().unwrap();
    assert_refused!(VfioDevice::open(absent), VfioError::Pci(pci::Error::NotInSysfs { .. }));
    let (behind, _) = readers();
    let DmaDevice::Pci(behind) = behind else { unreachable!() };
    let refused = VfioDevice::open(behind);
    let message = assert_refused!(refused, VfioError::NotBound { driver: Some(_), .. });
    assert!(message.contains("is bound to virtio-pci"), "{message}");
    // A device without a driver and without a group.
    let bridge = "0000:00:00.0".parse().unwrap();
    assert_refused!(VfioDevice::open(bridge), VfioError::NotBound { driver: None, .. });
    let first = device();
    // A group can be opened once.
    let refused = VfioDevice::open(ivshmem());
    let message = assert_refused!(refused, VfioError::Open { source, .. } if source.raw_os_error() == Some(libc::EBUSY));
    assert!(message.ends_with("another process has the group"), "{message}");
    drop(first);
    drop(device());
    census.assert_unchanged();
}

/// A device whose descriptor the process got otherwise: here a copy of one opened the usual way.
#[test]
fn a_device_descriptor_that_is_passed_in_exports_too() {
    let opened = device();
    let copy = VfioDevice::from_fd(opened.as_fd().try_clone_to_owned().unwrap(), ivshmem());
    assert_eq!(copy.export(MEMORY, ..).unwrap().size(), memory().size);
    let other = VfioDevice::from_fd(File::open("/dev/null").unwrap(), ivshmem());
    let refused = other.export(MEMORY, ..);
    let message = assert_refused!(refused, VfioError::Unsupported { source, .. } if source.raw_os_error() == Some(libc::ENOTTY));
    assert!(message.contains("6.19"), "{message}");
}

/// The kernel has them, and offers the object only on devices whose driver does.
#[test]
fn the_device_has_no_dma_handles() {
    let refused = alloc_dma_handle(&domain()).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPROTONOSUPPORT));
}

/// This kernel's soft-RoCE reports a request that it refuses before it answers it. Who stopped the queue pair at the report
/// would take the answer from the peer.
#[test]
fn a_refused_request_is_answered() {
    crate::on_dmabuf_rxe::transfer::endings::a_wrong_key_ends_both_directions_of_both_sides();
}
