//! Ports, addresses and nodes of devices.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::all_pairs;
use crate::common::doctor::Doctor;
use crate::common::link::Link;
use crate::common::system::{modprobe, run};

/// A third device, whose interface is up, has only its link-local address, and is down.
#[test]
fn a_port_and_its_addresses() {
    let link = Link::new();
    let small = "small-mtu: going port 1 has an RDMA MTU of 1024, as going0 has an MTU of 1500";
    let all = all_pairs(&["going", "rxe0", "rxe1"]);
    let sorted = |mut pairs: Vec<String>| {
        pairs.sort();
        pairs
    };
    let up = Doctor::new().run();
    run("ip", &["address", "delete", "10.99.0.1/24", "dev", "going0"]);
    let bare = Doctor::new().run();
    run("ip", &["link", "set", "going0", "down"]);
    let down = Doctor::new().run();
    let delete = link.delete();
    link.deleted(delete);

    up.assert("A", &[], &[small]);
    assert_eq!(sorted(up.pairs()), sorted(all));
    let local = "link-local-gids: going port 1 has only link-local GIDs: no peer behind a router, and none with an IPv4 \
                 GID, reaches it -> give going0 an address: ip address add 192.0.2.1/24 dev going0";
    bare.assert("A", &[local], &[small]);
    let dead = "port-down: going port 1 is DOWN, Disabled -> ip link set going0 up, or check the cable and the switch";
    down.assert("B", &[dead, local], &[small]);
    let of_down: Vec<_> = down.pairs().into_iter().filter(|pair| pair.contains(" going ")).collect();
    assert!(of_down.len() >= 3 && of_down.iter().all(|pair| pair.ends_with(" ++-...")), "{of_down:?}");
}

/// A node that this user may not open, one that is missing, and a manager that is hidden.
#[test]
fn nodes_that_are_forbidden_or_missing() {
    // The nodes of a container, in a folder of its own.
    let nodes = |names: &str| {
        format!(
            "numbers() {{ stat -c '%t %T' $1 | {{ read a b; echo $((0x$a)) $((0x$b)); }}; }}\n\
             for name in {names}; do eval \"n_$name='$(numbers /dev/infiniband/$name)'\"; done\n\
             /usr/bin/mount -t tmpfs none /dev/infiniband\n\
             for name in {names}; do eval \"/usr/bin/mknod -m 666 /dev/infiniband/$name c \\$n_$name\"; done"
        )
    };
    let node = |device: &str| {
        let script = format!("grep -lx {device} /sys/class/infiniband_verbs/uverbs*/ibdev");
        run("sh", &["-c", &script]).trim().split('/').nth(4).unwrap().to_owned()
    };
    let (first, second) = (node("rxe0"), node("rxe1"));
    let forbidden = Doctor::new()
        .after(&nodes(&format!("{first} {second} rdma_cm")))
        .after(&format!("chmod 600 /dev/infiniband/{first} /dev/infiniband/rdma_cm; chmod 666 /dev/udmabuf /dev/dma_heap/*"))
        .by_nobody()
        .through(&["/usr/bin/env"])
        .run();
    run("sh", &["-c", "chmod 600 /dev/udmabuf /dev/dma_heap/*"]);
    assert_eq!(forbidden.pairs(), all_pairs(&["rxe1"]));
    let told = forbidden.told();
    assert_eq!(
        told[0],
        format!(
            "node-forbidden: rxe0 cannot be opened: this user may not open /dev/infiniband/{first} (owner 0:0, mode 0600) (EACCES) -> join its group, or write a udev rule"
        )
    );
    assert!(
        told.iter().any(|line| line.starts_with("manager: no connections by IP address: this user may not open /dev/infiniband/rdma_cm (owner 0:0, mode 0600) (EACCES)")),
        "{told:?}"
    );
    assert_eq!((told.len(), forbidden.grade()), (3, "B"), "{told:?}");

    let one_of_two = Doctor::new().after(&nodes(&format!("{second} rdma_cm"))).run();
    let missing = format!(
        "node-missing: the kernel has rxe0, but /dev/infiniband/{first} is missing (there are: rdma_cm, {second}) -> pass the node to the container (--device /dev/infiniband/{first}), or let udev create it"
    );
    one_of_two.assert("B", &[&missing], &[]);
    assert_eq!(one_of_two.pairs(), all_pairs(&["rxe1"]));

    let no_manager = Doctor::new().after(&nodes(&format!("{first} {second}"))).run();
    let manager = format!(
        "manager: no connections by IP address: /dev/infiniband/rdma_cm is missing (there are: {first}, {second}) (ENOENT) -> pass the node to the container (--device /dev/infiniband/rdma_cm), or let udev create it"
    );
    no_manager.assert("A", &[&manager], &[]);

    let nothing = Doctor::new().after("/usr/bin/mount -t tmpfs none /dev/infiniband").run();
    let empty = "node-missing: the kernel has rxe0, but /dev/infiniband is empty (ENOENT) -> pass the node to the container (--device /dev/infiniband/uverbs0), or let udev create it";
    assert_eq!(nothing.told()[0].replace(&first, "uverbs0"), empty);
    assert_eq!((nothing.grade(), nothing.status), ("F", 1));
}

/// The kernel without rdma_ucm, which it must not load when a program asks for its node.
#[test]
fn a_manager_that_is_not_loaded() {
    let forbid = "/run/modprobe.d/no-manager.conf";
    fs::write(forbid, "install rdma_ucm /bin/false\n").unwrap();
    let unloaded = Command::new("modprobe").args(["-r", "rdma_ucm"]).status().unwrap().success();
    let told = Doctor::new().run().told();
    fs::remove_file(forbid).unwrap();
    modprobe("rdma_ucm");
    assert!(unloaded, "rdma_ucm is in use");
    let missing = "manager: no connections by IP address: the kernel module rdma_ucm is not loaded";
    assert!(told.len() == 1 && told[0].starts_with(missing), "{told:?}");
    assert!(told[0].ends_with(" -> modprobe rdma_ucm"), "{told:?}");
}

/// A container whose device cgroup does not have the nodes, although the files are there.
#[test]
fn nodes_that_the_device_cgroup_forbids() {
    let (mount, number) = ("/run/doctor-devices", fs::metadata("/dev/infiniband/uverbs0").unwrap().rdev());
    fs::create_dir_all(mount).unwrap();
    run("/usr/bin/mount", &["-t", "cgroup", "-o", "devices", "none", mount]);
    fs::create_dir(format!("{mount}/confined")).unwrap();
    let forbidden = format!("c {}:* rwm", libc::major(number));
    fs::write(format!("{mount}/confined/devices.deny"), forbidden).unwrap();
    let confined = Doctor::new().after(&format!("echo $$ >{mount}/confined/cgroup.procs")).run();
    fs::remove_dir(format!("{mount}/confined")).unwrap();
    run("/usr/bin/umount", &[mount]);
    let told = confined.told();
    for device in ["rxe0", "rxe1"] {
        let start = format!(
            "node-forbidden: {device} cannot be opened: the device cgroup forbids /dev/infiniband/uverbs"
        );
        let found: Vec<_> = told.iter().filter(|line| line.starts_with(&start)).collect();
        assert!(
            found.len() == 1 && found[0].contains(" (EPERM) -> pass it to the container (--device "),
            "{told:?}"
        );
    }
    assert_eq!((confined.grade(), confined.status), ("F", 1), "{told:?}");
}

/// A network namespace in which the devices are visible, and their interfaces are not.
#[test]
fn devices_whose_interfaces_are_elsewhere() {
    let elsewhere = Doctor::new().through(&["/usr/bin/unshare", "--net"]).run();
    let told = elsewhere.told();
    for device in ["rxe0", "rxe1"] {
        let start = format!("no-gid: {device} port 1 has no usable GID: it has ");
        assert!(told.iter().any(|line| line.starts_with(&start)), "{told:?}");
    }
    assert_eq!((elsewhere.grade(), elsewhere.status), ("D", 1), "{:?}", elsewhere.pairs());
}
