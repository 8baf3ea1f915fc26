//! Fetches a kernel once.
//!
//! Each version has a folder, which appears only when it is complete. If it
//! exists, xtask does not use the network.

use super::lines::{Kernel, LINUX_6_12, filled};
use super::resolve::{Choice, compare_versions, newest};
use super::slim::slim;
use super::{Unpacked, apt::Apt, checking, home, image, modules_tree, tools, vmlinuz};
use crate::lock::{self, Staging};
use crate::{process, ui};
use anyhow::{Context, Result, bail};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The mirror works, but has no such kernel.
#[derive(Debug)]
pub struct NotOffered(&'static str);

impl fmt::Display for NotOffered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no suite of this machine's Debian mirror has all packages of Linux {}", self.0)
    }
}

impl std::error::Error for NotOffered {}

/// The unpacked kernel. Fetches it first if needed.
pub fn unpacked(kernel: &'static Kernel) -> Result<Unpacked> {
    if let Some(found) = find(kernel)? {
        return Ok(found);
    }
    let home = home();
    let _lock = lock::exclusive(&home.join("lock"))?;
    // Another xtask may have fetched it while this one waited.
    if let Some(found) = find(kernel)? {
        return Ok(found);
    }
    if let Some(configuration) = checking::configuration(kernel) {
        from_source(kernel, &configuration)?;
        return find(kernel)?.context("the built kernel is missing; remove target/kernel and try again");
    }
    let step =
        ui::Step::start("Fetching", &format!("Debian's Linux {} with headers and source", kernel.line));
    // Each release has its own lists, so that a package name belongs to one release.
    let apt = Apt::update(&home.join(kernel.release.unwrap_or("apt")), kernel.release)?;
    let choice = newest(kernel, &apt.offers()?).ok_or(NotOffered(kernel.line))?;
    let target = home.join(format!("linux-{}-amd64", choice.abi));
    let staging = Staging::beside(&target)?;
    unpack(kernel, &choice, &apt, staging.path())?;
    staging.finish(&target)?;
    step.done("Fetched", &format!("Linux {} ({}) from {}", choice.abi, choice.version, choice.suite));
    find(kernel)?.context("the fetched kernel is missing; remove target/kernel and try again")
}

/// Builds the kernel from the source of the version that [`LINUX_6_12`] has.
fn from_source(kernel: &Kernel, configuration: &Path) -> Result<()> {
    let step = ui::Step::start("Fetching", "the source of Debian's Linux 6.12");
    let home = home();
    let apt = Apt::update(&home.join("apt"), None)?;
    let choice = newest(&LINUX_6_12, &apt.offers()?).ok_or(NotOffered(LINUX_6_12.line))?;
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

/// The newest kernel in the folder that this version of xtask has unpacked.
fn find(kernel: &'static Kernel) -> Result<Option<Unpacked>> {
    let Ok(entries) = fs::read_dir(home()) else { return Ok(None) };
    let mut found: Option<Unpacked> = None;
    for entry in entries {
        let dir = entry?.path();
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(release) = name.strip_prefix("linux-") else { continue };
        if fs::read_to_string(dir.join("recipe")).ok() != Some(recipe(kernel)) {
            continue;
        }
        if found.as_ref().is_none_or(|f| compare_versions(&f.release, release).is_lt()) {
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
    format!("3 {} {} {}\n", kernel.line, kernel.source.folders.join(" "), kernel.test_modules.join(" "))
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
    if !kernel.libraries.is_empty() {
        let libraries = dir.join("libraries");
        apt.download(kernel.libraries.iter().copied(), &debs)?;
        for package in kernel.libraries {
            process::output(Command::new("dpkg-deb").arg("-x").arg(deb_of(&debs, package)?).arg(&libraries))?;
        }
        tools::adapt(&root.join("usr/lib").join(format!("linux-kbuild-{}", choice.abi)), &libraries)?;
    }
    if !root.join("lib").exists() {
        // This machine's depmod looks in lib, also for a release that has everything in usr.
        std::os::unix::fs::symlink("usr/lib", root.join("lib")).context("cannot link lib")?;
    }
    let depmod = process::find("depmod").context("depmod is not installed; install the package kmod")?;
    let depmod = || process::output(Command::new(&depmod).arg("-b").arg(&root).arg(&release));
    depmod()?;
    slim(kernel, &modules_tree(&root, &release))?;
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
