//! The series of Debian kernels that the guest can boot.

use anyhow::{Context, Result};

/// Which version of a series to take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Version {
    /// The one that this repository is tested with, or the newest if the mirror has dropped that.
    Tested,
    Newest,
    /// Such as `6.12.90` or `6.12.90+deb12`.
    Exact(String),
}

/// A series of kernels.
///
/// In package and file names, `{abi}` stands for the full version, such as `6.12.90+deb12`, and
/// `{series}` for its first two numbers.
#[derive(Debug)]
pub struct Kernel {
    /// The start of its versions, and its name on the command line.
    pub line: &'static str,
    /// The version that this repository is tested with.
    pub tested: &'static str,
    pub version: Version,
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
#[derive(Clone, Copy, Debug)]
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

/// The kernel of Debian 13, and the newest of Debian 12. It has udmabuf and dma-heaps, which 6.1 lacks.
pub const LINUX_6_12: Kernel = Kernel {
    line: "6.12",
    tested: "6.12.117",
    version: Version::Tested,
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
    root_modules: &["9pnet_virtio", "9p", "overlay"],
    // rxe requests "crc32" from the crypto layer by name, so no dependency loads it.
    rdma_modules: &["crc32_generic", "ib_uverbs", "rdma_ucm", "dummy", "veth"],
    test_modules: &["vgem", "virtio_gpu", "bochs", "vivid", "sch_netem"],
    skipped_initcalls: SKIPPED_INITCALLS,
};

/// The newest kernel that Debian builds for a stable release. It has PCI BARs as dma-bufs, through VFIO.
pub const LINUX_7: Kernel = Kernel {
    line: "7",
    tested: "7.3.4",
    version: Version::Tested,
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

/// The series.
const KERNELS: &[&Kernel] = &[&LINUX_6_12, &LINUX_7, &LINUX_DEBUG];

/// The newest version of a series has this after the name, or stands alone for the first series.
const NEWEST: &str = "newest";

impl Kernel {
    /// The series with another choice of version. The program uses few, and until it ends.
    fn at(&self, version: Version) -> &'static Kernel {
        Box::leak(Box::new(Kernel { version, ..*self }))
    }

    /// The other series, in the newest version if this one is.
    pub fn beside(&self, other: &'static Kernel) -> &'static Kernel {
        if self.version == Version::Newest { other.at(Version::Newest) } else { other }
    }

    /// Whether a full version, such as `6.12.90+deb12`, is this one.
    pub fn is(abi: &str, version: &str) -> bool {
        abi.strip_prefix(version).is_some_and(|rest| rest.is_empty() || rest.starts_with('+'))
    }
}

/// The kernel that `--kernel` names.
pub fn by_name(name: &str) -> Result<&'static Kernel> {
    let series = |name: &str| KERNELS.iter().find(|kernel| kernel.line == name).copied();
    if name == NEWEST {
        return Ok(LINUX_6_12.at(Version::Newest));
    }
    if let Some(kernel) = series(name) {
        return Ok(kernel);
    }
    let debian = || KERNELS.iter().filter(|kernel| kernel.configuration.is_none());
    if let Some(line) = name.strip_suffix(NEWEST).and_then(|line| line.strip_suffix('-'))
        && let Some(kernel) = debian().find(|kernel| kernel.line == line)
    {
        return Ok(kernel.at(Version::Newest));
    }
    let exact =
        debian().find(|kernel| name.strip_prefix(kernel.line).is_some_and(|rest| rest.starts_with('.')));
    exact.map(|kernel| kernel.at(Version::Exact(name.to_string()))).with_context(|| {
        let names: Vec<_> = KERNELS.iter().map(|k| k.line).collect();
        format!(
            "--kernel {name} is unknown; use one of {}, {NEWEST}, 7-{NEWEST}, or a version such as {}",
            names.join(", "),
            LINUX_6_12.tested
        )
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
        for (name, line, version) in [
            ("6.12", "6.12", Version::Tested),
            ("newest", "6.12", Version::Newest),
            ("6.12-newest", "6.12", Version::Newest),
            ("7-newest", "7", Version::Newest),
            ("6.12.90", "6.12", Version::Exact("6.12.90".into())),
            ("7.3.4+deb13", "7", Version::Exact("7.3.4+deb13".into())),
        ] {
            let kernel = by_name(name).unwrap();
            assert_eq!((kernel.line, &kernel.version), (line, &version), "{name}");
        }
        for name in ["6", "6.1.90", "6.120", "", "debug-newest", "8-newest", "x"] {
            let message = by_name(name).unwrap_err().to_string();
            assert!(
                message.contains("use one of 6.12, 7, debug, newest, 7-newest, or a version"),
                "{message}"
            );
        }
        assert_eq!(by_name("newest").unwrap().beside(&LINUX_7).version, Version::Newest);
        assert_eq!(by_name("6.12").unwrap().beside(&LINUX_7).version, Version::Tested);
    }

    #[test]
    fn a_version_is_the_start_of_the_full_one() {
        assert!(Kernel::is("6.12.90+deb12", "6.12.90") && Kernel::is("6.12.90+deb12", "6.12.90+deb12"));
        assert!(!Kernel::is("6.12.90+deb12", "6.12.9") && !Kernel::is("6.12.90+deb12", "6.12.90+deb1"));
    }
}
