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
pub mod lines;
mod modules;
mod resolve;
pub mod rxe;
mod slim;
mod sources;
mod tools;

pub use apt::Apt;
pub use fetch::{NotOffered, unpacked};
pub use lines::Kernel;
pub use modules::Module;

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

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

/// The image as packaged; it moved too.
fn vmlinuz(dir: &Path, release: &str) -> PathBuf {
    let root = dir.join("root");
    let moved = modules_tree(&root, release).join("vmlinuz");
    if moved.is_file() { moved } else { root.join("boot").join(format!("vmlinuz-{release}")) }
}

/// Where kernels live.
fn home() -> PathBuf {
    crate::project::target().join("kernel")
}

/// The text of a file, or an error that names it.
fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
