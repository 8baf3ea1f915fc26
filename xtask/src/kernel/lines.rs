//! The lines of Debian kernels that the guest can boot.

use anyhow::{Context, Result};

/// A line of kernels.
///
/// In the names of packages and files `{abi}` stands for the full name of a version, such as
/// `6.12.90+deb12`, and `{series}` for its first two numbers.
#[derive(Debug)]
pub struct Kernel {
    /// What versions of it start with, and its name on the command line.
    pub line: &'static str,
    /// The Debian release whose suites have it; `None` for this machine's own.
    pub release: Option<&'static str>,
    /// The packages needed, all of one version and from one suite. Each entry
    /// lists alternatives, the first that exists is taken.
    pub packages: &'static [&'static [&'static str]],
    /// The package that tells which versions there are.
    pub index: &'static str,
    /// The archive inside `linux-source-*` and the folders wanted from it.
    pub source: Source,
    /// Packages of that release with the libraries that its build tools want,
    /// for a machine with older ones.
    pub libraries: &'static [&'static str],
    /// What `make` has to be told to build a module for it with Debian 12's gcc.
    pub make_arguments: &'static [&'static str],
    /// Modules that mount the root: loaded before there is any file system.
    pub root_modules: &'static [&'static str],
    /// Modules that make an RDMA device, before rdma_rxe itself.
    pub rdma_modules: &'static [&'static str],
    /// Modules that tests load themselves.
    pub test_modules: &'static [&'static str],
    /// Initialisers that cost a slow machine much and give this guest nothing.
    pub skipped_initcalls: &'static [&'static str],
}

/// What is taken from the kernel's source.
#[derive(Debug)]
pub struct Source {
    pub archive: &'static str,
    pub folders: &'static [&'static str],
}

const SOURCE: Source =
    Source { archive: "usr/src/linux-source-{series}.tar.xz", folders: &["drivers/infiniband/sw/rxe"] };

/// BTF, keys for signed modules, an entropy source and names for tracing.
const SKIPPED_INITCALLS: &[&str] = &[
    "bpf_tcp_ca_kfunc_init",
    "bpf_dummy_struct_ops_init",
    "load_system_certificate_list",
    "jent_mod_init",
    "trace_eval_init",
];

/// Debian 12's newest kernel: it has udmabuf and dma-heaps, which 6.1 lacks.
pub const LINUX_6_12: Kernel = Kernel {
    line: "6.12",
    release: None,
    packages: &[
        &["linux-image-{abi}-amd64", "linux-image-{abi}-amd64-unsigned"],
        &["linux-headers-{abi}-amd64"],
        &["linux-headers-{abi}-common"],
        &["linux-kbuild-{abi}"],
        &["linux-source-{series}"],
    ],
    index: "linux-headers-{abi}-amd64",
    source: SOURCE,
    libraries: &[],
    make_arguments: &[],
    root_modules: &["9pnet_virtio", "9p", "overlay"],
    // rxe asks the crypto layer for "crc32" by name, so nothing loads it for us.
    rdma_modules: &["crc32_generic", "ib_uverbs", "rdma_ucm", "dummy", "veth"],
    test_modules: &["vgem", "virtio_gpu", "bochs", "vivid", "sch_netem"],
    skipped_initcalls: SKIPPED_INITCALLS,
};

/// The newest kernel that Debian builds for a stable release: PCI BARs as dma-bufs, through VFIO.
pub const LINUX_7: Kernel = Kernel {
    line: "7",
    release: Some("trixie"),
    packages: &[
        &["linux-binary-{abi}-amd64", "linux-binary-unsigned-{abi}-amd64"],
        &["linux-modules-{abi}-amd64"],
        &["linux-headers-{abi}-amd64"],
        &["linux-headers-{abi}-common"],
        &["linux-kbuild-{abi}"],
        &["linux-source-{series}"],
    ],
    index: "linux-headers-{abi}-amd64",
    source: SOURCE,
    libraries: &["libc6", "libelf1t64", "zlib1g", "libzstd1"],
    // A newer gcc built it. What Debian 12's does not know is a way to align functions.
    make_arguments: &["CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="],
    root_modules: &["9pnet_virtio", "9p", "overlay"],
    rdma_modules: &["ib_uverbs", "rdma_ucm", "dummy", "veth"],
    test_modules: &["vgem", "virtio_gpu", "bochs", "vivid", "sch_netem", "vfio_pci", "vfio_iommu_type1"],
    skipped_initcalls: SKIPPED_INITCALLS,
};

/// All that `--kernel` accepts.
const KERNELS: &[&Kernel] = &[&LINUX_6_12, &LINUX_7];

/// The kernel of that name.
pub fn by_name(name: &str) -> Result<&'static Kernel> {
    KERNELS.iter().find(|k| k.line == name).copied().with_context(|| {
        let names: Vec<_> = KERNELS.iter().map(|k| k.line).collect();
        format!("no kernel `{name}`; there is {}", names.join(", "))
    })
}

/// `{abi}` and `{series}` filled in.
pub fn filled(pattern: &str, abi: &str) -> String {
    let numbers = abi.split(['+', '-']).next().unwrap_or(abi);
    let series: Vec<&str> = numbers.splitn(3, '.').take(2).collect();
    pattern.replace("{abi}", abi).replace("{series}", &series.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_filled_in() {
        assert_eq!(filled("linux-kbuild-{abi}", "6.12.90+deb12"), "linux-kbuild-6.12.90+deb12");
        assert_eq!(filled("linux-source-{series}", "6.12.90+deb12"), "linux-source-6.12");
        assert_eq!(filled("linux-source-{series}", "7.3+deb13"), "linux-source-7.3");
    }

    #[test]
    fn kernels_have_names() {
        assert_eq!(by_name("7").unwrap().release, Some("trixie"));
        assert!(by_name("6").unwrap_err().to_string().contains("there is 6.12, 7"));
    }
}
