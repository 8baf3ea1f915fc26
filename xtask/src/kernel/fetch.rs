//! Fetches a kernel once.
//!
//! Each version has a folder, which appears only when it is complete. If it
//! exists, xtask does not use the network.

use super::lines::{Kernel, LINUX_6_12, Version, filled};
use super::resolve::{Choice, choose, is_later};
use super::slim::slim;
use super::{Unpacked, apt::Apt, checking, home, image, tools, vmlinuz};
use crate::host;
use crate::lock::{self, Staging};
use crate::size::Size;
use crate::{process, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a kernel takes while it is unpacked, and while one is built.
const ROOM: Size = Size::mib(900);
const ROOM_TO_BUILD: Size = Size::gib(6);

/// The unpacked kernel. Fetches it first if needed.
pub fn unpacked(kernel: &'static Kernel) -> Result<Unpacked> {
    if kernel.version != Version::Newest
        && let Some(found) = find(kernel)?
    {
        return Ok(found);
    }
    let home = home();
    let _lock = lock::exclusive(&home.join("lock"))?;
    // Another xtask may have fetched it while this one waited.
    if kernel.version != Version::Newest
        && let Some(found) = find(kernel)?
    {
        return Ok(found);
    }
    if let Some(configuration) = checking::configuration(kernel) {
        host::room(&home, ROOM_TO_BUILD)?;
        from_source(kernel, &configuration)?;
        return find(kernel)?.context("the built kernel is missing; remove target/kernel and try again");
    }
    host::room(&home, ROOM)?;
    let step =
        ui::Step::start("Fetching", &format!("Debian's Linux {} with headers and source", kernel.line));
    let apt = Apt::of(kernel)?;
    let choice = choose(kernel, &apt.offers()?)?;
    let target = home.join(format!("linux-{}-amd64", choice.abi));
    let present =
        |dir: &Path| fs::read_to_string(dir.join("recipe")).is_ok_and(|text| text == recipe(kernel));
    if !present(&target) {
        let staging = Staging::beside(&target)?;
        unpack(kernel, &choice, &apt, staging.path())?;
        staging.finish(&target)?;
    }
    if kernel.version == Version::Tested && !Kernel::is(&choice.abi, kernel.tested) {
        fs::write(target.join(INSTEAD), kernel.tested).context("cannot write beside the kernel")?;
        let tested = kernel.tested;
        ui::warn(&format!("the mirror has no Linux {tested}, the tested one; taking {}", choice.abi));
    }
    step.done("Fetched", &format!("Linux {} ({}) from {}", choice.abi, choice.version, choice.suite));
    let release = format!("{}-amd64", choice.abi);
    Ok(Unpacked { kernel, release, dir: target })
}

/// The file that names the tested version which the mirror did not have.
const INSTEAD: &str = "instead-of";

/// Builds the kernel from the source of the version that [`LINUX_6_12`] has.
fn from_source(kernel: &Kernel, configuration: &Path) -> Result<()> {
    let step = ui::Step::start("Fetching", "the source of Debian's Linux 6.12");
    let home = home();
    let apt = Apt::of(kernel)?;
    let choice = choose(&LINUX_6_12, &apt.offers()?)?;
    let staging = Staging::beside(&home.join("linux-debug"))?;
    let (debs, source) = (staging.path().join("debs"), staging.path().join("source"));
    for path in [&debs, &source] {
        fs::create_dir(path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    let package = filled("linux-source-{series}", &choice.abi);
    apt.download([format!("{package}={}", choice.version).as_str()], &debs)?;
    extract_source(kernel, &choice.abi, &deb_of(&debs, &package)?, &source)?;
    lock::remove(&debs)?;
    step.done("Fetched", &format!("{package} ({}) from {}", choice.version, choice.suite));
    let release = checking::build(configuration, staging.path())?;
    fs::write(staging.path().join("recipe"), recipe(kernel)).context("cannot write the recipe")?;
    staging.finish(&home.join(format!("linux-{release}")))
}

/// The kernel, if this version of xtask has unpacked it.
fn find(kernel: &'static Kernel) -> Result<Option<Unpacked>> {
    find_in(&home(), kernel)
}

fn find_in(home: &Path, kernel: &'static Kernel) -> Result<Option<Unpacked>> {
    let Ok(entries) = fs::read_dir(home) else { return Ok(None) };
    let mut found: Option<Unpacked> = None;
    for entry in entries {
        let dir = entry?.path();
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(release) = name.strip_prefix("linux-").filter(|name| !Staging::is_partial(name)) else {
            continue;
        };
        let abi = release.trim_end_matches("-amd64");
        let wanted = match &kernel.version {
            _ if kernel.configuration.is_some() => true,
            Version::Newest => true,
            Version::Exact(version) => Kernel::is(abi, version),
            Version::Tested => {
                Kernel::is(abi, kernel.tested)
                    || fs::read_to_string(dir.join(INSTEAD)).is_ok_and(|tested| tested == kernel.tested)
            }
        };
        if !wanted || fs::read_to_string(dir.join("recipe")).ok() != Some(recipe(kernel)) {
            continue;
        }
        if found.as_ref().map_or(Ok(true), |other| is_later(release, &other.release))? {
            found = Some(Unpacked { kernel, release: release.to_string(), dir });
        }
    }
    Ok(found)
}

/// Identifies the folder's contents. Change it to fetch the kernel again.
fn recipe(kernel: &Kernel) -> String {
    if let Some(configuration) = checking::configuration(kernel) {
        return checking::recipe(kernel, &configuration);
    }
    let release = super::apt::release_of(kernel);
    let folders = kernel.source.folders.join(" ");
    format!("4 {} {release} {folders} {}\n", kernel.line, kernel.test_modules.join(" "))
}

fn unpack(kernel: &Kernel, choice: &Choice, apt: &Apt, dir: &Path) -> Result<()> {
    let (debs, root, source) = (dir.join("debs"), dir.join("root"), dir.join("source"));
    for path in [&debs, &root, &source] {
        fs::create_dir(path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    let versioned: Vec<_> = choice.packages.iter().map(|name| format!("{name}={}", choice.version)).collect();
    apt.download(versioned.iter().map(String::as_str), &debs)?;
    for package in &choice.packages {
        let deb = deb_of(&debs, package)?;
        if package.starts_with("linux-source") {
            extract_source(kernel, &choice.abi, &deb, &source)?;
        } else {
            process::output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
        }
    }
    let release = format!("{}-amd64", choice.abi);
    relocate_headers(&root, &release, &choice.abi)?;
    let kbuild = root.join("usr/lib").join(format!("linux-kbuild-{}", choice.abi));
    if tools::foreign(&kbuild)? {
        // The tools need a newer C library than this machine has.
        let libraries = dir.join("libraries");
        fs::create_dir_all(&libraries).with_context(|| format!("cannot create {}", libraries.display()))?;
        let needed = apt.closure(&[format!("linux-kbuild-{}={}", choice.abi, choice.version).as_str()])?;
        let needed: Vec<&str> =
            needed.iter().map(String::as_str).filter(|name| !name.starts_with("linux-")).collect();
        let home = dir.join("library-debs");
        fs::create_dir(&home).with_context(|| format!("cannot create {}", home.display()))?;
        apt.download(needed.iter().copied(), &home)?;
        for deb in fs::read_dir(&home)? {
            process::output(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(&libraries))?;
        }
        lock::remove(&home)?;
        tools::adapt(&kbuild, &libraries)?;
    }
    // This machine's depmod and modprobe may look in the other place than the packages use.
    if !root.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", root.join("lib")).context("cannot link lib")?;
    }
    if !root.join("usr/lib/modules").exists() {
        std::os::unix::fs::symlink("../../lib/modules", root.join("usr/lib/modules"))
            .context("cannot link usr/lib/modules")?;
    }
    let depmod = process::find("depmod").context("depmod is not installed; install the package kmod")?;
    let depmod = || process::output(Command::new(&depmod).arg("-b").arg(&root).arg(&release));
    depmod()?;
    slim(kernel, &root, &release)?;
    depmod()?;
    let wrapped = vmlinuz(dir, &release);
    let wrapped = fs::read(&wrapped).with_context(|| format!("cannot read {}", wrapped.display()))?;
    match image::extract(&wrapped) {
        Ok(plain) => fs::write(dir.join("vmlinux"), plain).context("cannot write vmlinux")?,
        Err(reason) => {
            ui::note("Note", &format!("the guest boots slower, from the compressed kernel image: {reason}"))
        }
    }
    lock::remove(&debs)?;
    fs::write(dir.join("recipe"), recipe(kernel)).context("cannot write the recipe")
}

/// The file that starts with `PACKAGE_`.
fn deb_of(debs: &Path, package: &str) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    for entry in fs::read_dir(debs)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)) {
            return Ok(path);
        }
    }
    bail!("apt-get download succeeded, but {} has no {package}", debs.display());
}

/// Extracts a few folders from the archive in a package without writing the
/// whole 1.4 GB source to disk.
fn extract_source(kernel: &Kernel, abi: &str, deb: &Path, to: &Path) -> Result<()> {
    let pipe = |command: &mut Command, stdin: Stdio| {
        let text = process::shown(command);
        let child = command.stdin(stdin).stdout(Stdio::piped()).spawn();
        child.with_context(|| format!("cannot run `{text}`"))
    };
    let mut package = pipe(Command::new("dpkg-deb").arg("--fsys-tarfile").arg(deb), Stdio::null())?;
    let stream = package.stdout.take().context("no output")?;
    let path = filled(kernel.source.archive, abi);
    let member = format!("./{path}");
    let mut archive = pipe(Command::new("tar").arg("-xO").arg(member), stream.into())?;
    let stream = archive.stdout.take().context("no output")?;
    let top = Path::new(&path).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let top = top.trim_end_matches(".tar.xz");
    let folders = kernel.source.folders.iter().map(|folder| format!("{top}/{folder}"));
    let out = Command::new("tar")
        .args(["-xJ", "--strip-components=1", "-C"])
        .arg(to)
        .args(folders)
        .stdin(stream)
        .output()
        .context("cannot run tar")?;
    let upstream = package.wait()?.success() & archive.wait()?.success();
    if !out.status.success() || !upstream {
        bail!("cannot unpack {}:\n{}", deb.display(), String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

/// Makes the installed paths in the headers' Makefile relative to the file, so
/// that the headers work in any folder.
fn relocate_headers(root: &Path, release: &str, abi: &str) -> Result<()> {
    let makefile = root.join(format!("usr/src/linux-headers-{release}/Makefile"));
    let common = format!("linux-headers-{abi}-common/Makefile");
    let old = super::read(&makefile)?;
    let included = format!("include /usr/src/{common}");
    let here = "$(dir $(realpath $(lastword $(MAKEFILE_LIST))))";
    let new = old.replace(&included, &format!("include {here}../{common}")).replace(
        &format!("KBUILD_OUTPUT=/usr/src/linux-headers-{release}"),
        &format!("KBUILD_OUTPUT:={here}"),
    );
    if !old.contains(&included) {
        bail!("{} has no line `{included}`; it contains:\n{old}", makefile.display());
    }
    fs::write(&makefile, new).with_context(|| format!("cannot write {}", makefile.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An interrupted run may have written everything but the final name.
    #[test]
    fn a_folder_that_an_interrupted_run_left_is_no_kernel() {
        let home = lock::new_folder(&std::env::temp_dir(), |unique| format!("xtask-find-{unique}")).unwrap();
        let plant = |name: String| {
            fs::create_dir(home.join(&name)).unwrap();
            fs::write(home.join(name).join("recipe"), recipe(&LINUX_6_12)).unwrap();
        };
        let release = format!("{}+deb12-amd64", LINUX_6_12.tested);
        plant(format!("linux-{release}.2181140b.partial"));
        assert!(find_in(&home, &LINUX_6_12).unwrap().is_none());
        plant(format!("linux-{release}"));
        assert_eq!(find_in(&home, &LINUX_6_12).unwrap().unwrap().release, release);
        lock::remove(&home).unwrap();
    }
}
