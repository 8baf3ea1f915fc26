//! The guest's kernel: Debian's own build, fetched and unpacked under `target/`.
//!
//! The path is: the machine's apt sources ([`sources`]) → a private apt folder
//! ([`apt`]) → the newest complete version ([`resolve`]) → packages fetched and
//! unpacked ([`fetch`]) → a folder ([`Unpacked`]) that gives the image, the
//! modules, the headers and rxe's source of exactly one version → the modules
//! built from them ([`built`], [`rxe`]).

mod apt;
mod built;
mod fetch;
mod image;
mod modules;
mod resolve;
pub mod rxe;
mod slim;
mod sources;

pub use fetch::unpacked;
pub use modules::Module;

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// A line of kernels that the guest can boot.
#[derive(Debug)]
pub struct Kernel {
    /// What versions of it start with, and its name on the command line.
    pub line: &'static str,
    /// The packages needed, all of one version and from one suite. Each entry
    /// lists alternatives, the first that exists is taken. `{abi}` stands for
    /// the full name of the version, such as `6.12.90+deb12`.
    pub packages: &'static [&'static [&'static str]],
    /// The package that tells which versions there are.
    pub index: &'static str,
    /// The archive inside `linux-source-*` and the folders wanted from it.
    pub source: Source,
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

/// Debian 12's newest kernel: it has udmabuf and dma-heaps, which 6.1 lacks.
pub const LINUX_6_12: Kernel = Kernel {
    line: "6.12",
    packages: &[
        &["linux-image-{abi}-amd64", "linux-image-{abi}-amd64-unsigned"],
        &["linux-headers-{abi}-amd64"],
        &["linux-headers-{abi}-common"],
        &["linux-kbuild-{abi}"],
        &["linux-source-6.12"],
    ],
    index: "linux-headers-{abi}-amd64",
    source: Source { archive: "usr/src/linux-source-6.12.tar.xz", folders: &["drivers/infiniband/sw/rxe"] },
    root_modules: &["9pnet_virtio", "9p", "overlay"],
    // rxe asks the crypto layer for "crc32" by name, so nothing loads it for us.
    rdma_modules: &["crc32_generic", "ib_uverbs", "rdma_ucm", "dummy"],
    test_modules: &["vgem", "virtio_gpu", "bochs", "vivid", "veth", "sch_netem"],
    // BTF, keys for signed modules, an entropy source and names for tracing.
    skipped_initcalls: &[
        "bpf_tcp_ca_kfunc_init",
        "bpf_dummy_struct_ops_init",
        "load_system_certificate_list",
        "jent_mod_init",
        "trace_eval_init",
    ],
};

/// All that `--kernel` accepts.
const KERNELS: &[&Kernel] = &[&LINUX_6_12];

/// The kernel of that name.
pub fn by_name(name: &str) -> Result<&'static Kernel> {
    KERNELS.iter().find(|k| k.line == name).copied().with_context(|| {
        let names: Vec<_> = KERNELS.iter().map(|k| k.line).collect();
        format!("no kernel `{name}`; there is {}", names.join(", "))
    })
}

/// One version, unpacked.
#[derive(Debug)]
pub struct Unpacked {
    pub kernel: &'static Kernel,
    /// As `uname -r` says it.
    pub release: String,
    dir: PathBuf,
}

impl Unpacked {
    /// What QEMU boots: the plain ELF image where there is one.
    pub fn image(&self) -> PathBuf {
        let plain = self.dir.join("vmlinux");
        if plain.is_file() { plain } else { vmlinuz(&self.dir, &self.release) }
    }

    /// The folder that belongs at `/lib/modules/RELEASE`.
    pub fn modules_dir(&self) -> PathBuf {
        modules_tree(&self.dir.join("root"), &self.release)
    }

    /// The folder to `make -C` for a module.
    pub fn headers(&self) -> PathBuf {
        self.dir.join(format!("root/usr/src/linux-headers-{}", self.release))
    }

    /// The folder that holds `drivers/infiniband/sw/rxe` of this version.
    pub fn source(&self) -> PathBuf {
        self.dir.join("source")
    }

    /// A folder of its own for what is built for this version.
    pub fn build_dir(&self, name: &str) -> PathBuf {
        self.dir.with_file_name(format!("build-{}", self.release)).join(name)
    }

    /// Debian's own rdma_rxe, as a path that the guest sees.
    pub fn stock_rxe(&self) -> Result<PathBuf> {
        let modules = self.modules(&["rdma_rxe"])?;
        let module = modules.last().context("rdma_rxe is built in")?;
        let inside = module.path.strip_prefix(self.modules_dir())?;
        Ok(Path::new("/lib/modules").join(&self.release).join(inside))
    }

    /// The module that shows a dma-buf's addresses, built first if need be.
    pub fn dma_sg(&self) -> Result<PathBuf> {
        built::module(self, "dma_sg", "dma_sg", &[self.headers()])
    }

    /// The modules named and all they depend on, in the order to load them.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        modules::closure(&self.modules_dir(), names)
    }
}

/// Debian moved it under `usr` on the way to 7.x.
fn modules_tree(root: &Path, release: &str) -> PathBuf {
    let moved = root.join("usr/lib/modules").join(release);
    if moved.is_dir() { moved } else { root.join("lib/modules").join(release) }
}

/// The image as packaged.
fn vmlinuz(dir: &Path, release: &str) -> PathBuf {
    dir.join(format!("root/boot/vmlinuz-{release}"))
}

/// Where kernels live.
fn home() -> PathBuf {
    crate::project::target().join("kernel")
}

/// The text of a file, or an error that names it.
fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
