//! The guest's kernel: Debian's build, fetched and unpacked in `target/`.
//!
//! The steps are: read the machine's apt sources ([`sources`]), set up a private
//! apt folder ([`apt`]), choose a complete version ([`resolve`]), fetch
//! and unpack its packages ([`fetch`]), and build modules ([`built`], [`rxe`]). One
//! kernel is built from the source ([`checking`]).
//! [`Unpacked`] is a folder with the image, the modules, the headers and the
//! source of rxe, all of one version.

mod apt;
mod built;
mod checking;
mod compiler;
mod fetch;
mod image;
pub mod lines;
#[cfg(test)]
pub mod mirror;
mod modules;
mod resolve;
pub mod rxe;
#[cfg(test)]
mod scripts;
mod slim;
mod sources;
mod tools;

pub use apt::Apt;
pub use fetch::unpacked;
pub use lines::Kernel;
pub use modules::Module;
pub use resolve::NotOffered;

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// An unpacked version.
#[derive(Debug)]
pub struct Unpacked {
    pub kernel: &'static Kernel,
    /// As printed by `uname -r`.
    pub release: String,
    dir: PathBuf,
}

impl Unpacked {
    /// The image that QEMU boots: the plain ELF image if there is one.
    pub fn image(&self) -> PathBuf {
        let plain = self.dir.join("vmlinux");
        if plain.is_file() { plain } else { vmlinuz(&self.dir, &self.release) }
    }

    /// The folder that belongs at `/lib/modules/RELEASE`.
    pub fn modules_dir(&self) -> PathBuf {
        modules_tree(&self.dir.join("root"), &self.release)
    }

    /// The folder for `make -C` when building a module.
    pub fn headers(&self) -> PathBuf {
        if self.kernel.configuration.is_some() {
            return self.source();
        }
        self.dir.join(format!("root/usr/src/linux-headers-{}", self.release))
    }

    /// The folder with `drivers/infiniband/sw` of this version.
    pub fn source(&self) -> PathBuf {
        self.dir.join("source")
    }

    /// A folder for files built for this version.
    pub fn build_dir(&self, name: &str) -> PathBuf {
        self.dir.with_file_name(format!("build-{}", self.release)).join(name)
    }

    /// The path of Debian's rdma_rxe in the guest.
    pub fn stock_rxe(&self) -> Result<PathBuf> {
        let modules = self.modules(&["rdma_rxe"])?;
        let module = modules.last().context("rdma_rxe is built in")?;
        // `lib` may be a link to `usr/lib`.
        let tree = self.modules_dir().canonicalize()?;
        let path = module.path.canonicalize()?;
        Ok(Path::new("/lib/modules").join(&self.release).join(path.strip_prefix(tree)?))
    }

    /// The module dma_sg. Builds it first if needed.
    pub fn dma_sg(&self) -> Result<PathBuf> {
        built::module(self, "dma_sg", "dma_sg", &[self.headers()])
    }

    /// The module siw (soft-iWARP), which Debian leaves out. Builds it first if needed.
    pub fn siw(&self) -> Result<PathBuf> {
        built::module(self, "siw", "siw", &[self.source(), self.headers()])
    }

    /// The named modules and all their dependencies, in load order.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        modules::closure(&self.dir.join("root"), &self.release, names)
    }
}

/// The modules folder, which newer packages (7.x) have in `usr`.
fn modules_tree(root: &Path, release: &str) -> PathBuf {
    let moved = root.join("usr/lib/modules").join(release);
    if moved.is_dir() { moved } else { root.join("lib/modules").join(release) }
}

/// The packaged image, which newer packages have in the modules folder.
fn vmlinuz(dir: &Path, release: &str) -> PathBuf {
    let root = dir.join("root");
    let moved = modules_tree(&root, release).join("vmlinuz");
    if moved.is_file() { moved } else { root.join("boot").join(format!("vmlinuz-{release}")) }
}

/// The folder of all kernels.
fn home() -> PathBuf {
    crate::project::target().join("kernel")
}

/// Reads a text file; an error names the file.
fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
