//! Machines that are not here: copies of the files of a DGX, a desktop and a cloud machine.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::common::doctor::{Diagnosis, Doctor};

/// A copy of a machine's files in a folder, which is removed at the end.
struct Machine(PathBuf);

impl Machine {
    fn new(name: &str, release: &str) -> Self {
        let root = std::env::temp_dir().join(format!("dmabuf-rdma-{name}"));
        let _ = fs::remove_dir_all(&root);
        let machine = Self(root);
        machine.write("proc/sys/kernel/osrelease", release);
        machine.write("proc/sys/kernel/hostname", name);
        machine.write("proc/self/status", "Uid:\t1000\t1000\t1000\t1000\nGroups:\t1000\nCapEff:\t0000000000000000\nSeccomp:\t0\nVmPin:\t0 kB\n");
        machine.write("proc/self/uid_map", "0 0 4294967295\n");
        machine.write(
            "proc/self/limits",
            "Max locked memory unlimited unlimited bytes\nMax open files 1048576 1048576 files\n",
        );
        machine.write("proc/meminfo", "MemTotal: 1048576000 kB\nMemAvailable: 1000000000 kB\n");
        machine.write("proc/self/cgroup", "0::/\n");
        machine.write("proc/cmdline", "quiet");
        machine.write("proc/modules", "");
        machine.write("sys/module/dma_sg/version", "1");
        fs::create_dir_all(machine.0.join("sys/class/iommu")).unwrap();
        fs::create_dir_all(machine.0.join("sys/bus/pci/devices")).unwrap();
        machine
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, target: &Path) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    /// A PCI function at this path below the host bridge, as in `pci0000:00/0000:00:01.0/0000:01:00.0`.
    fn function(&self, path: &str, class: &str, vendor: &str, driver: &str, node: &str) -> PathBuf {
        let folder = self.0.join("sys/devices").join(path);
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let below = |file: &str| format!("sys/devices/{path}/{file}");
        for (file, text) in [("class", class), ("vendor", vendor), ("device", "0x2330"), ("numa_node", node)]
        {
            self.write(&below(file), text);
        }
        if !driver.is_empty() {
            self.link(&below("driver"), Path::new(&format!("/sys/bus/pci/drivers/{driver}")));
        }
        // A BAR of 128 GiB: start, end, flags of memory that is 64 bits and prefetchable.
        self.write(&below("resource"), "0x0000000000000000 0x0000000000000000 0x0000000000000000\n");
        // Its command register has memory decoding on.
        self.write(&below("config"), &format!("\0\0\0\0\x02{}", "\0".repeat(251)));
        self.link(&format!("sys/bus/pci/devices/{name}"), &folder);
        folder
    }

    /// The memory of a GPU on the bus.
    fn bar(&self, path: &str, bytes: u64) {
        let start = 0x20_0000_0000_u64;
        let line = format!("{start:#018x} {:#018x} 0x000000000014220c\n", start + bytes - 1);
        self.write(&format!("sys/devices/{path}/resource"), &line);
    }

    /// A bridge: the type of its port in its PCI Express capability, and with `acs` an ACS that redirects.
    fn port(&self, path: &str, kind: u8, acs: bool) {
        self.function(path, "0x060400", "0x10b5", "pcieport", "0");
        let mut config = vec![0_u8; 4096];
        config[6] = 0x10; // capabilities
        config[0x34] = 0x40;
        config[0x40] = 0x10; // PCI Express
        config[0x42] = kind << 4;
        config[0x100..0x104].copy_from_slice(&0x0001_000d_u32.to_le_bytes()); // ACS
        config[0x104] = 0xff;
        config[0x106] = if acs { 0x1d } else { 0 };
        fs::write(self.0.join("sys/devices").join(path).join("config"), config).unwrap();
    }

    /// An RDMA device of a PCI function.
    fn nic(&self, name: &str, function: &Path, layer: &str, gid: &str) {
        let folder = format!("sys/class/infiniband/{name}");
        self.link(&format!("{folder}/device"), function);
        self.write(&format!("{folder}/node_type"), "1: CA");
        self.write(&format!("{folder}/fw_ver"), "28.39.1002");
        let port = format!("{folder}/ports/1");
        for (file, text) in [
            ("state", "4: ACTIVE"),
            ("phys_state", "5: LinkUp"),
            ("link_layer", layer),
            ("rate", "400 Gb/sec (4X NDR)"),
            ("gids/0", gid),
            ("gid_attrs/types/0", "RoCE v2"),
        ] {
            self.write(&format!("{port}/{file}"), text);
        }
        let uverbs = format!("uverbs{}", name.trim_start_matches(|c: char| !c.is_ascii_digit()));
        self.write(&format!("sys/class/infiniband_verbs/{uverbs}/ibdev"), name);
    }

    fn diagnosed(&self) -> Diagnosis {
        Doctor::new().arguments(&["--json", "--root", self.0.to_str().unwrap()]).run()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const GPU: &str = "0x030200";
const NIC: &str = "0x020700";
const NVIDIA: &str = "0x10de";
const MELLANOX: &str = "0x15b3";

/// Four GPUs, each below a switch with its NIC, on two sockets; one switch has ACS on.
#[test]
fn a_dgx() {
    let dgx = Machine::new("dgx", "6.8.0-1014-nvidia");
    for (at, bridge) in ["pci0000:15", "pci0000:26", "pci0000:97", "pci0000:a7"].into_iter().enumerate() {
        let (bus, node) = (0x16 + 0x10 * at, if at < 2 { "0" } else { "1" });
        let root = format!("{bridge}/0000:{bus:02x}:01.0");
        let up = format!("{root}/0000:{:02x}:00.0", bus + 1);
        dgx.port(&root, 4, false);
        dgx.port(&up, 5, false);
        let mut ends = Vec::new();
        for (slot, class, vendor, driver) in [(0, GPU, NVIDIA, "nvidia"), (1, NIC, MELLANOX, "mlx5_core")] {
            let down = format!("{up}/0000:{:02x}:0{slot}.0", bus + 2);
            dgx.port(&down, 6, at == 3);
            let end = format!("{down}/0000:{:02x}:00.0", bus + 3 + slot);
            ends.push((dgx.function(&end, class, vendor, driver, node), end));
        }
        dgx.bar(&ends[0].1, 128 << 30);
        dgx.nic(&format!("mlx5_{at}"), &ends[1].0, "InfiniBand", "fe80:0000:0000:0000:9c63:c003:00d6:e00a");
    }
    dgx.write(
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.90.07\n",
    );
    let seen = dgx.diagnosed();
    assert_eq!(
        seen.told(),
        [
            "acs-redirect: the GPU 0000:49:00.0 and its nearest NIC, mlx5_3, are below one switch (0000:47:00.0), but ACS of 0000:48:00.0;0000:48:01.0 sends their traffic through the root complex -> if they need no isolation from each other: boot with pci=disable_acs_redir=0000:48:00.0;0000:48:01.0"
        ]
    );
    let gpus = seen.json["facts"]["gpus"].as_array().unwrap();
    let nearest: Vec<_> = gpus.iter().map(|gpu| gpu["routes"][0]["nic"].as_str().unwrap()).collect();
    assert_eq!(nearest, ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]);
    assert!(gpus.iter().all(|gpu| gpu["largest_bar"] == 128_u64 << 30 && gpu["vendor"] == "NVIDIA"));
    assert_eq!(gpus[0]["routes"][0]["below_root"], true);
    assert_eq!((seen.grade(), seen.status), ("none", 1));
}

/// A GPU in one slot, a NIC in another, small BARs, the IOMMU on, and the closed modules.
#[test]
fn a_desktop() {
    let desktop = Machine::new("desktop", "6.12.9-amd64");
    desktop.port("pci0000:00/0000:00:01.0", 4, false);
    desktop.port("pci0000:00/0000:00:02.0", 4, false);
    let gpu = "pci0000:00/0000:00:01.0/0000:01:00.0";
    let of_gpu = desktop.function(gpu, "0x030000", NVIDIA, "nvidia", "-1");
    desktop.bar(gpu, 256 << 20);
    let of_nic = desktop.function("pci0000:00/0000:00:02.0/0000:02:00.0", NIC, MELLANOX, "mlx5_core", "-1");
    for (number, function) in [(14, &of_gpu), (15, &of_nic)] {
        desktop.write(&format!("sys/kernel/iommu_groups/{number}/type"), "DMA-FQ");
        symlink(desktop.0.join(format!("sys/kernel/iommu_groups/{number}")), function.join("iommu_group"))
            .unwrap();
    }
    fs::create_dir_all(desktop.0.join("sys/class/iommu/dmar0")).unwrap();
    desktop.nic("rocep2s0", &of_nic, "Ethernet", "0000:0000:0000:0000:0000:ffff:c000:0201");
    desktop
        .write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07\n");
    desktop.write("boot/config-6.12.9-amd64", "CONFIG_UDMABUF=y\n# CONFIG_PCI_P2PDMA is not set\n");
    let seen = desktop.diagnosed();
    assert_eq!(
        seen.told(),
        [
            "nvidia-closed: NVIDIA's kernel modules are the closed ones, which do not export GPU memory as dma-bufs -> install the open kernel modules (Turing or later), or use nvidia_peermem with ibv_reg_mr",
            "small-bar: the GPU 0000:01:00.0 shows only 256.00 MiB of its memory on the bus, which is all that a NIC reaches -> switch on \"Above 4G decoding\" and \"Resizable BAR\" in the firmware",
            "root-complex: the GPU 0000:01:00.0 and its nearest NIC, rocep2s0, are below one host bridge (pci0000:00): traffic passes the root complex, which the kernel permits only for host bridges known to forward it -> prefer a GPU and a NIC below one switch; without one, expect less than the link's rate",
        ]
    );
    let translated = "iommu-translates: the IOMMU translates the addresses of rocep2s0, 0000:01:00.0, which slows peer-to-peer traffic or blocks it";
    assert!(seen.notes().iter().any(|note| note == translated), "{:?}", seen.notes());
    assert_eq!(seen.json["facts"]["gpus"][0]["driver"], "nvidia");
}

/// NVIDIA's driver, above, maps its memory without the kernel's help.
#[test]
fn a_gpu_of_amd() {
    let machine = Machine::new("amd", "6.12.9-amd64");
    machine.function("pci0000:00/0000:00:01.0", GPU, "0x1002", "amdgpu", "-1");
    machine.bar("pci0000:00/0000:00:01.0", 32 << 30);
    machine.write("boot/config-6.12.9-amd64", "CONFIG_UDMABUF=y\n# CONFIG_PCI_P2PDMA is not set\n");
    let told = machine.diagnosed().told();
    let off = "p2pdma-off: the kernel was built without CONFIG_PCI_P2PDMA: amdgpu and xe map no GPU's memory for a NIC -> use a kernel that has it (Debian from 7.x, Ubuntu from 22.04, RHEL from 9)";
    assert!(told.iter().any(|line| line == off), "{told:?}");
}

/// A GPU whose driver is not loaded: it decodes no memory accesses.
#[test]
fn a_gpu_that_does_not_decode() {
    let machine = Machine::new("not-decoding", "6.12.9-amd64");
    let path = "pci0000:00/0000:00:01.0";
    let folder = machine.function(path, GPU, NVIDIA, "", "-1");
    machine.bar(path, 32 << 30);
    // Memory decoding is off in its command register.
    fs::write(folder.join("config"), [0; 256]).unwrap();
    let told = machine.diagnosed().told();
    let start = "bar-unusable: no NIC reaches the memory of the GPU 0000:00:01.0: ";
    assert!(told.iter().any(|line| line.starts_with(start)), "{told:?}");
}

/// A virtual machine: the NIC and the GPU at two host bridges of two sockets, an old kernel, a port that is down.
#[test]
fn a_cloud_machine() {
    let cloud = Machine::new("cloud", "5.10.0-cloud");
    let gpu = "pci0001:00/0001:00:00.0";
    cloud.function(gpu, GPU, NVIDIA, "nvidia", "0");
    cloud.bar(gpu, 32 << 30);
    let nic = cloud.function("pci0002:00/0002:00:02.0", NIC, MELLANOX, "mlx5_core", "1");
    cloud.nic("mlx5_0", &nic, "Ethernet", "fe80:0000:0000:0000:0022:48ff:fe00:0001");
    cloud.write("sys/class/infiniband/mlx5_0/ports/1/state", "1: DOWN");
    cloud.write("sys/class/infiniband/mlx5_0/ports/1/phys_state", "3: Disabled");
    let seen = cloud.diagnosed();
    assert_eq!(
        seen.told(),
        [
            "port-down: mlx5_0 port 1 is DOWN, Disabled -> bring its network interface up, or check the cable and the switch",
            "old-kernel: Linux 5.10.0-cloud imports no dma-bufs into RDMA devices -> use Linux 5.12 or later",
            "link-local-gids: mlx5_0 port 1 has only link-local GIDs: no peer behind a router, and none with an IPv4 GID, reaches it -> give its network interface an address",
            "two-sockets: the GPU 0001:00:00.0 and its nearest NIC, mlx5_0, are on two sockets (nodes 0 and 1): traffic crosses the link between the sockets, which is slow or does not forward it -> use a GPU and a NIC of one socket",
        ]
    );
}

/// A machine with nothing.
#[test]
fn a_machine_without_devices() {
    let bare = Machine::new("bare", "6.12.9-amd64");
    let told = bare.diagnosed().told();
    assert_eq!(
        told,
        [
            "no-device: the kernel has no RDMA device -> load the NIC's driver (modprobe mlx5_ib), or add soft-RoCE (rdma link add rxe0 type rxe netdev eth0)"
        ]
    );
}
