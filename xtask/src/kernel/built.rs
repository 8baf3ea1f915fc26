//! Builds modules for the guest's kernel with the `build.sh` in a folder of
//! `kernel/`, and rebuilds them when a file in that folder changes.

use super::{Unpacked, compiler};
use crate::lock::{self, Staging};
use crate::{process, project, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The module `name` from `kernel/FOLDER`. Builds it first if needed: runs
/// `build.sh` with `arguments` and the output folder.
pub fn module(kernel: &Unpacked, folder: &str, name: &str, arguments: &[PathBuf]) -> Result<PathBuf> {
    let parts = project::root().join("kernel").join(folder);
    let script = parts.join("build.sh");
    if !script.is_file() {
        bail!("{} does not exist; is the checkout complete?", script.display());
    }
    let key = key(kernel, &parts)?;
    let target = kernel.build_dir(folder);
    let module = target.join(format!("{name}.ko"));
    let current = || fs::read_to_string(target.join("key")).is_ok_and(|k| k == key) && module.is_file();
    if current() {
        return Ok(module);
    }
    let _lock = lock::exclusive(&target.with_extension("lock"))?;
    if current() {
        return Ok(module);
    }
    let step =
        ui::Step::start("Building", &format!("{name} of kernel/{folder} for Linux {}", kernel.release));
    let staging = Staging::beside(&target)?;
    let output = staging.path();
    let compiler = compiler::choose(&kernel.headers())?;
    let mut build = Command::new("sh");
    build
        .arg(&script)
        .args(arguments)
        .arg(output)
        .args(&compiler.make_arguments)
        .env("CC", &compiler.command);
    if let Err(error) = process::output(&mut build) {
        // The message names make's log in it.
        staging.keep();
        return Err(error.context(format!("cannot build {name}.ko for Linux {}", kernel.release)));
    }
    fs::write(output.join("key"), key)?;
    staging.finish(&target)?;
    step.done("Built", name);
    Ok(module)
}

/// A key that changes when the module must be rebuilt.
fn key(kernel: &Unpacked, parts: &Path) -> Result<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(parts)
        .with_context(|| format!("cannot read {}", parts.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        // Documentation does not change the module.
        .filter(|path| path.is_file() && path.extension().is_none_or(|e| e != "md"))
        .collect();
    files.push(parts.with_file_name("common.sh"));
    files.sort();
    let mut hasher = DefaultHasher::new();
    kernel.release.hash(&mut hasher);
    for file in files {
        file.file_name().hash(&mut hasher);
        fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?.hash(&mut hasher);
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}
