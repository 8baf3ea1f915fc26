//! The guest's initramfs: a static busybox, two scripts, and the modules for the
//! root file system and for RDMA. It is uncompressed, because an emulated CPU
//! decompresses slowly.

use super::cpio::Archive;
use crate::kernel::{Module, Unpacked};
use crate::{lock, process};
use anyhow::{Context, Result, bail};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

const INIT: &str = include_str!("init.sh");
const MAIN: &str = include_str!("main.sh");

/// The busybox applets that the two scripts use.
const APPLETS: &[&str] = &[
    "cat",
    "cp",
    "dmesg",
    "hostname",
    "insmod",
    "ip",
    "ln",
    "mkdir",
    "mkfifo",
    "mount",
    "poweroff",
    "setsid",
    "sh",
    "sleep",
    "stty",
    "switch_root",
    "sync",
];

/// Builds the initramfs for this kernel and this rdma_rxe; `None` means the
/// kernel's own module.
pub fn build(kernel: &Unpacked, rxe: Option<&Path>) -> Result<PathBuf> {
    let busybox_path = busybox()?;
    let busybox =
        fs::read(&busybox_path).with_context(|| format!("cannot read {}", busybox_path.display()))?;
    let root = kernel.modules(kernel.kernel.root_modules)?;
    let mut names = kernel.kernel.rdma_modules.to_vec();
    names.push("rdma_rxe");
    let mut rdma = kernel.modules(&names)?;
    rdma.retain(|module| !root.contains(module));
    if let Some(path) = rxe {
        let module = rdma
            .iter_mut()
            .find(|m| m.name == "rdma_rxe")
            .context("rdma_rxe is built into this kernel; the guest needs it as a module")?;
        module.path = path.to_path_buf();
    }

    let mut hasher = DefaultHasher::new();
    (INIT, MAIN, APPLETS, &busybox).hash(&mut hasher);
    for module in root.iter().chain(&rdma) {
        module.path.hash(&mut hasher);
    }
    if let Some(path) = rxe {
        fs::read(path).with_context(|| format!("cannot read {}", path.display()))?.hash(&mut hasher);
    }
    let dir = kernel.build_dir("initramfs");
    let target = dir.join(format!("{:016x}.cpio", hasher.finish()));
    if target.is_file() {
        return Ok(target);
    }
    let _lock = lock::exclusive(&dir.with_extension("lock"))?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let bytes = pack(&busybox, &root, &rdma)?;
    let partial = target.with_extension("partial");
    lock::remove(&partial)?;
    fs::write(&partial, bytes).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, &target)?;
    Ok(target)
}

fn pack(busybox: &[u8], root: &[Module], rdma: &[Module]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "modules"] {
        archive.directory(dir);
    }
    archive.device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, busybox);
    for applet in APPLETS {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("main.sh", 0o644, MAIN.as_bytes());
    for (list, modules) in [("root", root), ("rdma", rdma)] {
        let names: String = modules.iter().map(|m| format!("{}\n", m.name)).collect();
        archive.file(&format!("modules/{list}"), 0o644, names.as_bytes());
        for module in modules {
            let content =
                fs::read(&module.path).with_context(|| format!("cannot read {}", module.path.display()))?;
            archive.file(&format!("modules/{}.ko", module.name), 0o644, &content);
        }
    }
    Ok(archive.finish())
}

/// Finds a static busybox.
fn busybox() -> Result<PathBuf> {
    let path =
        process::find("busybox").context("busybox is not installed; install the package busybox-static")?;
    let head = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // A dynamic executable names its loader in the first page.
    let page = &head[..head.len().min(4096)];
    if page.windows(7).any(|w| w == b"/ld-lin") {
        bail!(
            "{} is dynamically linked and the guest needs a static one; install the package busybox-static",
            path.display()
        );
    }
    Ok(path)
}
