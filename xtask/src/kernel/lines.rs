//! The series of Debian kernels that the guest can boot.

use anyhow::{Context, Result};

/// A series of kernels.
///
/// In package and file names, `{abi}` stands for the full version, such as `6.12.90+deb12`, and
/// `{series}` for its first two numbers.
#[derive(Debug)]
pub struct Kernel {
    /// The start of its versions, and its name on the command line.
    pub line: &'static str,
    /// The Debian release that has it; `None` for this machine's release.
    pub release: Option<&'static str>,
    /// The packages to fetch, all of one version and from one suite. Each entry
    /// lists alternatives; the first that exists is used.
    pub packages: &'static [&'static [&'static str]],
    /// The package whose name lists the versions.
    pub index: &'static str,
    /// The archive in `linux-source-*` and the folders to extract.
    pub source: Source,
    /// The file in `kernel/` with the configuration to build it with; `None` to boot Debian's build.
    pub configuration: Option<&'static str>,
    /// Packages of that release with libraries for its build tools, for a machine
    /// with older libraries.
    pub libraries: &'static [&'static str],
    /// Arguments for `make` to build a module with Debian 12's gcc.
    pub make_arguments: &'static [&'static str],
    /// Modules for mounting the root, loaded from the initramfs.
    pub root_modules: &'static [&'static str],
    /// Modules for an RDMA device, loaded before rdma_rxe.
    pub rdma_modules: &'static [&'static str],
    /// Modules that the tests load.
    pub test_modules: &'static [&'static str],
    /// Slow initcalls that the guest does not need.
    pub skipped_initcalls: &'static [&'static str],
}

/// The part of the kernel's source to extract; no folders for all of it.
#[derive(Debug)]
pub struct Source {
    pub archive: &'static str,
    pub folders: &'static [&'static str],
}

/// The Makefile has the version, which `kernel/rxe/build.sh` compares with that of the headers.
const SOURCE: Source = Source {
    archive: "usr/src/linux-source-{series}.tar.xz",
    folders: &["Makefile", "drivers/infiniband/sw/rxe", "drivers/infiniband/sw/siw"],
};

/// BTF, keys of signed modules, an entropy source, and names for tracing.
const SKIPPED_INITCALLS: &[&str] = &[
    "bpf_tcp_ca_kfunc_init",
    "bpf_dummy_struct_ops_init",
    "load_system_certificate_list",
    "jent_mod_init",
    "trace_eval_init",
];

/// Debian 12's newest kernel. It has udmabuf and dma-heaps, which 6.1 lacks.
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
    configuration: None,
    libraries: &[],
    make_arguments: &[],
    root_modules: &["9pnet_virtio", "9p", "overlay"],
    // rxe requests "crc32" from the crypto layer by name, so no dependency loads it.
    rdma_modules: &["crc32_generic", "ib_uverbs", "rdma_ucm", "dummy", "veth"],
    test_modules: &["vgem", "virtio_gpu", "bochs", "vivid", "sch_netem"],
    skipped_initcalls: SKIPPED_INITCALLS,
};

/// The newest kernel that Debian builds for a stable release. It has PCI BARs as dma-bufs, through VFIO.
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
    configuration: None,
    libraries: &["libc6", "libelf1t64", "zlib1g", "libzstd1"],
    // A newer gcc built it. Debian 12's gcc lacks only -fmin-function-alignment.
    make_arguments: &["CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="],
    root_modules: &["9pnet_virtio", "9p", "overlay"],
    rdma_modules: &["ib_uverbs", "rdma_ucm", "dummy", "veth"],
    test_modules: &["vgem", "virtio_gpu", "bochs", "vivid", "sch_netem", "vfio_pci", "vfio_iommu_type1"],
    skipped_initcalls: SKIPPED_INITCALLS,
};

/// The source of [`LINUX_6_12`], built with the kernel's own checks.
pub const LINUX_DEBUG: Kernel = Kernel {
    line: "debug",
    source: Source { archive: SOURCE.archive, folders: &[] },
    configuration: Some("debug.config"),
    ..LINUX_6_12
};

/// All values of `--kernel`.
const KERNELS: &[&Kernel] = &[&LINUX_6_12, &LINUX_7, &LINUX_DEBUG];

/// The kernel series with that name.
pub fn by_name(name: &str) -> Result<&'static Kernel> {
    KERNELS.iter().find(|k| k.line == name).copied().with_context(|| {
        let names: Vec<_> = KERNELS.iter().map(|k| k.line).collect();
        format!("--kernel {name} is unknown; use one of {}", names.join(", "))
    })
}

/// Fills in `{abi}` and `{series}`.
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
        assert!(by_name("6").unwrap_err().to_string().contains("use one of 6.12, 7, debug"));
    }
}
