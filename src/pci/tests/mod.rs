//! Machines of several shapes, from tests/fixtures/machines.

mod machine;

use std::cmp::Ordering;

use super::{BarKind, BarRefusal, Location, Meeting, PciAddress, Reach, Redirect, nearest};
use crate::Error;
use machine::Machine;

macro_rules! machine {
    ($name:literal) => {
        Machine::new(include_str!(concat!("../../../tests/fixtures/machines/", $name, ".txt")))
    };
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn switch(port: &str) -> Meeting {
    Meeting::Switch { port: address(port) }
}

/// The way from a card to an RDMA device, the same both ways.
fn reach(machine: &Machine, card: &str, rdma: &str) -> Reach {
    let card = machine.sysfs().drm_card(card).unwrap().pci().unwrap();
    let rdma = machine.rdma(rdma);
    let (there, back) = (card.reach(&rdma).unwrap(), rdma.reach(&card).unwrap());
    assert_eq!(there.cmp_distance(&back), Ordering::Equal, "{there} / {back}");
    assert_eq!(there.stays_below_root(), back.stays_below_root());
    there
}

/// The names of all RDMA devices, the nearest to a card first.
fn order(machine: &Machine, card: &str) -> Vec<String> {
    let sysfs = machine.sysfs();
    let card = sysfs.drm_card(card).unwrap().pci().unwrap();
    let ways = nearest(&card, &sysfs.rdma_on_pci().unwrap()).unwrap();
    ways.iter().map(|way| way.to.name().unwrap().to_string()).collect()
}

#[test]
fn a_server_with_switches_and_two_sockets() {
    let dgx = machine!("dgx");
    let way = reach(&dgx, "card0", "mlx5_0");
    assert_eq!((&way.meeting, way.ports, &way.redirect), (&switch("0000:01:00.0"), 3, &Redirect::No));
    assert_eq!(way.stays_below_root(), Some(true));
    assert_eq!(
        way.to_string(),
        "card0 (0000:03:00.0) to mlx5_0 (0000:04:00.0): below one switch (0000:01:00.0), 3 ports between; traffic stays there: a good pair"
    );
    // A switch below the switch is further away, and still inside.
    let way = reach(&dgx, "card0", "mlx5_2");
    assert_eq!((&way.meeting, way.ports), (&switch("0000:01:00.0"), 5));
    // Two switches of one host bridge, two host bridges of one socket, two sockets.
    let way = reach(&dgx, "card0", "mlx5_3");
    assert_eq!((way.meeting, way.ports), (Meeting::HostBridge { bridge: "pci0000:00".into() }, 6));
    let way = reach(&dgx, "card0", "mlx5_4");
    assert_eq!(way.meeting, Meeting::OtherHostBridge { numa_node: Some(0) });
    assert_eq!((way.stays_below_root(), way.ports), (Some(false), 4));
    let way = reach(&dgx, "card0", "mlx5_5");
    assert_eq!(way.meeting, Meeting::OtherSocket { numa_nodes: (0, 1) });
    let text = way.to_string();
    assert!(
        text.contains("two sockets (nodes 0 and 1)") && text.ends_with("choose a device on node 0"),
        "{text}"
    );

    assert_eq!(order(&dgx, "card0"), ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3", "mlx5_4", "mlx5_5"]);
    assert_eq!(order(&dgx, "card1")[0], "mlx5_3");
    assert_eq!(order(&dgx, "card1").last().unwrap(), "mlx5_5");
    // Both ports of a NIC are one device.
    let ports = (dgx.rdma("mlx5_0"), dgx.rdma("mlx5_1"));
    assert_eq!(ports.0.reach(&ports.1).unwrap().meeting, Meeting::SameDevice);
    assert_eq!(ports.0.reach(&ports.0).unwrap().ports, 0);
    // A port is a place on the way, too.
    let port = dgx.device("0000:01:00.0");
    let way = dgx.device("0000:03:00.0").reach(&port).unwrap();
    assert_eq!((way.meeting, way.ports), (switch("0000:01:00.0"), 1));
}

#[test]
fn access_control_sends_traffic_to_the_root() {
    let acs = machine!("acs");
    let way = reach(&acs, "card0", "mlx5_0");
    let ports = ["0000:02:00.0", "0000:02:01.0"].map(address);
    assert_eq!((&way.meeting, &way.redirect), (&switch("0000:01:00.0"), &Redirect::By(ports.into())));
    assert_eq!(way.stays_below_root(), Some(false));
    let text = way.to_string();
    assert!(text.contains("(the IOMMU translates it)"), "{text}");
    assert!(text.ends_with("boot with pci=disable_acs_redir=0000:02:00.0;0000:02:01.0"), "{text}");
    // One of the two ports is enough, and egress control counts.
    let way = reach(&acs, "card1", "mlx5_1");
    assert_eq!(way.redirect, Redirect::By(vec![address("0000:12:01.0")]));
    // Source validation, upstream forwarding and direct translated requests redirect nothing.
    let way = reach(&acs, "card2", "mlx5_2");
    assert_eq!((&way.redirect, way.stays_below_root()), (&Redirect::No, Some(true)));
    let groups = (way.iommu.0.unwrap(), way.iommu.1.unwrap());
    assert_eq!((groups.0.group, groups.1.group, groups.0.domain.as_deref()), (24, 26, Some("DMA-FQ")));
    // A port of the switch that redirects nothing is nearer than one whose traffic goes up and down.
    let plain = reach(&acs, "card2", "mlx5_2");
    assert_eq!(plain.cmp_distance(&reach(&acs, "card0", "mlx5_0")), Ordering::Less);
    assert_eq!(order(&acs, "card0")[0], "mlx5_0");
}

#[test]
fn a_desktop_without_iommu() {
    let desktop = machine!("desktop");
    let way = reach(&desktop, "card0", "irdma0");
    assert_eq!((&way.meeting, way.ports), (&Meeting::HostBridge { bridge: "pci0000:00".into() }, 2));
    assert_eq!((&way.iommu, way.from.numa_node()), (&(None, None), None));
    assert!(way.to_string().contains("goes through the root complex (no IOMMU is on)"), "{way}");
    let way = reach(&desktop, "card2", "bnxt_re0");
    let port = address("0000:00:1d.0");
    assert_eq!(
        (&way.meeting, way.ports, way.stays_below_root()),
        (&Meeting::RootPort { port }, 1, Some(true))
    );
    let sound = desktop.device("0000:01:00.1");
    assert_eq!(sound.reach(&desktop.device("0000:01:00.0")).unwrap().meeting, Meeting::SameDevice);

    // What is of software has no PCI device, and says so.
    let sysfs = desktop.sysfs();
    let rxe = sysfs.rdma_device("rxe0").unwrap();
    let expected = Location::NotPci { name: "rxe0".into(), netdev: Some("enp2s0".into()) };
    assert_eq!((&rxe, rxe.to_string().as_str()), (&expected, "rxe0 (no PCI device: software on enp2s0)"));
    assert!(
        matches!(rxe.pci(), Err(Error::Addresses(crate::error::AddressError::NotOnPci { name })) if name == "rxe0")
    );
    let vgem = sysfs.drm_card("card1").unwrap();
    assert_eq!(vgem, Location::NotPci { name: "card1".into(), netdev: None });
    assert_eq!(sysfs.rdma_on_pci().unwrap().len(), 2);
}

#[test]
fn a_virtual_machine_with_a_flat_bus() {
    let cloud = machine!("cloud");
    // The card's device is a virtio device below its PCI function.
    let way = reach(&cloud, "card0", "efa_1");
    assert_eq!(way.from.address(), address("0000:00:03.0"));
    assert_eq!((&way.meeting, way.ports), (&Meeting::HostBridge { bridge: "pci0000:00".into() }, 0));
    // Equals keep their order.
    assert_eq!(order(&cloud, "card0"), ["efa_0", "efa_1"]);
}

#[test]
fn an_ordinary_user_sees_the_switch_and_not_its_settings() {
    let user = machine!("user");
    let way = reach(&user, "card0", "mlx5_0");
    assert_eq!((&way.meeting, way.stays_below_root()), (&switch("0000:01:00.0"), None));
    assert!(matches!(&way.redirect, Redirect::Unknown(ports) if ports.contains(&address("0000:02:00.0"))));
    assert!(way.to_string().ends_with("sends traffic up to the root is visible to root only"), "{way}");
    let way = reach(&user, "card0", "mlx5_1");
    assert_eq!(
        (&way.meeting, way.stays_below_root()),
        (&Meeting::HostBridge { bridge: "pci0000:00".into() }, Some(false))
    );
    let sound = user.device("0000:05:00.1");
    assert_eq!(sound.reach(&user.rdma("mlx5_1")).unwrap().meeting, Meeting::SameDevice);
}

#[test]
fn virtual_functions_and_bridges_of_unknown_nodes() {
    let odd = machine!("odd");
    for name in ["mlx5_1", "mlx5_2"] {
        assert_eq!(odd.rdma("mlx5_0").reach(&odd.rdma(name)).unwrap().meeting, Meeting::SameDevice, "{name}");
    }
    let way = reach(&odd, "card0", "mlx5_0");
    assert_eq!(way.meeting, Meeting::OtherHostBridge { numa_node: None });
    assert!(way.to_string().contains("two host bridges, NUMA nodes unknown"), "{way}");
    // A host bridge that hangs on a PCI function, as behind Intel's VMD.
    let nested = odd.device("10000:e1:00.0");
    let way = nested.reach(&odd.device("0000:00:04.0")).unwrap();
    assert_eq!(way.meeting, Meeting::HostBridge { bridge: "pci0000:00".into() });
    let way = nested.reach(&odd.device("10000:e0:06.0")).unwrap();
    assert_eq!(way.meeting, Meeting::RootPort { port: address("10000:e0:06.0") });
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
    let runs = memory.sg();
    assert_eq!((runs.runs().len(), runs.runs()[0].addr, runs.total_len()), (1, 0x3800_0000_0000, 128 << 30));

    // A host bridge with an offset: the bus address is the register's, not the CPU's.
    let bar = machine!("desktop").rdma("irdma0").bar(0).unwrap();
    assert_eq!(
        (bar.cpu_address, bar.bus_address, bar.sg().runs()[0].addr),
        (0x40_0000_0000, 0x8000_0000, 0x8000_0000)
    );
}

#[test]
fn bars_that_dma_cannot_go_to_are_refused() {
    let refusal = |machine: &Machine, address: &str, bar| match machine.device(address).bar(bar) {
        Err(Error::Addresses(crate::error::AddressError::BarUnusable { refusal, device, bar: named })) => {
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
    assert_eq!(message, "BAR 2 of 0000:00:04.0 is not there or has 0 bytes: there is [0, 1, 3]");
    // The upper half of a 64-bit BAR.
    assert!(matches!(refusal(&odd, "0000:05:00.0", 1), BarRefusal::Absent { .. }));
    // A virtual function decodes through its physical one.
    assert_eq!(odd.device("0000:05:00.2").bar(0).unwrap().bus_address, 0x9200_0000);

    for broken in [
        "0x1000 0x1fff\n",
        "x 0x1fff 0x200\n",
        "0x1000 0x0fff 0x200\n0x2 0x1 0x200\n",
        "0x0 0xffffffffffffffff 0x200\n",
    ] {
        odd.write("0000:00:04.0", "resource", broken.as_bytes());
        let refused = odd.device("0000:00:04.0").bars();
        assert!(
            matches!(refused, Err(Error::Addresses(crate::error::AddressError::Sysfs { .. }))),
            "{broken:?}: {refused:?}"
        );
    }
}

#[test]
fn what_is_not_there_is_named() {
    let cloud = machine!("cloud");
    let sysfs = cloud.sysfs();
    let refused = sysfs.device(address("0000:99:00.0")).unwrap_err();
    assert!(
        matches!(&refused, Error::Addresses(crate::error::AddressError::NotInSysfs { what, .. }) if what == "PCI device 0000:99:00.0"),
        "{refused:?}"
    );
    assert_eq!(refused.errno(), Some(libc::ENOENT));
    let refused = sysfs.drm_card("card7").unwrap_err();
    assert!(refused.to_string().starts_with("there is no DRM card \"card7\" on this machine"), "{refused}");
    for name in ["mlx5_9", "", "..", "../drm/card0"] {
        let Err(Error::UnknownDevice { name: named, present }) = sysfs.rdma_device(name) else {
            panic!("{name}")
        };
        assert_eq!((named.as_str(), present), (name, vec!["efa_0".to_string(), "efa_1".into()]));
    }
    let empty = super::Sysfs::at("/nonexistent");
    assert!(empty.rdma_on_pci().unwrap().is_empty());
    assert!(
        matches!(empty.rdma_device("rxe0"), Err(Error::UnknownDevice { present, .. }) if present.is_empty())
    );
}
