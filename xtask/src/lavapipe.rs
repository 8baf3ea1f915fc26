//! Mesa's lavapipe for guests: a Vulkan device that needs no GPU and exports real dma-bufs.
//!
//! xtask fetches it once, with the loader and all libraries that both need, into a folder in `target/`
//! and installs nothing. Debian 12's Mesa cannot export dma-bufs, so the backports are preferred.

use crate::kernel::Apt;
use crate::lock::{self, Staging};
use crate::{process, project, ui};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGES: &[&str] = &["mesa-vulkan-drivers", "libvulkan1"];

/// Not fetched: programs must use the C library of their own dynamic linker.
const OF_THE_MACHINE: &[&str] = &["libc6"];

/// Version of the folder's contents. Change it to fetch the folder again.
const RECIPE: &str = "1\n";

/// The environment variables that make a program use lavapipe. Fetches it first if needed.
pub fn environment() -> Result<Vec<(String, String)>> {
    let root = unpacked()?;
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    // The file name contains the architecture in some versions.
    let manifests = fs::read_dir(root.join("usr/share/vulkan/icd.d"))?;
    let mut manifests = manifests.filter_map(|entry| Some(entry.ok()?.path()));
    let manifest = manifests.find(|path| path.to_string_lossy().contains("lvp_icd"));
    let manifest = manifest
        .context("mesa-vulkan-drivers has no lavapipe manifest (lvp_icd) in usr/share/vulkan/icd.d")?;
    let variable = |name: &str, value: &Path| (name.to_string(), value.to_string_lossy().into_owned());
    Ok(vec![
        variable("LD_LIBRARY_PATH", &libraries),
        variable("VK_DRIVER_FILES", &manifest),
        variable("LP_NUM_THREADS", Path::new("2")),
        variable("MESA_SHADER_CACHE_DISABLE", Path::new("1")),
        // The guest sees the layers of the host, which need other libraries.
        variable("VK_LOADER_LAYERS_DISABLE", Path::new("~all~")),
    ])
}

fn unpacked() -> Result<PathBuf> {
    let home = project::target().join("lavapipe");
    let current = || fs::read_to_string(home.join("recipe")).is_ok_and(|recipe| recipe == RECIPE);
    if current() {
        return Ok(home);
    }
    let _lock = lock::exclusive(&project::target().join("lavapipe.lock"))?;
    // Another xtask may have fetched it while this one waited.
    if current() {
        return Ok(home);
    }
    let step = ui::Step::start("Fetching", "Mesa's lavapipe (a Vulkan driver for CPUs)");
    let apt = Apt::shared()?;
    let packages = apt.closure(PACKAGES)?;
    let staging = Staging::beside(&home)?;
    let debs = staging.path().join("debs");
    fs::create_dir(&debs).with_context(|| format!("cannot create {}", debs.display()))?;
    let name = |package: &str| package.split('=').next().unwrap_or_default().to_string();
    let wanted: Vec<&str> = packages
        .iter()
        .map(String::as_str)
        .filter(|package| !OF_THE_MACHINE.contains(&name(package).as_str()))
        .collect();
    apt.download(wanted.iter().copied(), &debs)?;
    for entry in fs::read_dir(&debs)? {
        process::output(Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(staging.path()))?;
    }
    // Some libraries are in /lib, which is a link to /usr/lib on an installed system.
    let (old, new) = (staging.path().join("lib"), staging.path().join("usr/lib"));
    if old.is_dir() {
        process::output(Command::new("cp").arg("-a").arg(old.join(".")).arg(new))?;
        lock::remove(&old)?;
    }
    lock::remove(&debs)?;
    lock::remove(&staging.path().join("usr/share/doc"))?;
    fs::write(staging.path().join("recipe"), RECIPE)?;
    staging.finish(&home)?;
    let mesa = wanted.iter().find(|package| name(package) == PACKAGES[0]).unwrap_or(&"");
    step.done("Fetched", &format!("{mesa} and its {} dependencies", wanted.len() - 1));
    Ok(home)
}
