//! A private apt folder.
//!
//! It reads the machine's configuration and never writes it. It has its own state,
//! cache and lists, runs none of the machine's hooks, and needs no root.

use super::lines::Kernel;
use super::read;
use super::resolve::{Offer, parse_packages};
use super::sources::{self, Archive};
use crate::host::{self, Machine};
use crate::{lock, process};
use anyhow::{Context, Result, bail};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A private apt.
pub struct Apt {
    dir: PathBuf,
    release: String,
}

/// The Debian release that has this kernel for this machine.
pub fn release_of(kernel: &Kernel) -> String {
    kernel.release.map_or_else(|| Machine::this().release().to_string(), str::to_string)
}

impl Apt {
    /// The apt of the release that has this kernel, with new package lists. The caller holds the lock.
    pub fn of(kernel: &Kernel) -> Result<Apt> {
        Apt::at(&release_of(kernel))
    }

    /// The same for this machine's release.
    pub fn shared() -> Result<Apt> {
        let _lock = lock::exclusive(&super::home().join("lock"))?;
        Apt::at(Machine::this().release())
    }

    fn at(release: &str) -> Result<Apt> {
        let machine = Machine::this();
        let attempts = match &machine.mirror {
            Some(url) => sources::at_mirror(url, release, host::KEYRING),
            None => {
                let archives = machine_sources()?;
                [true, false]
                    .map(|backports| sources::of_machine(&archives, &machine.codename, release, backports))
                    .to_vec()
            }
        };
        if attempts.iter().all(Vec::is_empty) {
            bail!(
                "the apt sources of this machine have no Debian mirror, and the guest's kernel comes from one; \
                 add one with main to /etc/apt/sources.list.d, or name one with --mirror URL or {}",
                host::MIRROR
            );
        }
        // Each release has its own lists, so that a package name belongs to one release.
        Apt::update(&super::home().join(format!("apt-{release}")), release, &attempts, "")
    }

    /// Sets up apt in `dir` and fetches the package lists of the first of several choices of archives that exists.
    fn update(dir: &Path, release: &str, attempts: &[Vec<Archive>], settings: &str) -> Result<Apt> {
        // A cut download's remains, or another thing in the place of a folder.
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            let _ = lock::remove(&dir.join(sub));
        }
        for sub in ["state/lists/partial", "cache/archives/partial", "sources"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let apt = Apt { dir: dir.to_path_buf(), release: release.to_string() };
        apt.write("apt.conf", &(apt.configuration()? + settings))?;
        let mut failure = String::new();
        // apt fails completely if the mirror lacks one of the suites.
        for archives in attempts {
            apt.write("sources/debian.sources", &sources::to_deb822(archives))?;
            let update = apt.command("apt-get").args(["-q", "update", "--error-on=any"]).output();
            let update = update.context("cannot run apt-get")?;
            if update.status.success() {
                return Ok(apt);
            }
            failure = process::tail(&String::from_utf8_lossy(&update.stderr), 20);
            if !failure.contains("does not have a Release file") && !failure.contains("  404  ") {
                break;
            }
        }
        bail!(
            "apt cannot fetch Debian's package lists; check the network, http_proxy if there is a proxy, and the \
             mirror:\n{failure}"
        );
    }

    /// The packages and all their dependencies, as on a machine with no packages, each as NAME=VERSION.
    /// Prefers the backports.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        self.write("nothing-installed", "")?;
        let status = format!("Dir::State::status={}", self.dir.join("nothing-installed").display());
        let simulate = |target: &[String]| {
            let mut command = self.command("apt-get");
            command.args(["-s", "-o", &status, "--no-install-recommends"]).args(target);
            process::output(command.arg("install").args(packages))
        };
        let backports = ["-t".to_string(), format!("{}-backports", self.release)];
        // Not every mirror has the backports.
        let text = simulate(&backports).or_else(|_| simulate(&[]))?;
        Ok(parse_simulation(&text))
    }

    /// The packages that each suite offers.
    pub fn offers(&self) -> Result<Vec<(String, Vec<Offer>)>> {
        let format = "$(RELEASE) $(FILENAME)";
        let list = process::output(self.command("apt-get").args([
            "indextargets",
            "--format",
            format,
            "Created-By: Packages",
        ]))?;
        let mut suites = Vec::new();
        for line in list.lines() {
            let (suite, file) =
                line.split_once(' ').context("`apt-get indextargets` printed an unexpected line")?;
            // The lists may have one of several compressions; apt-helper supports them all.
            let text = process::output(Command::new("/usr/lib/apt/apt-helper").args(["cat-file", file]))?;
            suites.push((suite.to_string(), parse_packages(&text)));
        }
        Ok(suites)
    }

    /// Downloads packages to `to`, each given as NAME or NAME=VERSION.
    pub fn download<'a>(&self, packages: impl IntoIterator<Item = &'a str>, to: &Path) -> Result<()> {
        let mut download = self.command("apt-get");
        process::output(download.args(["-q", "download"]).args(packages).current_dir(to))
            .context("cannot download packages; check the network and the free space, and run this again")?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.dir.join("apt.conf")).env("LC_ALL", "C");
        command
    }

    /// The machine's settings for fetching (proxies, timeouts, trust), and private
    /// folders for the rest.
    fn configuration(&self) -> Result<String> {
        let mut text = process::output(Command::new("apt-config").args(["dump", "Acquire"]))?;
        let dir = self.dir.display();
        let _ = write!(
            text,
            r#"
Dir::State "{dir}/state";
Dir::Cache "{dir}/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{dir}/sources";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Sandbox::User "";
APT::Architecture "amd64";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Languages "none";
"#
        );
        Ok(text)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The packages in the output of `apt-get -s install`, as NAME=VERSION. A line is
/// `Inst NAME (VERSION SUITE [ARCH])`.
fn parse_simulation(text: &str) -> Vec<String> {
    let package = |line: &str| {
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
        let version = rest.split(' ').next()?;
        Some(format!("{name}={version}"))
    };
    text.lines().filter_map(package).collect()
}

/// The archives in all apt source files of the machine.
fn machine_sources() -> Result<Vec<Archive>> {
    let dump = process::output(Command::new("apt-config").args([
        "shell",
        "LIST",
        "Dir::Etc::sourcelist/f",
        "PARTS",
        "Dir::Etc::sourceparts/d",
    ]))?;
    let value = |name: &str| {
        let quoted = dump.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
        quoted.map(|q| PathBuf::from(q.trim_matches('\'')))
    };
    let mut files: Vec<PathBuf> = value("LIST").into_iter().filter(|f| f.is_file()).collect();
    if let Some(parts) = value("PARTS").filter(|d| d.is_dir()) {
        let entries = fs::read_dir(&parts).with_context(|| format!("cannot read {}", parts.display()))?;
        files.extend(entries.filter_map(|e| Some(e.ok()?.path())));
    }
    let mut archives = Vec::new();
    for file in files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("sources") => archives.extend(sources::parse_deb822(&read(&file)?)),
            Some("list") => archives.extend(sources::parse_list(&read(&file)?)),
            _ => {}
        }
    }
    Ok(archives)
}

#[cfg(test)]
mod tests {
    use super::super::mirror::{Mirror, RELEASE};
    use super::*;
    use std::sync::atomic::Ordering;

    /// Fail at once.
    const ONCE: &str = "Acquire::Retries \"0\";\n";

    /// The mirror's suites. Debian's keys have not signed them.
    fn suites(url: &str) -> Vec<Vec<Archive>> {
        let mut attempts = sources::at_mirror(url, RELEASE, host::KEYRING);
        for archive in attempts.iter_mut().flatten() {
            archive.signed_by = Some(format!("{}\nTrusted: yes", host::KEYRING));
        }
        attempts
    }

    #[test]
    fn a_cut_download_is_repeated_and_never_blocks_the_next() {
        let mirror = Mirror::new(&[("linux-a", ""), ("linux-b", "Depends: linux-a\n")]);
        let dir = mirror.folder.join("apt");
        // What an interrupted run may have left, and what no run leaves.
        fs::create_dir_all(dir.join("state/lists")).unwrap();
        fs::write(dir.join("state/lists/partial"), "a file").unwrap();
        fs::create_dir_all(dir.join("cache/archives/partial/linux-a_1_amd64.deb")).unwrap();
        let apt = Apt::update(&dir, RELEASE, &suites(&mirror.url()), ONCE).unwrap();
        // The mirror has neither the security suite nor the backports.
        assert_eq!(read(&dir.join("sources/debian.sources")).unwrap().matches("Suites: trixie\n").count(), 1);
        let offers = apt.offers().unwrap();
        assert_eq!(offers.iter().map(|(_, offers)| offers.len()).sum::<usize>(), 2);
        assert_eq!(apt.closure(&["linux-b"]).unwrap(), ["linux-a=1", "linux-b=1"]);

        let to = mirror.folder.join("debs");
        fs::create_dir(&to).unwrap();
        mirror.cut.store(1, Ordering::Relaxed);
        let message = format!("{:#}", apt.download(["linux-a=1"], &to).unwrap_err());
        assert!(message.contains("check the network and the free space"), "{message}");
        apt.download(["linux-a=1"], &to).unwrap();
        let (got, sent) =
            (to.join("linux-a_1_amd64.deb"), mirror.folder.join("debian/pool/linux-a_1_amd64.deb"));
        assert_eq!(fs::read(got).unwrap(), fs::read(sent).unwrap());
    }

    #[test]
    fn a_mirror_that_debian_has_not_signed_is_refused() {
        let mirror = Mirror::new(&[]);
        let attempts = sources::at_mirror(&mirror.url(), RELEASE, host::KEYRING);
        let refused = Apt::update(&mirror.folder.join("apt"), RELEASE, &attempts, ONCE);
        let message = refused.err().expect("unsigned").to_string();
        assert!(message.contains("is not signed"), "{message}");
    }

    #[test]
    fn without_a_network_the_message_says_so() {
        let mirror = Mirror::new(&[]);
        // Nobody listens on the port of discarded data.
        let attempts = suites("http://127.0.0.1:9/debian");
        let message =
            Apt::update(&mirror.folder.join("apt"), RELEASE, &attempts, ONCE).err().unwrap().to_string();
        assert!(
            message.contains("check the network, http_proxy") && message.contains("127.0.0.1"),
            "{message}"
        );
    }

    #[test]
    fn a_proxy_is_asked_for_another_name() {
        let mirror = Mirror::new(&[("linux-a", "")]);
        let proxy = format!("{ONCE}Acquire::http::Proxy \"http://127.0.0.1:{}\";\n", mirror.port);
        let attempts = suites("http://mirror.invalid/debian");
        Apt::update(&mirror.folder.join("apt"), RELEASE, &attempts, &proxy).unwrap();
        let requests = mirror.requests();
        assert!(
            requests.iter().all(|line| line.starts_with("GET http://mirror.invalid/debian")),
            "{requests:?}"
        );
    }

    #[test]
    fn apt_removes_nothing() {
        let mirror = Mirror::new(&[("old", ""), ("new", "Conflicts: old\n")]);
        let dir = mirror.folder.join("apt");
        let apt = Apt::update(&dir, RELEASE, &suites(&mirror.url()), ONCE).unwrap();
        let status = dir.join("status");
        let installed = "Package: old\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n\
                         Maintainer: Nobody <n@example>\nDescription: for a test\n\n";
        fs::write(&status, installed).unwrap();
        let status = format!("Dir::State::status={}", status.display());
        let mut install = host::install_command(&["-s", "-o", &status], &["new"]);
        install.env("APT_CONFIG", apt.dir.join("apt.conf"));
        let message = format!("{:#}", process::output(&mut install).map_err(host::explained).unwrap_err());
        assert!(message.contains("nothing was installed or removed"), "{message}");
    }

    #[test]
    fn a_simulation_gives_packages_and_versions() {
        let text = "NOTE: This is only a simulation!\nThe following NEW packages will be installed:\n  a b\n\
                    Inst libdrm2 (2.4.123-1~bpo12+1 Debian Backports:stable-backports [amd64])\n\
                    Inst libgcc-s1 (12.2.0-14 Debian:12.15/stable [amd64]) []\nConf libdrm2 (2.4.123-1)\n";
        assert_eq!(parse_simulation(text), ["libdrm2=2.4.123-1~bpo12+1", "libgcc-s1=12.2.0-14"]);
    }
}
