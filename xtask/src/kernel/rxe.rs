//! The rdma_rxe module that the guest loads: Debian's own, or ours with
//! dma-buf import, built by `kernel/rxe/build.sh` when its files change.

use super::Unpacked;
use crate::lock::{self, Staging};
use crate::{process, project, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which rdma_rxe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Rxe {
    /// Debian's own: it cannot import dma-bufs.
    Stock,
    /// Built from Debian's source and `kernel/rxe`: it can.
    Dmabuf,
}

impl Rxe {
    pub fn name(self) -> &'static str {
        match self {
            Rxe::Stock => "stock",
            Rxe::Dmabuf => "dmabuf",
        }
    }
}

/// The module with dma-buf import for this kernel; built first if need be.
pub fn dmabuf_module(kernel: &Unpacked) -> Result<PathBuf> {
    let parts = project::root().join("kernel/rxe");
    let script = parts.join("build.sh");
    if !script.is_file() {
        bail!("{} is missing; `--rxe stock` works without it", script.display());
    }
    let key = key(kernel, &parts)?;
    let target = kernel.build_dir("rxe");
    let module = target.join("rdma_rxe.ko");
    let current = || fs::read_to_string(target.join("key")).is_ok_and(|k| k == key) && module.is_file();
    if current() {
        return Ok(module);
    }
    let _lock = lock::exclusive(&target.with_extension("lock"))?;
    if current() {
        return Ok(module);
    }
    let step =
        ui::Step::start("Building", &format!("rdma_rxe with dma-buf import for Linux {}", kernel.release));
    let staging = Staging::beside(&target)?;
    let output = staging.path();
    let log = process::output(
        Command::new("sh").arg(&script).arg(kernel.source()).arg(kernel.headers()).arg(output),
    )
    .context("the module does not build")?;
    fs::write(output.join("build.log"), log)?;
    fs::write(output.join("key"), key)?;
    staging.finish(&target)?;
    step.done("Built", "rdma_rxe");
    Ok(module)
}

/// Changes when the module has to be built again.
fn key(kernel: &Unpacked, parts: &Path) -> Result<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(parts)
        .with_context(|| format!("cannot read {}", parts.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        // What people read does not change the module.
        .filter(|path| path.is_file() && path.extension().is_none_or(|e| e != "md"))
        .collect();
    files.sort();
    let mut hasher = DefaultHasher::new();
    kernel.release.hash(&mut hasher);
    for file in files {
        file.file_name().hash(&mut hasher);
        fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?.hash(&mut hasher);
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}
