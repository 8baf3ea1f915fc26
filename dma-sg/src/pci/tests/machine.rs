//! Makes a sysfs in a temporary folder from a text that describes a machine.
//!
//! A line is a PCI function, indented below the port that it is plugged into; a line `pciDDDD:BB` is a host
//! bridge. Words after an address:
//!
//! | word | meaning |
//! |---|---|
//! | `root`, `up`, `down`, `end` | port type in the PCI Express capability; none: no capability |
//! | `acs=HH` | ACS with this control register |
//! | `numa=N` | numa_node; default -1 |
//! | `group=N:TYPE` | IOMMU group and the type of its domain |
//! | `rdma=NAME`, `drm=NAME` | a class device directly below |
//! | `child:NAME=CLASS:DEVICE` | a class device below a child device `NAME`, such as virtio's |
//! | `physfn=ADDRESS` | a virtual function of that function |
//! | `bar=N:SIZE:FLAGS@START` | a line of `resource`, in hexadecimal |
//! | `bus=N:START` | the value of a BAR's register |
//! | `off`, `asleep` | memory decoding is off; configuration space reads as ones |
//! | `user` | only 64 bytes of configuration space are readable, as without root |
//!
//! `soft CLASS NAME [NETDEV]` is a class device without a `device` link.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::{PciAddress, PciDevice, Sysfs};

pub struct Machine {
    root: PathBuf,
}

impl Machine {
    pub fn new(text: &str) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("dma-sg-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let machine = Self { root: std::env::temp_dir().join(name) };
        for folder in ["bus/pci/devices", "class/infiniband", "class/drm", "devices"] {
            fs::create_dir_all(machine.root.join(folder)).unwrap();
        }
        let mut above: Vec<(usize, PathBuf)> = vec![];
        for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
            let indent = line.len() - line.trim_start().len();
            above.retain(|(other, _)| *other < indent);
            let parent = above.last().map_or(machine.root.join("devices"), |(_, path)| path.clone());
            let words: Vec<_> = line.split_whitespace().collect();
            if words[0] == "soft" {
                machine.software(&words);
                continue;
            }
            let path = parent.join(words[0]);
            fs::create_dir(&path).unwrap();
            if PciAddress::parse(words[0]).is_some() {
                machine.function(&path, &words);
            }
            above.push((indent, path));
        }
        machine
    }

    pub fn sysfs(&self) -> Sysfs {
        Sysfs::at(&self.root)
    }

    pub fn device(&self, address: &str) -> PciDevice {
        self.sysfs().device(address.parse().unwrap()).unwrap()
    }

    pub fn rdma(&self, name: &str) -> PciDevice {
        self.sysfs().rdma_device(name).unwrap().into_pci().unwrap()
    }

    /// Replaces a file of a function.
    pub fn write(&self, address: &str, file: &str, contents: &[u8]) {
        fs::write(self.device(address).path().join(file), contents).unwrap();
    }

    fn software(&self, words: &[&str]) {
        let path = self.root.join("devices/virtual").join(words[2]);
        fs::create_dir_all(&path).unwrap();
        if let Some(netdev) = words.get(3) {
            fs::write(path.join("parent"), format!("{netdev}\n")).unwrap();
        }
        symlink(&path, self.root.join("class").join(words[1]).join(words[2])).unwrap();
    }

    fn function(&self, path: &Path, words: &[&str]) {
        let (mut config, mut resource) = (vec![0_u8; 4096], vec![[0_u64; 3]; 13]);
        let set16 = |config: &mut [u8], at: usize, value: u16| {
            config[at..at + 2].copy_from_slice(&value.to_le_bytes());
        };
        set16(&mut config, 0, 0x8086);
        set16(&mut config, 4, 0x0006);
        let (mut numa, mut length) = ("-1", 4096);
        for word in &words[1..] {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "root" | "up" | "down" | "end" => {
                    let number = ["end", "", "", "", "root", "up", "down"].iter().position(|k| *k == key);
                    // A power management capability comes first, so the parser must follow the list.
                    set16(&mut config, 6, 0x10);
                    config[0x34] = 0x50;
                    config[0x50..0x52].copy_from_slice(&[0x01, 0x78]);
                    config[0x78..0x7a].copy_from_slice(&[0x10, 0x00]);
                    set16(&mut config, 0x7a, 2 | (number.unwrap() as u16) << 4);
                }
                "acs" => {
                    // An error reporting capability comes first.
                    config[0x100..0x104].copy_from_slice(&0x1501_0001_u32.to_le_bytes());
                    config[0x150..0x154].copy_from_slice(&0x0001_000d_u32.to_le_bytes());
                    set16(&mut config, 0x154, 0x7f);
                    set16(&mut config, 0x156, u16::from_str_radix(value, 16).unwrap());
                }
                "numa" => numa = value,
                "group" => {
                    let (number, kind) = value.split_once(':').unwrap();
                    let group = self.root.join("kernel/iommu_groups").join(number);
                    fs::create_dir_all(&group).unwrap();
                    fs::write(group.join("type"), format!("{kind}\n")).unwrap();
                    symlink(&group, path.join("iommu_group")).unwrap();
                }
                "rdma" => self.class("infiniband", value, path, path),
                "drm" => self.class("drm", value, path, path),
                "physfn" => symlink(path.with_file_name(value), path.join("physfn")).unwrap(),
                "bar" => {
                    let (line, start) = value.split_once('@').unwrap();
                    let [number, size, flags] = line.splitn(3, ':').collect::<Vec<_>>().try_into().unwrap();
                    let hex = |text| u64::from_str_radix(text, 16).unwrap();
                    let start = hex(start);
                    resource[hex(number) as usize] = [start, (start + hex(size)).wrapping_sub(1), hex(flags)];
                }
                "bus" => {
                    let (number, start) = value.split_once(':').unwrap();
                    let at = 0x10 + 4 * number.parse::<usize>().unwrap();
                    let value = u64::from_str_radix(start, 16).unwrap();
                    config[at..at + 8].copy_from_slice(&value.to_le_bytes());
                }
                "off" => set16(&mut config, 4, 0x0004),
                "asleep" => config.fill(0xff),
                "user" => length = 64,
                _ => {
                    let child = key.strip_prefix("child:").unwrap_or_else(|| panic!("unknown word {word}"));
                    let (class, name) = value.split_once(':').unwrap();
                    fs::create_dir(path.join(child)).unwrap();
                    self.class(class, name, &path.join(child), &path.join(child));
                }
            }
        }
        let text: String = resource
            .iter()
            .map(|[start, end, flags]| format!("0x{start:016x} 0x{end:016x} 0x{flags:016x}\n"))
            .collect();
        for (file, contents) in
            [("config", &config[..length]), ("resource", text.as_bytes()), ("numa_node", numa.as_bytes())]
        {
            fs::write(path.join(file), contents).unwrap();
        }
        symlink(path, self.root.join("bus/pci/devices").join(words[0])).unwrap();
    }

    fn class(&self, class: &str, name: &str, below: &Path, device: &Path) {
        let path = below.join(class).join(name);
        fs::create_dir_all(&path).unwrap();
        symlink(device, path.join("device")).unwrap();
        symlink(&path, self.root.join("class").join(class).join(name)).unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}
