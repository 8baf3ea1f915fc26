//! The kernel, its options that matter here, and its modules.

use std::collections::BTreeMap;
use std::io::Read;

use flate2::read::GzDecoder;
use serde::{Deserialize, Serialize};

use super::super::look::{Fact, Look};

/// Options that decide what works.
const OPTIONS: &[&str] = &[
    "CONFIG_INFINIBAND_USER_ACCESS",
    "CONFIG_UDMABUF",
    "CONFIG_DMABUF_HEAPS",
    "CONFIG_DMABUF_HEAPS_SYSTEM",
    "CONFIG_DMABUF_MOVE_NOTIFY",
    "CONFIG_PCI_P2PDMA",
    "CONFIG_HSA_AMD_P2P",
    "CONFIG_VFIO_PCI_DMABUF",
    "CONFIG_DRM_VGEM",
    "CONFIG_RDMA_RXE",
    "CONFIG_RDMA_SIW",
    "CONFIG_SECURITY_LOCKDOWN_LSM",
];

/// Modules that matter, loaded or built in.
const MODULES: &[&str] = &[
    "ib_core",
    "ib_uverbs",
    "rdma_cm",
    "rdma_ucm",
    "rdma_rxe",
    "siw",
    "mlx5_ib",
    "mlx4_ib",
    "irdma",
    "bnxt_re",
    "efa",
    "mana_ib",
    "ionic_rdma",
    "hfi1",
    "qedr",
    "erdma",
    "hns_roce_hw_v2",
    "vmw_pvrdma",
    "udmabuf",
    "dma_heap",
    "system_heap",
    "vgem",
    "virtio_gpu",
    "bochs",
    "vivid",
    "nvidia",
    "nvidia_uvm",
    "nvidia_peermem",
    "nv_peer_mem",
    "gdrdrv",
    "amdgpu",
    "i915",
    "xe",
    "vfio_pci",
    "dma_sg",
];

/// The kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kernel {
    pub release: Fact<String>,
    pub architecture: String,
    pub command_line: Fact<String>,
    /// `y`, `m`, or `n` for each option that matters.
    pub options: Fact<BTreeMap<String, String>>,
    /// The modules that matter, with their versions if they have one.
    pub modules: Fact<BTreeMap<String, String>>,
    /// Whether NVIDIA's modules are the open ones.
    pub nvidia_open: Option<bool>,
}

impl Kernel {
    pub fn gather(look: &Look) -> Self {
        let release = look.text("/proc/sys/kernel/osrelease");
        let options = match release.known() {
            Some(release) => options(look, release),
            None => Fact::unknown("the kernel's release is not known"),
        };
        let nvidia = look.any_text("/proc/driver/nvidia/version");
        Self {
            architecture: std::env::consts::ARCH.into(),
            command_line: look.text("/proc/cmdline"),
            options,
            modules: modules(look),
            nvidia_open: nvidia.map(|text| text.contains("Open Kernel Module")),
            release,
        }
    }

    /// Whether the kernel is older than this; false if that is not known.
    pub fn is_before(&self, major: u32, minor: u32) -> bool {
        self.version().is_some_and(|version| version < (major, minor))
    }

    pub fn version(&self) -> Option<(u32, u32)> {
        let mut numbers = self.release.known()?.split(|c: char| !c.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }

    pub fn has(&self, module: &str) -> bool {
        self.modules.known().is_some_and(|modules| modules.contains_key(module))
    }

    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.known()?.get(name).map(String::as_str)
    }
}

fn options(look: &Look, release: &str) -> Fact<BTreeMap<String, String>> {
    let places = [
        format!("/boot/config-{release}"),
        format!("/lib/modules/{release}/config"),
        format!("/usr/lib/modules/{release}/config"),
    ];
    let compressed = || {
        let mut text = String::new();
        GzDecoder::new(std::fs::File::open(look.path("/proc/config.gz")).ok()?)
            .read_to_string(&mut text)
            .ok()?;
        Some(text)
    };
    let Some(text) = compressed().or_else(|| places.iter().find_map(|path| look.any_text(path))) else {
        return Fact::unknown(format!("neither /proc/config.gz nor {} is there", places[0]));
    };
    let value = |option: &&str| {
        let set = text.lines().find_map(|line| line.strip_prefix(option)?.strip_prefix('='));
        ((*option).to_owned(), set.unwrap_or("n").to_owned())
    };
    Fact::Known(OPTIONS.iter().map(value).collect())
}

fn modules(look: &Look) -> Fact<BTreeMap<String, String>> {
    if !look.exists("/sys/module") && !look.exists("/proc/modules") {
        return Fact::unknown("neither /sys/module nor /proc/modules is there");
    }
    let loaded = look.any_text("/proc/modules").unwrap_or_default();
    let is_there = |name: &&&str| {
        look.exists(&format!("/sys/module/{name}"))
            || loaded.lines().any(|line| line.split(' ').next() == Some(**name))
    };
    let version = |name: &&str| look.any_text(&format!("/sys/module/{name}/version")).unwrap_or_default();
    Fact::Known(MODULES.iter().filter(is_there).map(|name| ((*name).to_owned(), version(name))).collect())
}
