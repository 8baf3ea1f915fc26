//! Chooses a version whose packages are all available.
//!
//! Mirrors drop old versions, so the tested one may be gone. The packages of a new
//! version may arrive hours apart.

use super::lines::{Kernel, Version, filled};
use anyhow::{Context, Result, bail};
use std::fmt;
use std::process::Command;

/// A binary package that a suite offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    pub name: String,
    pub version: String,
}

/// The version to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub suite: String,
    /// Such as `6.12.90+deb12`.
    pub abi: String,
    pub version: String,
    pub packages: Vec<String>,
}

/// Names and versions of the `linux-` packages in a `Packages` file.
pub fn parse_packages(text: &str) -> Vec<Offer> {
    let mut offers = Vec::new();
    let mut name = None;
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("Package: ") {
            name = value.starts_with("linux-").then(|| value.to_string());
        } else if let Some(version) = line.strip_prefix("Version: ")
            && let Some(name) = name.take()
        {
            offers.push(Offer { name, version: version.to_string() });
        }
    }
    offers
}

/// The mirror works, but has no such kernel.
#[derive(Debug)]
pub struct NotOffered {
    wanted: String,
    offered: Vec<String>,
}

impl fmt::Display for NotOffered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no suite of the Debian mirror has all packages of Linux {}", self.wanted)?;
        match self.offered.as_slice() {
            [] => Ok(()),
            offered => write!(f, "; it has {}", offered.join(", ")),
        }
    }
}

impl std::error::Error for NotOffered {}

/// The version of `kernel` to fetch: one that a suite offers completely.
pub fn choose(kernel: &Kernel, suites: &[(String, Vec<Offer>)]) -> Result<Choice> {
    let all: Vec<Choice> =
        suites.iter().flat_map(|(suite, offers)| complete(kernel, suite, offers)).collect();
    let matches = |choice: &&Choice| match &kernel.version {
        Version::Tested => Kernel::is(&choice.abi, kernel.tested),
        Version::Newest => true,
        Version::Exact(version) => Kernel::is(&choice.abi, version),
    };
    let mut found = newest(all.iter().filter(matches).cloned().collect())?;
    if found.is_none() && kernel.version == Version::Tested {
        found = newest(all.clone())?;
    }
    found.ok_or_else(|| {
        let wanted = if let Version::Exact(version) = &kernel.version { version } else { kernel.line };
        let offered = all.into_iter().map(|choice| choice.abi).collect();
        NotOffered { wanted: wanted.to_string(), offered }.into()
    })
}

fn newest(choices: Vec<Choice>) -> Result<Option<Choice>> {
    let mut newest: Option<Choice> = None;
    for choice in choices {
        if newest.as_ref().map_or(Ok(true), |other| is_later(&choice.version, &other.version))? {
            newest = Some(choice);
        }
    }
    Ok(newest)
}

/// Whether Debian's order of versions puts `a` after `b`.
pub fn is_later(a: &str, b: &str) -> Result<bool> {
    let compared = Command::new("dpkg").args(["--compare-versions", a, "gt", b]).status();
    match compared.context("cannot run dpkg")?.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => bail!("`dpkg --compare-versions {a} gt {b}` failed"),
    }
}

/// Every complete version in one suite.
fn complete(kernel: &Kernel, suite: &str, offers: &[Offer]) -> Vec<Choice> {
    let (before, after) = kernel.index.split_once("{abi}").unwrap_or((kernel.index, ""));
    let mut choices = Vec::new();
    for offer in offers {
        let Some(abi) = offer.name.strip_prefix(before).and_then(|rest| rest.strip_suffix(after)) else {
            continue;
        };
        // `linux-headers-6.12.90+deb12-rt-amd64` is another flavour.
        let of_line = abi.strip_prefix(kernel.line).is_some_and(|rest| rest.starts_with('.'));
        if !of_line || abi.contains('-') {
            continue;
        }
        let there = |name: &str| offers.iter().any(|o| o.name == name && o.version == offer.version);
        let packages: Option<Vec<String>> = kernel
            .packages
            .iter()
            .map(|alternatives| alternatives.iter().map(|p| filled(p, abi)).find(|name| there(name)))
            .collect();
        if let Some(packages) = packages {
            choices.push(Choice {
                suite: suite.to_string(),
                abi: abi.to_string(),
                version: offer.version.clone(),
                packages,
            });
        }
    }
    choices
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::lines::{LINUX_6_12, by_name};

    fn offers(version: &str, names: &[&str]) -> Vec<Offer> {
        names.iter().map(|n| Offer { name: n.to_string(), version: version.to_string() }).collect()
    }

    fn all(abi: &str, version: &str, image: &str) -> Vec<Offer> {
        let names = [
            format!("linux-image-{abi}-{image}"),
            format!("linux-headers-{abi}-amd64"),
            format!("linux-headers-{abi}-rt-amd64"),
            format!("linux-headers-{abi}-common"),
            format!("linux-kbuild-{abi}"),
            "linux-source-6.12".to_string(),
        ];
        offers(version, &names.each_ref().map(String::as_str))
    }

    #[test]
    fn a_complete_version_is_chosen() {
        let mut security = all("6.12.107+deb12", "6.12.107-1~deb12u1", "amd64");
        security.extend(all("6.12.95+deb12", "6.12.95-1~deb12u1", "amd64"));
        // The source is not uploaded yet.
        let mut half = all("6.12.117+deb12", "6.12.117-1~deb12u1", "amd64");
        half.pop();
        security.extend(half);
        let backports = all("6.12.111+deb12", "6.12.111-1~bpo12+1", "amd64-unsigned");
        let main = all("6.1.99", "6.1.99-1", "amd64");
        let suites = [("main".into(), main), ("security".into(), security), ("backports".into(), backports)];

        let newest = by_name("newest").unwrap();
        let choice = choose(newest, &suites).unwrap();
        assert_eq!((choice.abi.as_str(), choice.suite.as_str()), ("6.12.111+deb12", "backports"));
        assert_eq!(choice.packages[0], "linux-image-6.12.111+deb12-amd64-unsigned");

        let choice = choose(newest, &suites[..2]).unwrap();
        assert_eq!((choice.version.as_str(), choice.suite.as_str()), ("6.12.107-1~deb12u1", "security"));
        assert_eq!(choice.packages[0], "linux-image-6.12.107+deb12-amd64");
        let error = choose(newest, &suites[..1]).unwrap_err();
        assert!(error.is::<NotOffered>(), "{error}");

        // The tested version before a newer one, and the newest if it is gone.
        let tested = Kernel { tested: "6.12.95", ..LINUX_6_12 };
        assert_eq!(choose(&tested, &suites).unwrap().abi, "6.12.95+deb12");
        let gone = Kernel { tested: "6.12.117", ..LINUX_6_12 };
        assert_eq!(choose(&gone, &suites).unwrap().abi, "6.12.111+deb12");

        assert_eq!(choose(by_name("6.12.107").unwrap(), &suites).unwrap().abi, "6.12.107+deb12");
        let error = choose(by_name("6.12.96").unwrap(), &suites).unwrap_err().to_string();
        assert!(
            error.ends_with("of Linux 6.12.96; it has 6.12.107+deb12, 6.12.95+deb12, 6.12.111+deb12"),
            "{error}"
        );
    }

    #[test]
    fn packages_files() {
        let text = "Package: linux-source-6.12\nSource: linux\nVersion: 6.12.90-1\nDepends: x\n\n\
                    Package: zsh\nVersion: 5\n\nPackage: linux-kbuild-6.12.90\nArchitecture: amd64\nVersion: 6.12.90-1\n";
        let offers = parse_packages(text);
        assert_eq!(offers.len(), 2);
        assert_eq!(offers[1], Offer { name: "linux-kbuild-6.12.90".into(), version: "6.12.90-1".into() });
    }
}
