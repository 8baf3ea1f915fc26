//! A kernel that checks itself, built from Debian's source with a configuration
//! of this repository.

use super::{Kernel, read};
use crate::{lock, process, project, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What stays of the source: enough to build modules, and the source of rxe.
const KEPT: &[&str] =
    &["Makefile", "Kbuild", "Module.symvers", ".config", "arch", "include", "scripts", "tools"];
const RXE: &str = "drivers/infiniband/sw/rxe";

/// Lines of the source that report what is no fault of the modules, with their replacement and their number.
///
/// DMA_API_DEBUG counts a page that is mapped twice as a fault, but several importers may map a dma-buf. And udmabuf
/// maps for the direction of the first DMA_BUF_IOCTL_SYNC, and then syncs for any. DMA_API_DEBUG stops after the
/// first report, so these would hide all others.
const SILENCED: &[(&str, &str, &str, usize)] = &[
    ("kernel/dma/debug.c", "if (entry->direction == DMA_TO_DEVICE)", "if (true)", 2),
    (
        "drivers/dma-buf/udmabuf.c",
        "get_sg_table(dev, buf, direction)",
        "get_sg_table(dev, buf, DMA_BIDIRECTIONAL)",
        1,
    ),
    ("drivers/dma-buf/udmabuf.c", "ubuf->sg_dir = direction;", "ubuf->sg_dir = DMA_BIDIRECTIONAL;", 1),
];

/// The configuration of this kernel, if it is built here.
pub fn configuration(kernel: &Kernel) -> Option<PathBuf> {
    Some(project::root().join("kernel").join(kernel.configuration?))
}

/// Identifies the kernel that this configuration gives.
pub fn recipe(kernel: &Kernel, configuration: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    (fs::read(configuration).unwrap_or_default(), SILENCED).hash(&mut hasher);
    format!("2 {} {:016x}\n", kernel.line, hasher.finish())
}

/// Builds the kernel in `dir`, from the source in its folder `source`. Returns the release, as printed by
/// `uname -r`.
pub fn build(configuration: &Path, dir: &Path) -> Result<String> {
    let source = dir.join("source");
    let step = ui::Step::start("Building", "the kernel, which takes a quarter of an hour on two cores");
    for &(file, line, replacement, times) in SILENCED {
        silence(&source.join(file), line, replacement, times)?;
    }
    make(&source, &["tinyconfig"])?;
    process::output(
        Command::new("scripts/kconfig/merge_config.sh")
            .args(["-m", ".config"])
            .arg(configuration)
            .current_dir(&source),
    )?;
    make(&source, &["olddefconfig"])?;
    compare(&read(configuration)?, &read(&source.join(".config"))?)?;
    make(&source, &["vmlinux", "modules"])?;
    let root = format!("INSTALL_MOD_PATH={}", dir.join("root").display());
    make(&source, &["modules_install", "INSTALL_MOD_STRIP=1", &root])?;
    let release = make(&source, &["-s", "kernelrelease"])?.trim().to_string();
    fs::rename(source.join("vmlinux"), dir.join("vmlinux")).context("the build left no vmlinux")?;
    prune(&source, dir)?;
    step.done("Built", &format!("Linux {release}"));
    Ok(release)
}

fn make(source: &Path, words: &[&str]) -> Result<String> {
    let jobs = std::thread::available_parallelism().map_or(1, |n| n.get());
    process::output(
        Command::new("make").arg("CC=gcc").arg(format!("-j{jobs}")).args(words).current_dir(source),
    )
}

fn silence(file: &Path, line: &str, replacement: &str, times: usize) -> Result<()> {
    let text = read(file)?;
    let found = text.matches(line).count();
    if found != times {
        bail!(
            "{} has `{line}` {found} times, expected {times}; adapt xtask/src/kernel/checking.rs",
            file.display()
        );
    }
    fs::write(file, text.replace(line, replacement))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// An option that the kernel does not have, or whose dependencies are missing, is dropped without a message.
fn compare(wanted: &str, made: &str) -> Result<()> {
    let option = |line: &&str| line.starts_with("CONFIG_") || line.starts_with("# CONFIG_");
    let missing: Vec<&str> =
        wanted.lines().filter(option).filter(|line| !made.lines().any(|l| l == *line)).collect();
    if !missing.is_empty() {
        bail!("the kernel's configuration did not take {}", missing.join(", "));
    }
    Ok(())
}

/// Removes most of the source, 2 GB with its objects.
fn prune(source: &Path, dir: &Path) -> Result<()> {
    let whole = dir.join("whole");
    fs::rename(source, &whole).context("cannot move the source")?;
    fs::create_dir_all(source.join(RXE)).context("cannot make the source's folder")?;
    for name in KEPT.iter().chain([&RXE]) {
        let target = source.join(name);
        if target.is_dir() {
            fs::remove_dir(&target)?;
        }
        fs::rename(whole.join(name), &target).with_context(|| format!("the source has no {name}"))?;
    }
    lock::remove(&whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_option_is_named() {
        let made = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_AB=m\n";
        assert!(compare("# words\nCONFIG_A=y\n# CONFIG_B is not set\n", made).is_ok());
        let error = compare("CONFIG_A=m\nCONFIG_AB=m\nCONFIG_C=y\n", made).unwrap_err().to_string();
        assert!(error.ends_with("did not take CONFIG_A=m, CONFIG_C=y"), "{error}");
    }
}
