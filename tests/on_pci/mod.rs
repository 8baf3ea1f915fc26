//! PCI devices in a topology that QEMU was asked for: root ports, a switch with two downstream ports,
//! a device of two functions, and two more host bridges on two NUMA nodes.

mod doctor;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use dma_sg::pci::{
    self, AcsRedirect, BarKind, BarRefusal, CommonAncestor, Location, P2pRoute, PciDevice, Sysfs, nearest,
};
use dmabuf_rdma::exporter::Exporter;

use crate::assert_refused;
use crate::common::drm::card;

/// Follows device and function numbers from a host bridge down, whatever the bus numbers are.
#[track_caller]
fn at(bridge: &str, numbers: &[&str]) -> PciDevice {
    let mut path = PathBuf::from("/sys/devices").join(bridge);
    for end in numbers {
        let entries = fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let name = names.iter().find(|name| name.len() == 12 && name.ends_with(end));
        path.push(name.unwrap_or_else(|| panic!("{} has no {end}: {names:?}", path.display())));
    }
    let address = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
    Sysfs::new().device(address).unwrap()
}

/// The devices at the two downstream ports of the switch.
fn in_switch() -> [PciDevice; 2] {
    ["00.0", "01.0"].map(|port| at("pci0000:00", &[":10.0", ":00.0", port, ":00.0"]))
}

/// The two functions behind the other root port.
fn two_functions() -> [PciDevice; 2] {
    ["00.0", "00.1"].map(|function| at("pci0000:00", &[":11.0", function]))
}

fn between(from: &PciDevice, to: &PciDevice) -> P2pRoute {
    let (there, back) = (from.route_to(to).unwrap(), to.route_to(from).unwrap());
    assert!(there.cmp_distance(&back).is_eq(), "{there} / {back}");
    there
}

#[test]
fn every_route_through_the_topology() {
    let [one, other] = in_switch();
    let upstream = at("pci0000:00", &[":10.0", ":00.0"]).address();
    let route = between(&one, &other);
    assert_eq!(
        (&route.common_ancestor, route.ports),
        (&CommonAncestor::Switch { port: upstream }, 3),
        "{route}"
    );
    assert_eq!((route.stays_below_root(), &route.iommu_groups), (Some(true), &(None, None)));

    let [first, second] = two_functions();
    assert_eq!(between(&first, &second).common_ancestor, CommonAncestor::SameDevice);
    let route = between(&one, &first);
    assert_eq!(
        (route.common_ancestor, route.ports),
        (CommonAncestor::HostBridge { bridge: "pci0000:00".into() }, 4)
    );
    let bridge = at("pci0000:00", &[":11.0"]);
    assert_eq!(between(&first, &bridge).common_ancestor, CommonAncestor::RootPort { port: bridge.address() });

    let nodes = ["pci0000:80", "pci0000:c0"].map(|bridge| at(bridge, &[":00.0", ":00.0"]));
    assert_eq!(nodes.each_ref().map(PciDevice::numa_node), [Some(0), Some(1)]);
    let route = between(&nodes[0], &nodes[1]);
    assert_eq!(
        (&route.common_ancestor, route.ports),
        (&CommonAncestor::TwoSockets { numa_nodes: (0, 1) }, 2),
        "{route}"
    );
    // The first host bridge has no NUMA node in this machine.
    assert_eq!(between(&one, &nodes[1]).common_ancestor, CommonAncestor::TwoHostBridges { numa_node: None });

    let order = [nodes[1].clone(), first.clone(), other.clone(), nodes[0].clone(), one.clone()];
    let found: Vec<_> = nearest(&one, &order).unwrap().into_iter().map(|route| route.to).collect();
    assert_eq!(found, [one, other, first, nodes[1].clone(), nodes[0].clone()]);
}

/// Sets and clears the bits of a real port.
#[test]
fn access_control_of_a_port_is_seen() {
    let [first, second] = two_functions();
    let port = at("pci0000:00", &[":11.0"]);
    let config = File::options().read(true).write(true).open(port.path().join("config")).unwrap();
    let mut bytes = [0; 4096];
    config.read_exact_at(&mut bytes, 0).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let next = |at: &usize| Some(word(*at) as usize >> 20).filter(|next| *next != 0);
    let acs = std::iter::successors(Some(0x100), next).find(|at| word(*at) as u16 == 0xd).expect("ACS");
    let set = |bits: u16| {
        config.write_all_at(&bits.to_le_bytes(), acs as u64 + 6).unwrap();
        let mut seen = [0; 2];
        config.read_exact_at(&mut seen, acs as u64 + 6).unwrap();
        assert_eq!(u16::from_le_bytes(seen), bits, "the port takes these bits");
    };
    assert_eq!(between(&first, &second).redirect, AcsRedirect::No);
    for (bits, redirects) in [(0x1d, true), (0x04, true), (0x08, true), (0x11, false), (0x00, false)] {
        set(bits);
        let route = between(&first, &second);
        let expected = if redirects { AcsRedirect::By(vec![port.address()]) } else { AcsRedirect::No };
        assert_eq!(
            (&route.redirect, route.stays_below_root()),
            (&expected, Some(!redirects)),
            "{bits:#x}: {route}"
        );
    }
}

#[test]
fn class_devices_are_found_where_they_are() {
    let sysfs = Sysfs::new();
    let netdev = Some("wire0".to_string());
    assert_eq!(sysfs.rdma_device("rxe0").unwrap(), Location::NotPci { name: "rxe0".into(), netdev });
    assert_eq!(sysfs.rdma_pci_devices().unwrap(), []);
    assert_refused!(sysfs.rdma_device("mlx5_0"), pci::Error::UnknownRdmaDevice { present, .. } if present == &["rxe0", "rxe1"]);

    // One card is below a virtio device of its PCI function, one is software.
    let name = |driver| {
        let text = card(driver).name();
        let (_, path) = text.rsplit_once('/').unwrap();
        path.trim_end_matches(')').to_string()
    };
    let gpu = sysfs.drm_card(&name("virtio_gpu")).unwrap().into_pci().unwrap();
    let id = fs::read_to_string(gpu.path().join("device")).unwrap();
    assert_eq!(id.trim(), "0x1050", "virtio-gpu's device ID at {gpu}");
    assert_eq!(
        between(&gpu, &in_switch()[0]).common_ancestor,
        CommonAncestor::HostBridge { bridge: "pci0000:00".into() }
    );
    let vgem = sysfs.drm_card(&name("vgem")).unwrap();
    assert!(matches!(&vgem, Location::NotPci { netdev: None, .. }), "{vgem}");
    let unknown = "0000:77:00.0".parse().unwrap();
    assert_refused!(sysfs.device(unknown), pci::Error::NotInSysfs { .. });
}

#[test]
fn bars_are_where_the_kernel_says() {
    // A register block, and 16 MiB of shared memory.
    let [_, shared] = in_switch();
    let bars = shared.bars().unwrap();
    let sizes: Vec<_> =
        bars.iter().map(|bar| (bar.index, bar.size, bar.is_prefetchable, bar.is_64bit)).collect();
    assert_eq!(sizes, [(0, 256, false, false), (2, 16 << 20, true, true)]);
    let iomem = fs::read_to_string("/proc/iomem").unwrap();
    for bar in &bars {
        let (start, end) = (bar.cpu_address, bar.cpu_address + bar.size - 1);
        let line = format!("{start:08x}-{end:08x} : {}", shared.address());
        assert!(iomem.lines().any(|l| l.trim() == line), "{line} is not in\n{iomem}");
        assert_eq!(bar.bus_address, start, "on x86");
    }
    let list = shared.bar(2).unwrap().sg().unwrap();
    assert_eq!((list.runs().len(), list.total_len()), (1, 16 << 20));

    // The device has no driver, so decoding can be switched off and on.
    let config = File::options().read(true).write(true).open(shared.path().join("config")).unwrap();
    let mut command = [0; 2];
    config.read_exact_at(&mut command, 4).unwrap();
    config.write_all_at(&[command[0] & !2, command[1]], 4).unwrap();
    let off = shared.bar(2);
    config.write_all_at(&command, 4).unwrap();
    assert_refused!(off, pci::Error::BarUnusable { bar: 2, refusal: BarRefusal::NotDecoding, .. });
    assert!(shared.bar(2).is_ok());
    assert_refused!(
        shared.bar(1),
        pci::Error::BarUnusable { bar: 1, refusal: BarRefusal::Absent { .. }, .. }
    );

    let smbus = at("pci0000:00", &[":1f.3"]);
    assert_eq!(smbus.bars().unwrap()[0].kind, BarKind::IoPort);
    assert_refused!(smbus.bar(4), pci::Error::BarUnusable { bar: 4, refusal: BarRefusal::IoPort, .. });
}
