//! Routes and BARs of the machines in the folder `machines`.

mod machine;

use std::cmp::Ordering;

use super::{
    AcsRedirect, BarKind, BarRefusal, CommonAncestor, Error, Location, P2pRoute, PciAddress, nearest,
};
use machine::Machine;

macro_rules! machine {
    ($name:literal) => {
        Machine::new(include_str!(concat!("machines/", $name, ".txt")))
    };
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn switch(port: &str) -> CommonAncestor {
    CommonAncestor::Switch { port: address(port) }
}

/// The route from a card to an RDMA device; the route back is equally long.
fn between(machine: &Machine, card: &str, rdma: &str) -> P2pRoute {
    let card = machine.sysfs().drm_card(card).unwrap().into_pci().unwrap();
    let rdma = machine.rdma(rdma);
    let (there, back) = (card.route_to(&rdma).unwrap(), rdma.route_to(&card).unwrap());
    assert_eq!(there.cmp_distance(&back), Ordering::Equal, "{there} / {back}");
    assert_eq!(there.stays_below_root(), back.stays_below_root());
    there
}

/// The names of all RDMA devices, nearest to a card first.
fn order(machine: &Machine, card: &str) -> Vec<String> {
    let sysfs = machine.sysfs();
    let card = sysfs.drm_card(card).unwrap().into_pci().unwrap();
    let routes = nearest(&card, &sysfs.rdma_pci_devices().unwrap()).unwrap();
    routes.iter().map(|route| route.to.name().unwrap().to_string()).collect()
}

#[test]
fn a_server_with_switches_and_two_sockets() {
    let dgx = machine!("dgx");
    let route = between(&dgx, "card0", "mlx5_0");
    assert_eq!(
        (&route.common_ancestor, route.ports, &route.redirect),
        (&switch("0000:01:00.0"), 3, &AcsRedirect::No)
    );
    assert_eq!(route.stays_below_root(), Some(true));
    assert_eq!(
        route.to_string(),
        "card0 (0000:03:00.0) to mlx5_0 (0000:04:00.0): below one switch (0000:01:00.0), 3 ports between; traffic stays below the root: a good pair"
    );
    // A switch below the switch has more ports and the same common ancestor.
    let route = between(&dgx, "card0", "mlx5_2");
    assert_eq!((&route.common_ancestor, route.ports), (&switch("0000:01:00.0"), 5));
    // Two switches of one host bridge, two host bridges of one socket, two sockets.
    let route = between(&dgx, "card0", "mlx5_3");
    assert_eq!(
        (route.common_ancestor, route.ports),
        (CommonAncestor::HostBridge { bridge: "pci0000:00".into() }, 6)
    );
    let route = between(&dgx, "card0", "mlx5_4");
    assert_eq!(route.common_ancestor, CommonAncestor::TwoHostBridges { numa_node: Some(0) });
    assert_eq!((route.stays_below_root(), route.ports), (Some(false), 4));
    let route = between(&dgx, "card0", "mlx5_5");
    assert_eq!(route.common_ancestor, CommonAncestor::TwoSockets { numa_nodes: (0, 1) });
    let text = route.to_string();
    assert!(
        text.contains("two sockets (nodes 0 and 1)") && text.ends_with("choose a device on node 0"),
        "{text}"
    );

    assert_eq!(order(&dgx, "card0"), ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3", "mlx5_4", "mlx5_5"]);
    assert_eq!(order(&dgx, "card1")[0], "mlx5_3");
    assert_eq!(order(&dgx, "card1").last().unwrap(), "mlx5_5");
    // Both ports of a NIC are one device.
    let ports = (dgx.rdma("mlx5_0"), dgx.rdma("mlx5_1"));
    assert_eq!(ports.0.route_to(&ports.1).unwrap().common_ancestor, CommonAncestor::SameDevice);
    assert_eq!(ports.0.route_to(&ports.0).unwrap().ports, 0);
    // A port can be an end of a route.
    let port = dgx.device("0000:01:00.0");
    let route = dgx.device("0000:03:00.0").route_to(&port).unwrap();
    assert_eq!((route.common_ancestor, route.ports), (switch("0000:01:00.0"), 1));
}

#[test]
fn access_control_redirects_traffic_to_the_root() {
    let acs = machine!("acs");
    let route = between(&acs, "card0", "mlx5_0");
    let ports = ["0000:02:00.0", "0000:02:01.0"].map(address);
    assert_eq!(
        (&route.common_ancestor, &route.redirect),
        (&switch("0000:01:00.0"), &AcsRedirect::By(ports.into()))
    );
    assert_eq!(route.stays_below_root(), Some(false));
    let text = route.to_string();
    assert!(text.contains("(the IOMMU translates it)"), "{text}");
    assert!(text.ends_with("boot with pci=disable_acs_redir=0000:02:00.0;0000:02:01.0"), "{text}");
    // One of the two ports suffices, and egress control counts.
    let route = between(&acs, "card1", "mlx5_1");
    assert_eq!(route.redirect, AcsRedirect::By(vec![address("0000:12:01.0")]));
    // Source validation, upstream forwarding and direct translated P2P redirect nothing.
    let route = between(&acs, "card2", "mlx5_2");
    assert_eq!((&route.redirect, route.stays_below_root()), (&AcsRedirect::No, Some(true)));
    let groups = (route.iommu_groups.0.unwrap(), route.iommu_groups.1.unwrap());
    assert_eq!((groups.0.number, groups.1.number, groups.0.domain.as_deref()), (24, 26, Some("DMA-FQ")));
    // A route without redirection is nearer than one with it.
    let plain = between(&acs, "card2", "mlx5_2");
    assert_eq!(plain.cmp_distance(&between(&acs, "card0", "mlx5_0")), Ordering::Less);
    assert_eq!(order(&acs, "card0")[0], "mlx5_0");
}

#[test]
fn a_desktop_without_iommu() {
    let desktop = machine!("desktop");
    let route = between(&desktop, "card0", "irdma0");
    assert_eq!(
        (&route.common_ancestor, route.ports),
        (&CommonAncestor::HostBridge { bridge: "pci0000:00".into() }, 2)
    );
    assert_eq!((&route.iommu_groups, route.from.numa_node()), (&(None, None), None));
    assert!(route.to_string().contains("goes through the root complex (no IOMMU is on)"), "{route}");
    let route = between(&desktop, "card2", "bnxt_re0");
    let port = address("0000:00:1d.0");
    assert_eq!(
        (&route.common_ancestor, route.ports, route.stays_below_root()),
        (&CommonAncestor::RootPort { port }, 1, Some(true))
    );
    let sound = desktop.device("0000:01:00.1");
    assert_eq!(
        sound.route_to(&desktop.device("0000:01:00.0")).unwrap().common_ancestor,
        CommonAncestor::SameDevice
    );

    // Software devices are not on PCI.
    let sysfs = desktop.sysfs();
    let rxe = sysfs.rdma_device("rxe0").unwrap();
    let expected = Location::NotPci { name: "rxe0".into(), netdev: Some("enp2s0".into()) };
    assert_eq!((&rxe, rxe.to_string().as_str()), (&expected, "rxe0 (not a PCI device: software on enp2s0)"));
    assert!(matches!(rxe.into_pci(), Err(Error::NotOnPci { name }) if name == "rxe0"));
    let vgem = sysfs.drm_card("card1").unwrap();
    assert_eq!(vgem, Location::NotPci { name: "card1".into(), netdev: None });
    assert_eq!(sysfs.rdma_pci_devices().unwrap().len(), 2);
}

#[test]
fn a_virtual_machine_with_a_flat_bus() {
    let cloud = machine!("cloud");
    // The card's device is a virtio device below its PCI function.
    let route = between(&cloud, "card0", "efa_1");
    assert_eq!(route.from.address(), address("0000:00:03.0"));
    assert_eq!(
        (&route.common_ancestor, route.ports),
        (&CommonAncestor::HostBridge { bridge: "pci0000:00".into() }, 0)
    );
    // Equally near devices keep their order.
    assert_eq!(order(&cloud, "card0"), ["efa_0", "efa_1"]);
}

#[test]
fn without_root_the_acs_settings_are_unknown() {
    let user = machine!("user");
    let route = between(&user, "card0", "mlx5_0");
    assert_eq!((&route.common_ancestor, route.stays_below_root()), (&switch("0000:01:00.0"), None));
    assert!(
        matches!(&route.redirect, AcsRedirect::Unknown(ports) if ports.contains(&address("0000:02:00.0")))
    );
    assert!(route.to_string().contains("; run this as root to learn whether ACS of"), "{route}");
    let route = between(&user, "card0", "mlx5_1");
    assert_eq!(
        (&route.common_ancestor, route.stays_below_root()),
        (&CommonAncestor::HostBridge { bridge: "pci0000:00".into() }, Some(false))
    );
    let sound = user.device("0000:05:00.1");
    assert_eq!(sound.route_to(&user.rdma("mlx5_1")).unwrap().common_ancestor, CommonAncestor::SameDevice);
}

#[test]
fn virtual_functions_and_bridges_with_unknown_nodes() {
    let odd = machine!("odd");
    for name in ["mlx5_1", "mlx5_2"] {
        assert_eq!(
            odd.rdma("mlx5_0").route_to(&odd.rdma(name)).unwrap().common_ancestor,
            CommonAncestor::SameDevice,
            "{name}"
        );
    }
    let route = between(&odd, "card0", "mlx5_0");
    assert_eq!(route.common_ancestor, CommonAncestor::TwoHostBridges { numa_node: None });
    assert!(route.to_string().contains("two host bridges, NUMA nodes unknown"), "{route}");
    // A host bridge below a PCI function, as behind Intel's VMD.
    let nested = odd.device("10000:e1:00.0");
    let route = nested.route_to(&odd.device("0000:00:04.0")).unwrap();
    assert_eq!(route.common_ancestor, CommonAncestor::HostBridge { bridge: "pci0000:00".into() });
    let route = nested.route_to(&odd.device("10000:e0:06.0")).unwrap();
    assert_eq!(route.common_ancestor, CommonAncestor::RootPort { port: address("10000:e0:06.0") });
}

#[test]
fn bars_have_sizes_flags_and_bus_addresses() {
    let dgx = machine!("dgx");
    let bars = dgx.device("0000:03:00.0").bars().unwrap();
    let [control, memory] = bars.as_slice() else { panic!("{bars:?}") };
    assert_eq!((control.index, control.size, control.kind), (0, 16 << 20, BarKind::Memory));
    assert_eq!((control.is_prefetchable, control.is_64bit), (false, false));
    assert_eq!((memory.index, memory.size, memory.bus_address), (1, 128 << 30, 0x3800_0000_0000));
    assert_eq!((memory.is_prefetchable, memory.is_64bit), (true, true));
    let runs = memory.sg().unwrap();
    assert_eq!((runs.runs().len(), runs.runs()[0].addr, runs.total_len()), (1, 0x3800_0000_0000, 128 << 30));

    // Behind a host bridge with an offset the register differs from the CPU's address.
    let bar = machine!("desktop").rdma("irdma0").bar(0).unwrap();
    assert_eq!(
        (bar.cpu_address, bar.bus_address, bar.sg().unwrap().runs()[0].addr),
        (0x40_0000_0000, 0x8000_0000, 0x8000_0000)
    );
}

#[test]
fn a_bar_of_any_numbers_is_a_list_or_refused() {
    let mut bar = machine!("dgx").device("0000:03:00.0").bar(1).unwrap();
    for (bus_address, size) in [(0, 0), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
        (bar.bus_address, bar.size) = (bus_address, size);
        assert!(bar.sg().is_err(), "{bar:?}");
    }
    (bar.bus_address, bar.size) = (0, u64::MAX);
    assert_eq!(bar.sg().unwrap().total_len(), u64::MAX);
}

#[test]
fn bars_that_dma_cannot_reach_are_refused() {
    let refusal = |machine: &Machine, address: &str, bar| match machine.device(address).bar(bar) {
        Err(Error::BarUnusable { refusal, device, bar: named }) => {
            assert_eq!((device.to_string().as_str(), named), (address, bar));
            refusal
        }
        other => panic!("{address} BAR {bar}: {other:?}"),
    };
    let odd = machine!("odd");
    assert_eq!(refusal(&odd, "0000:00:03.0", 0), BarRefusal::NotDecoding);
    assert_eq!(refusal(&odd, "0000:00:03.0", 1), BarRefusal::NoAddress);
    assert_eq!(refusal(&odd, "0000:00:05.0", 0), BarRefusal::PoweredDown);
    let device = odd.device("0000:00:04.0");
    assert_eq!(device.bar(0).unwrap().bus_address, 0xfe00_1000);
    assert_eq!(refusal(&odd, "0000:00:04.0", 1), BarRefusal::NoAddress);
    for absent in [2, 4, 5, 6, 255] {
        assert_eq!(refusal(&odd, "0000:00:04.0", absent), BarRefusal::Absent { present: vec![0, 1, 3] });
    }
    assert_eq!(refusal(&odd, "0000:00:04.0", 3), BarRefusal::IoPort);
    let message = device.bar(2).unwrap_err().to_string();
    assert_eq!(message, "BAR 2 of 0000:00:04.0 does not exist or has 0 bytes: choose one of [0, 1, 3]");
    // The upper half of a 64-bit BAR.
    assert!(matches!(refusal(&odd, "0000:05:00.0", 1), BarRefusal::Absent { .. }));
    // The physical function decodes for its virtual function.
    assert_eq!(odd.device("0000:05:00.2").bar(0).unwrap().bus_address, 0x9200_0000);

    for broken in [
        "0x1000 0x1fff\n",
        "x 0x1fff 0x200\n",
        "0x1000 0x0fff 0x200\n0x2 0x1 0x200\n",
        "0x0 0xffffffffffffffff 0x200\n",
        "0xfffffffffffff000 0xffffffffffffffff 0x200\n",
    ] {
        odd.write("0000:00:04.0", "resource", broken.as_bytes());
        let refused = odd.device("0000:00:04.0").bars();
        assert!(matches!(refused, Err(Error::Sysfs { .. })), "{broken:?}: {refused:?}");
    }
}

#[test]
fn missing_devices_are_refused() {
    let cloud = machine!("cloud");
    let sysfs = cloud.sysfs();
    let refused = sysfs.device(address("0000:99:00.0")).unwrap_err();
    assert!(
        matches!(&refused, Error::NotInSysfs { what, .. } if what == "PCI device 0000:99:00.0"),
        "{refused:?}"
    );
    assert_eq!(refused.errno(), Some(libc::ENOENT));
    let refused = sysfs.drm_card("card7").unwrap_err();
    assert!(refused.to_string().starts_with("this machine has no DRM card \"card7\""), "{refused}");
    for name in ["mlx5_9", "", "..", "../drm/card0"] {
        let Err(Error::UnknownRdmaDevice { name: named, present }) = sysfs.rdma_device(name) else {
            panic!("{name}")
        };
        assert_eq!((named.as_str(), present), (name, vec!["efa_0".to_string(), "efa_1".into()]));
    }
    let empty = super::Sysfs::at("/nonexistent");
    assert!(empty.rdma_pci_devices().unwrap().is_empty());
    assert!(
        matches!(empty.rdma_device("rxe0"), Err(Error::UnknownRdmaDevice { present, .. }) if present.is_empty())
    );
}
