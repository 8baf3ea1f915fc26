//! A kernel with an IOMMU: two devices of one kind, one behind it and one beside it.

use std::fs;
use std::os::fd::AsFd;

use dma_sg::DmaSgList;
use dma_sg::device_view::{self, DeviceView, DmaDevice};
use dma_sg::pci::PciAddress;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::assert_refused;
use crate::common::assert_same;
use crate::common::buffers::{every_kind, heap};
use crate::common::census::Census;
use crate::common::kcore::Kcore;
use crate::common::pattern;
use crate::common::system::{driven_by, modprobe};

const SIZE: u64 = 6 << 20;

/// A virtio device behind the IOMMU, and one on the host bridge that bypasses it.
fn devices() -> (PciAddress, PciAddress) {
    modprobe("dma_sg");
    let behind = "0000:00:1e.0".parse().unwrap();
    let all = driven_by("virtio-pci");
    assert!(all.contains(&behind), "{all:?}");
    let beside = all.into_iter().find(|address| address.bus > 0x80).expect("a device on the other bridge");
    (behind, beside)
}

fn longest(list: &DmaSgList) -> u64 {
    list.runs().iter().map(|run| run.len).max().unwrap()
}

#[test]
fn one_of_the_devices_is_behind_the_iommu() {
    let (behind, beside) = devices();
    let group =
        |address: PciAddress| fs::exists(format!("/sys/bus/pci/devices/{address}/iommu_group")).unwrap();
    assert!(group(behind));
    assert!(!group(beside));
}

#[test]
fn the_iommu_makes_scattered_memory_one_run() {
    let (behind, beside) = devices();
    let kcore = Kcore::open();
    for kind in every_kind() {
        let subject = (kind.allocate)(SIZE);
        let size = subject.dmabuf.size();
        let put = pattern(size as usize, 61);
        subject.dmabuf.map().unwrap().write(0, &put).unwrap();
        let list = |device| DeviceView::new(&subject.dmabuf, device).unwrap().list().unwrap();
        let (seen, physical) = (list(DmaDevice::Pci(behind)), list(DmaDevice::Untranslated));
        assert_eq!((seen.total_len(), physical.total_len()), (size, size), "{}", kind.name);
        assert_ne!(seen, physical, "{}", kind.name);
        assert_eq!(seen.runs().len(), 1, "{}: {seen}", kind.name);
        // Memory that is in one piece already has nothing to gain.
        if physical.runs().len() > 1 {
            assert!(longest(&seen) > longest(&physical), "{}", kind.name);
        }
        assert_eq!(list(DmaDevice::Pci(beside)), physical, "{}: beside the IOMMU", kind.name);
        let runs = physical.runs().iter().map(|run| (run.addr, run.len));
        assert_same(&kcore.gather(runs), &put, kind.name);
    }
    let scattered = crate::common::buffers::four_ranges(SIZE).dmabuf;
    let physical = DeviceView::new(&scattered, DmaDevice::Untranslated).unwrap().list().unwrap();
    assert!(physical.runs().len() > 1, "nothing here was scattered: {physical}");
}

#[test]
fn a_device_that_loses_its_driver_ends_its_views() {
    let (behind, beside) = devices();
    for address in [behind, beside] {
        let census = Census::take();
        let buffer = heap(SIZE);
        let [ending, other] = [DmaDevice::Pci(address), DmaDevice::Untranslated]
            .map(|device| DeviceView::new(&buffer, device).unwrap());
        assert!(ending.is_valid());
        let driver = "/sys/bus/pci/drivers/virtio-pci";
        fs::write(format!("{driver}/unbind"), address.to_string()).unwrap();

        assert!(!ending.is_valid());
        let mut fds = [PollFd::new(ending.as_fd(), PollFlags::POLLPRI)];
        assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(1));
        assert_eq!(fds[0].revents(), Some(PollFlags::POLLPRI));
        assert_refused!(ending.list(), device_view::Error::Ended { source, .. } if source.raw_os_error() == Some(libc::ESTALE));
        assert!(other.is_valid());
        assert_eq!(other.list().unwrap().total_len(), SIZE);
        let unbound = DeviceView::new(&buffer, DmaDevice::Pci(address));
        assert_refused!(unbound, device_view::Error::Map { source, .. } if source.raw_os_error() == Some(libc::ENXIO));

        fs::write(format!("{driver}/bind"), address.to_string()).unwrap();
        let again = DeviceView::new(&buffer, DmaDevice::Pci(address)).unwrap();
        assert_eq!(again.list().unwrap().total_len(), SIZE);
        drop((ending, other, again, buffer));
        census.assert_unchanged();
    }
}

/// As vfio-pci, the driver of a bridge does no DMA through the kernel, and lets others do theirs.
#[test]
fn a_device_that_manages_its_own_dma_is_refused() {
    devices();
    let port = driven_by("pcieport")[0];
    let refused = DeviceView::new(heap(4096), DmaDevice::Pci(port));
    assert_refused!(refused, device_view::Error::Map { source, .. } if source.raw_os_error() == Some(libc::EBUSY));
}
