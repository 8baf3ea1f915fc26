//! What this machine is, and where the guest's kernel comes from.
//!
//! The guest is an amd64 machine with Debian's kernel. So what decides is known
//! before anything is fetched or installed.

use crate::process;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The variable that names a Debian mirror, as `--mirror` does.
pub const MIRROR: &str = "DMABUF_RDMA_MIRROR";

/// Debian's releases with a kernel that the guest can boot, and that which other machines take.
const RELEASES: &[&str] = &["bookworm", "trixie"];
const USUAL_RELEASE: &str = "trixie";

/// Debian's keys, in the package debian-archive-keyring.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Programs that fetch and unpack Debian's packages.
const TOOLS: &[&str] = &["apt-get", "apt-config", "apt-cache", "dpkg", "dpkg-deb"];

/// This machine.
#[derive(Debug)]
pub struct Machine {
    architecture: String,
    /// `ID`, `VERSION_CODENAME` and `PRETTY_NAME` of os-release.
    id: String,
    pub codename: String,
    pub name: String,
    /// A Debian mirror to use instead of the machine's apt sources.
    pub mirror: Option<String>,
}

static MIRROR_OPTION: OnceLock<String> = OnceLock::new();

/// Uses this Debian mirror instead of the machine's apt sources.
pub fn use_mirror(url: String) {
    let _ = MIRROR_OPTION.set(url);
}

impl Machine {
    pub fn this() -> Machine {
        let text = ["/etc/os-release", "/usr/lib/os-release"]
            .iter()
            .find_map(|path| std::fs::read_to_string(path).ok())
            .unwrap_or_default();
        Machine::from(std::env::consts::ARCH, &text, MIRROR_OPTION.get().cloned())
    }

    fn from(architecture: &str, os_release: &str, mirror: Option<String>) -> Machine {
        let field = |name: &str| {
            let value = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_default().trim().trim_matches(['"', '\'']).to_string()
        };
        let name = Some(field("PRETTY_NAME")).filter(|name| !name.is_empty());
        Machine {
            architecture: architecture.to_string(),
            id: field("ID"),
            codename: field("VERSION_CODENAME"),
            name: name.unwrap_or_else(|| "this system".into()),
            mirror,
        }
    }

    /// The Debian release whose kernels the guest takes.
    pub fn release(&self) -> &str {
        match RELEASES.contains(&self.codename.as_str()) && self.id == "debian" {
            true => &self.codename,
            false => USUAL_RELEASE,
        }
    }

    /// Whether the machine needs a package for Debian's keys.
    pub fn lacks_keyring(&self) -> bool {
        self.mirror.is_some() && !Path::new(KEYRING).is_file()
    }

    /// Fails if the guest cannot run here, and says what to do instead.
    pub fn check(&self) -> Result<()> {
        let find = |program: &str| process::find(program);
        self.check_with(find, std::env::args().skip(1).collect())
    }

    fn check_with(&self, find: impl Fn(&str) -> Option<PathBuf>, words: Vec<String>) -> Result<()> {
        if self.architecture != "x86_64" {
            bail!(
                "this machine is {} and the guest is amd64: its kernel, modules and programs do not run here. \
                 Use an amd64 machine; `cargo test` runs the unit tests on this one, and `--host` the rest with \
                 its own RDMA device",
                self.architecture
            );
        }
        if self.mirror.is_none() && self.id == "debian" {
            return Ok(());
        }
        let missing: Vec<&str> = TOOLS.iter().copied().filter(|tool| find(tool).is_none()).collect();
        if self.mirror.is_some() && missing.is_empty() {
            return Ok(());
        }
        let program = ["podman", "docker"].into_iter().find(|name| find(name).is_some()).unwrap_or("podman");
        let line = container(program, &words);
        let other = match missing.is_empty() {
            true => format!(
                "or name a Debian mirror with --mirror URL or {MIRROR}: www.debian.org/mirror/list has them"
            ),
            false => format!(
                "or install {}, and name a Debian mirror with --mirror URL or {MIRROR}",
                missing.join(", ")
            ),
        };
        bail!(
            "the guest's kernel comes from a Debian mirror, and {} has none in its apt sources. Run it in a \
             container with\n\n    {line}\n\n{other}",
            self.name
        );
    }
}

/// The line that runs `cargo xtask WORDS` in a container.
fn container(program: &str, words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| process::quote(word)).collect();
    format!(
        "{program} build -t dmabuf-rdma -f Containerfile . && {program} run --rm -it -v \"$PWD\":/src:Z dmabuf-rdma \
         cargo xtask {}",
        words.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nID=debian\nVERSION_CODENAME=trixie\n";
    const UBUNTU: &str =
        "PRETTY_NAME=\"Ubuntu 24.04.3 LTS\"\nID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n";
    const FEDORA: &str =
        "NAME=\"Fedora Linux\"\nID=fedora\nVERSION_CODENAME=\"\"\nPRETTY_NAME=\"Fedora Linux 43\"\n";
    const ARCH: &str = "NAME=\"Arch Linux\"\nPRETTY_NAME=\"Arch Linux\"\nID=arch\nBUILD_ID=rolling\n";

    fn check(machine: &Machine, programs: &[&str]) -> Result<(), String> {
        let find = |name: &str| programs.contains(&name).then(|| PathBuf::from(name));
        let words = ["demo", "--size", "4 G"].map(str::to_string).to_vec();
        machine.check_with(find, words).map_err(|error| error.to_string())
    }

    fn machine(os_release: &str, mirror: Option<&str>) -> Machine {
        Machine::from("x86_64", os_release, mirror.map(str::to_string))
    }

    #[test]
    fn debian_is_served_from_its_own_sources() {
        for (codename, release) in [("bookworm", "bookworm"), ("trixie", "trixie"), ("forky", "trixie")] {
            let machine = machine(&DEBIAN.replace("trixie", codename), None);
            assert_eq!(check(&machine, &[]), Ok(()));
            assert_eq!(machine.release(), release);
        }
    }

    #[test]
    fn another_architecture_is_refused_first() {
        for os_release in [DEBIAN, UBUNTU, ""] {
            let arm = Machine::from("aarch64", os_release, Some("http://m/debian".into()));
            let message = check(&arm, TOOLS).unwrap_err();
            assert!(message.starts_with("this machine is aarch64 and the guest is amd64"), "{message}");
        }
    }

    #[test]
    fn others_get_one_line_for_a_container() {
        for (os_release, name) in
            [(UBUNTU, "Ubuntu 24.04.3 LTS"), (FEDORA, "Fedora Linux 43"), (ARCH, "Arch Linux")]
        {
            let message = check(&machine(os_release, None), &["docker"]).unwrap_err();
            assert!(message.contains(&format!("{name} has none in its apt sources")), "{message}");
            let line = message.lines().find(|line| line.contains(" run ")).unwrap().trim();
            assert_eq!(
                line,
                "docker build -t dmabuf-rdma -f Containerfile . && docker run --rm -it -v \"$PWD\":/src:Z \
                 dmabuf-rdma cargo xtask demo --size '4 G'"
            );
            assert!(message.contains("install apt-get, apt-config"), "{message}");
            // With a mirror but without apt it is no different.
            let message = check(&machine(os_release, Some("http://m/debian")), &[]).unwrap_err();
            assert!(message.contains("podman run"), "{message}");
        }
    }

    #[test]
    fn a_mirror_serves_every_machine_with_the_tools() {
        let url = "http://mirror.invalid/debian";
        let message = check(&machine(UBUNTU, None), TOOLS).unwrap_err();
        assert!(
            message.contains("or name a Debian mirror with --mirror URL or DMABUF_RDMA_MIRROR"),
            "{message}"
        );
        for os_release in [UBUNTU, FEDORA, ARCH, DEBIAN] {
            let machine = machine(os_release, Some(url));
            assert_eq!(check(&machine, TOOLS), Ok(()));
            assert_eq!(machine.release(), "trixie");
        }
    }
}
