//! A kernel whose VFIO makes dma-bufs of PCI BARs, with an IOMMU, a device with memory of its own, and two
//! devices to reach it: one behind the IOMMU and one beside it.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use dmabuf_rdma::Error;
use dmabuf_rdma::error::{AddressError, VfioError};
use dmabuf_rdma::exporter::VfioDevice;
use dmabuf_rdma::mr::{MemoryRegion, Path, probe};
use dmabuf_rdma::pci::{Bar, BarRefusal, PciAddress, Sysfs};
use dmabuf_rdma::sg::{DmaDevice, DmaSg, device_view};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::assert_refused;
use crate::common::census::Census;
use crate::common::peers::domain;
use crate::common::system::{driven_by, modprobe};

/// The BAR of ivshmem that is memory, and the one of its registers: 256 bytes.
const MEMORY: u8 = 2;
const REGISTERS: u8 = 0;

/// The configuration space among the regions of a device, and the command register with the bit that
/// switches memory decoding on.
const CONFIG_REGION: u64 = 7 << 40;
const COMMAND: u64 = 4;
const MEMORY_DECODING: u16 = 1 << 1;

/// The one device of a vendor and model.
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

/// ivshmem: plain memory behind a BAR.
fn ivshmem() -> PciAddress {
    find(0x1af4, 0x1110)
}

/// Has vfio-pci hold a device, whoever held it.
fn bind(address: PciAddress) {
    modprobe("vfio_pci");
    modprobe("vfio_iommu_type1");
    // The emulated IOMMU does not remap interrupts, and VFIO wants that to be known.
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

/// A virtio device behind the IOMMU, and one on the host bridge that bypasses it.
fn readers() -> (DmaDevice<'static>, DmaDevice<'static>) {
    modprobe("dma_sg");
    let behind = "0000:00:1e.0".parse().unwrap();
    let all = driven_by("virtio-pci");
    assert!(all.contains(&behind), "{all:?}");
    let beside = all.into_iter().find(|address| address.bus > 0x80).expect("a device on the other bridge");
    (DmaDevice::Pci(behind), DmaDevice::Pci(beside))
}

/// Writes the command register through VFIO, which revokes and gives back what was exported.
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
    let whole = device.export(MEMORY).unwrap();
    let part = device.export_ranges(MEMORY, &[(0x3000, 0x4000)]).unwrap();
    let two = device.export_ranges(MEMORY, &[(size - 0x1000, 0x1000), (0, 0x2000)]).unwrap();
    assert_eq!([whole.size(), part.size(), two.size()], [size, 0x4000, 0x3000]);
    assert_eq!(whole.exporter_name().unwrap(), "vfio_pci_core");
    assert_ne!(whole.id(), part.id());
    // It is no memory of the CPU's, and the error says whose it is.
    let refused = whole.map();
    let message = assert_refused!(refused, Error::Map { exporter, .. } if exporter == "vfio_pci_core");
    assert!(message.contains("vfio_pci_core"), "{message}");
    drop((whole, part, two));
    census.assert_unchanged();
}

/// The point of it all: the addresses at which another device reaches the BAR.
#[test]
fn another_device_sees_the_bars_bus_addresses() {
    let device = device();
    let bar = memory();
    let (behind, beside) = readers();
    let census = Census::take();
    let run = |offset, len| DmaSg { addr: bar.bus_address + offset, len };

    let whole = device.export(MEMORY).unwrap();
    let list = device_view(&whole, beside).unwrap().list().unwrap();
    assert_eq!(list.runs(), [run(0, bar.size)]);
    assert_eq!(list, bar.sg());

    let two = device.export_ranges(MEMORY, &[(0x8000, 0x2000), (0x1000, 0x1000)]).unwrap();
    let list = device_view(&two, beside).unwrap().list().unwrap();
    assert_eq!(list.runs(), [run(0x8000, 0x2000), run(0x1000, 0x1000)]);

    // The IOMMU in between gives it another address. (One range only: 7.3.4 links each range at the start of
    // the IOVAs, and answers EADDRINUSE to the second.)
    let part = device.export_ranges(MEMORY, &[(0x8000, 0x3000)]).unwrap();
    let list = device_view(&part, behind).unwrap().list().unwrap();
    assert_eq!((list.runs().len(), list.total_len()), (1, 0x3000));
    assert_ne!(list.runs()[0].addr, run(0x8000, 0).addr);
    drop((whole, two, part));
    census.assert_unchanged();
}

#[test]
fn soft_roce_refuses_it_for_what_it_is() {
    let device = device();
    let domain = domain();
    let census = Census::take();
    let buffer = device.export(MEMORY).unwrap();
    // EOPNOTSUPP of the exporter, which is also how a device without import answers.
    let refused = MemoryRegion::builder(&domain, &buffer).register();
    let message = assert_refused!(refused, Error::MemoryWithoutPages { source, .. } if source.raw_os_error() == Some(libc::EOPNOTSUPP));
    assert!(message.contains("rxe0 imports dma-bufs") && message.contains("vfio_pci_core"), "{message}");
    assert_eq!(probe(domain.context()).unwrap().path(), Some(Path::Uverbs));
    drop(buffer);
    census.assert_unchanged();
}

#[test]
fn an_exporter_that_takes_its_memory_away_ends_the_view() {
    let device = device();
    let (_, beside) = readers();
    let census = Census::take();
    let buffer = device.export(MEMORY).unwrap();
    let view = device_view(&buffer, beside).unwrap();
    assert!(view.is_valid());
    decode_memory(&device, false);

    assert!(!view.is_valid());
    let mut fds = [PollFd::new(view.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI)];
    assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(1));
    assert_eq!(fds[0].revents(), Some(PollFlags::POLLIN | PollFlags::POLLPRI));
    assert_refused!(view.list(), Error::Addresses(AddressError::ViewEnded { .. }));
    // Nor is it mapped anew, until decoding is on again.
    let refused = device_view(&buffer, beside);
    assert_refused!(refused, Error::Addresses(AddressError::View { source, .. }) if source.raw_os_error() == Some(libc::ENODEV));
    let refused = device.export(MEMORY);
    assert_refused!(
        refused,
        Error::Addresses(AddressError::BarUnusable { bar: MEMORY, refusal: BarRefusal::NotDecoding, .. })
    );
    decode_memory(&device, true);
    assert_eq!(device_view(&buffer, beside).unwrap().list().unwrap(), memory().sg());
    drop((view, buffer));
    census.assert_unchanged();
}

#[test]
fn what_cannot_be_exported_is_refused_by_name() {
    let device = device();
    let size = memory().size;
    let census = Census::take();
    let ranges = |ranges: &[(u64, u64)]| device.export_ranges(MEMORY, ranges);
    let small = VfioError::BarTooSmall { device: ivshmem(), bar: REGISTERS, size: 256, page_size: 4096 };
    let refused = device.export(REGISTERS);
    assert_eq!(
        assert_refused!(refused, Error::Vfio(VfioError::BarTooSmall { size: 256, .. })),
        small.to_string()
    );
    assert_refused!(device.export(6), Error::Vfio(VfioError::NotABar { bar: 6, .. }));
    assert_refused!(
        device.export(5),
        Error::Addresses(AddressError::BarUnusable { refusal: BarRefusal::Absent { .. }, .. })
    );
    assert_refused!(ranges(&[]), Error::ZeroLength { .. });
    assert_refused!(ranges(&[(0x1000, 0)]), Error::ZeroLength { offset: 0x1000 });
    assert_refused!(ranges(&[(0, 0x1000), (size, 0x1000)]), Error::OutOfRange { .. });
    assert_refused!(ranges(&[(u64::MAX - 0xfff, 0x1000)]), Error::OutOfRange { .. });
    assert_refused!(ranges(&[(0x800, 0x1000)]), Error::Vfio(VfioError::Unaligned { offset: 0x800, .. }));
    assert_refused!(
        ranges(&[(0, 0x1000), (0, 0x10)]),
        Error::Vfio(VfioError::Unaligned { length: 0x10, .. })
    );
    census.assert_unchanged();
}

#[test]
fn what_vfio_wants_of_a_device_is_said() {
    let census = Census::take();
    let absent = "0000:fe:1f.7".parse().unwrap();
    assert_refused!(VfioDevice::open(absent), Error::Addresses(AddressError::NotInSysfs { .. }));
    let (behind, _) = readers();
    let DmaDevice::Pci(behind) = behind else { unreachable!() };
    let refused = VfioDevice::open(behind);
    let message = assert_refused!(refused, Error::Vfio(VfioError::NotBound { driver: Some(_), .. }));
    assert!(message.contains("held by virtio-pci"), "{message}");
    // No driver at all, and no group.
    let bridge = "0000:00:00.0".parse().unwrap();
    assert_refused!(VfioDevice::open(bridge), Error::Vfio(VfioError::NotBound { driver: None, .. }));
    let first = device();
    // A group is opened once.
    let refused = VfioDevice::open(ivshmem());
    assert_refused!(refused, Error::Vfio(VfioError::Open { source, .. }) if source.raw_os_error() == Some(libc::EBUSY));
    drop(first);
    drop(device());
    census.assert_unchanged();
}

/// What VFIO gave by other means, here a descriptor copied from a device opened the usual way.
#[test]
fn a_device_from_elsewhere_exports_as_well() {
    let opened = device();
    let copy = VfioDevice::from_fd(opened.as_fd().try_clone_to_owned().unwrap(), ivshmem());
    assert_eq!(copy.export(MEMORY).unwrap().size(), memory().size);
    let other = VfioDevice::from_fd(File::open("/dev/null").unwrap(), ivshmem());
    let refused = other.export(MEMORY);
    let message = assert_refused!(refused, Error::Vfio(VfioError::Unsupported { source, .. }) if source.raw_os_error() == Some(libc::ENOTTY));
    assert!(message.contains("6.19"), "{message}");
}
