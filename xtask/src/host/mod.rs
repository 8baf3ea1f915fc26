//! What the host must be and have: its architecture, its packages, room on the disk.
//!
//! On Debian and its derivatives, root installs packages with apt; other users get
//! the command to run. Other systems get a list of the missing programs and the
//! names of their Debian packages. What cannot work is said before anything is installed.

mod machine;
mod packages;

pub use machine::{KEYRING, MIRROR, Machine, use_mirror};
pub use packages::Need;

use crate::size::Size;
use crate::{lock, process, project, ui};
use anyhow::{Context, Result, bail};
use packages::Package;
use rustix::process::geteuid;
use std::path::Path;
use std::process::{Command, Stdio};

/// dpkg's data. Debian and its derivatives have it; a machine with an extra apt does not.
const DPKG: &str = "/var/lib/dpkg/info";

/// What the first start of the demo writes to the build folder: 1.5 GiB, and more on the way. The tests take 5 GiB.
const ROOM: Size = Size::gib(3);

/// Checks the machine and installs the missing packages.
pub fn ensure(needs: &[Need]) -> Result<()> {
    if needs.contains(&Need::Guest) {
        let machine = Machine::this();
        machine.check()?;
        if !project::target().join("kernel").exists() {
            room(project::target(), ROOM)?;
        }
    }
    let mut wanted = packages::of(needs);
    if needs.contains(&Need::Guest) && Machine::this().lacks_keyring() {
        wanted.push(("debian-archive-keyring", None));
    }
    if process::find("apt-get").is_none() || !Path::new(DPKG).is_dir() {
        if needs.contains(&Need::Guest) && Machine::this().lacks_keyring() {
            bail!(
                "{KEYRING} is missing, with which apt checks the mirror; install this system's package with \
                 Debian's keys, such as debian-archive-keyring or debian-keyring"
            );
        }
        return without_apt(&wanted);
    }
    let missing = missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !geteuid().is_root() {
        bail!(
            "{} packages are missing; install them with\n\n    \
             sudo apt-get install --no-install-recommends {}\n\nand run this again",
            missing.len(),
            missing.join(" ")
        );
    }
    install(&wanted)
}

/// Installs a package if this user can and the machine's apt has it. Returns whether it is there.
pub fn offer(package: &str) -> Result<bool> {
    if process::find("apt-get").is_none() || !Path::new(DPKG).is_dir() || !geteuid().is_root() {
        return Ok(false);
    }
    let offered = Command::new("apt-cache").args(["show", "--no-all-versions", package]).output();
    if !offered.is_ok_and(|out| out.status.success() && !out.stdout.is_empty()) {
        return Ok(false);
    }
    install(&[(package, None)])?;
    Ok(true)
}

/// The packages that dpkg does not list as installed.
fn missing<'a>(wanted: &[Package<'a>]) -> Result<Vec<&'a str>> {
    // dpkg-query fails if it does not know one of the names, so ignore its status.
    let out = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(wanted.iter().map(|(name, _)| name))
        .stderr(Stdio::null())
        .output()?;
    let known = String::from_utf8_lossy(&out.stdout);
    let installed: Vec<&str> = known.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(wanted.iter().map(|(name, _)| *name).filter(|name| !installed.contains(name)).collect())
}

fn install(wanted: &[Package]) -> Result<()> {
    // apt waits for another apt when it installs, but not when it updates its lists.
    let _lock = lock::folder(Path::new("/var/lib/dpkg"))?;
    let missing = missing(wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let step = ui::Step::start("Installing", &missing.join(" "));
    // cargo downloads meanwhile; the build repeats what fails.
    let crates = project::cargo().args(["fetch", "--quiet", "--locked"]).stderr(Stdio::null()).spawn();
    // The package lists may be old, or missing in a container.
    process::output(apt(&[]).arg("update"))
        .context("cannot fetch the package lists; check the network, and http_proxy if there is a proxy")?;
    process::output(&mut install_command(&[], &missing)).map_err(explained)?;
    if let Ok(mut crates) = crates {
        let _ = crates.wait();
    }
    step.done("Installed", &format!("{} packages", missing.len()));
    Ok(())
}

fn apt(options: &[&str]) -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    // Wait if another apt is running.
    apt.args(["-q", "-o", "DPkg::Lock::Timeout=300"]).args(options);
    apt
}

/// The command that installs packages. It removes none.
pub(crate) fn install_command(options: &[&str], packages: &[&str]) -> Command {
    let mut install = apt(options);
    install.args(["install", "-y", "--no-install-recommends", "--no-remove"]).args(packages);
    install
}

/// An error of apt-get, with its cause in one sentence.
pub(crate) fn explained(error: anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    let reason = if text.contains("remove is disabled") {
        "the packages conflict with installed ones; nothing was installed or removed. Remove those yourself, or run \
         it in a container (Containerfile)"
    } else if text.contains("Unable to fetch") || text.contains("Failed to fetch") {
        "apt could not download all packages; check the network, and run this again"
    } else if text.contains("enough free space") || text.contains("No space left") {
        "the disk is full; make room, and run this again"
    } else {
        "apt did not install all packages"
    };
    error.context(reason)
}

fn without_apt(wanted: &[Package]) -> Result<()> {
    let absent = |&&(_, program): &&Package| program.is_none_or(|p| process::find(p).is_none());
    let missing: Vec<_> = wanted.iter().filter(absent).collect();
    if missing.iter().all(|(_, program)| program.is_none()) {
        return Ok(());
    }
    let tools: Vec<&str> = missing.iter().filter_map(|(_, program)| *program).collect();
    let packages: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    bail!(
        "this machine is not managed by apt, so install the missing programs and headers yourself.\n\
         Programs not found: {}.\nDebian packages that contain them and the headers: {}.",
        tools.join(", "),
        packages.join(", ")
    );
}

/// Fails if the file system of `folder` has less room than `needed`.
pub fn room(folder: &Path, needed: Size) -> Result<()> {
    let there = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let system = rustix::fs::statvfs(there).with_context(|| format!("cannot look at {}", there.display()))?;
    let free = Size(system.f_bavail * system.f_frsize);
    if free < needed {
        bail!(
            "{} has {} MiB of free space, and {} MiB are needed; make room, or name another folder with \
             CARGO_TARGET_DIR",
            there.display(),
            free.0 >> 20,
            needed.0 >> 20
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_before_it_is_filled() {
        // The file system of /proc has no blocks at all.
        let message = room(Path::new("/proc/self"), Size::mib(1)).unwrap_err().to_string();
        assert!(message.contains("/proc/self has 0 MiB of free space, and 1 MiB are needed"), "{message}");
        assert!(message.contains("CARGO_TARGET_DIR"), "{message}");
        room(&std::env::temp_dir().join("not/yet/there"), Size(1)).unwrap();
    }

    #[test]
    fn a_machine_without_apt_is_told_what_to_install() {
        let wanted = [("make", Some("sh")), ("no-such-package", Some("no-such-program")), ("libx-dev", None)];
        let message = without_apt(&wanted).unwrap_err().to_string();
        assert!(message.contains("Programs not found: no-such-program."), "{message}");
        assert!(message.contains("headers: no-such-package, libx-dev."), "{message}");
        without_apt(&wanted[..1]).unwrap();
    }
}
