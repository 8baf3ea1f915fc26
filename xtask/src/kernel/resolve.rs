//! Chooses the newest version whose packages are all available.
//!
//! Versions are not hard-coded, since mirrors drop old ones. The packages of a
//! new version may arrive hours apart.

use super::lines::{Kernel, filled};
use std::cmp::Ordering;

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

/// The newest version of `kernel` that one of the suites offers completely.
pub fn newest(kernel: &Kernel, suites: &[(String, Vec<Offer>)]) -> Option<Choice> {
    suites
        .iter()
        .flat_map(|(suite, offers)| complete(kernel, suite, offers))
        .max_by(|a, b| compare_versions(&a.version, &b.version))
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

/// Compares Debian versions (deb-version(7)).
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    fn epoch(v: &str) -> (u64, &str) {
        v.split_once(':').map_or((0, v), |(e, rest)| (e.parse().unwrap_or(0), rest))
    }
    fn revision(v: &str) -> (&str, &str) {
        v.rsplit_once('-').unwrap_or((v, ""))
    }
    let ((epoch_a, a), (epoch_b, b)) = (epoch(a), epoch(b));
    let ((up_a, rev_a), (up_b, rev_b)) = (revision(a), revision(b));
    epoch_a.cmp(&epoch_b).then_with(|| compare_part(up_a, up_b)).then_with(|| compare_part(rev_a, rev_b))
}

/// Compares text and numbers alternately. `~` sorts before the end, letters sort before other characters.
fn compare_part(mut a: &str, mut b: &str) -> Ordering {
    fn weight(c: Option<char>) -> i32 {
        match c {
            Some('~') => -1,
            None => 0,
            Some(c) if c.is_ascii_digit() => 0,
            Some(c) if c.is_ascii_alphabetic() => c as i32,
            Some(c) => c as i32 + 256,
        }
    }
    fn number(text: &str) -> (u64, &str) {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        (text[..end].parse().unwrap_or(0), &text[end..])
    }
    while !a.is_empty() || !b.is_empty() {
        loop {
            let (x, y) = (a.chars().next(), b.chars().next());
            let digit = |c: Option<char>| c.is_none_or(|c| c.is_ascii_digit());
            if digit(x) && digit(y) {
                break;
            }
            match weight(x).cmp(&weight(y)) {
                Ordering::Equal => {}
                other => return other,
            }
            a = &a[x.map_or(0, char::len_utf8)..];
            b = &b[y.map_or(0, char::len_utf8)..];
        }
        let ((x, rest_a), (y, rest_b)) = (number(a), number(b));
        match x.cmp(&y) {
            Ordering::Equal => (a, b) = (rest_a, rest_b),
            other => return other,
        }
    }
    Ordering::Equal
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::lines::LINUX_6_12;

    #[test]
    fn versions_order_as_debian_says() {
        let order = [
            "6.12.90~rc1-1",
            "6.12.90-1~bpo12+1",
            "6.12.90-1~deb12u1",
            "6.12.90-1",
            "6.12.90-1+b1",
            "6.12.90-2~deb12u1",
            "6.12.107-1~deb12u1",
            "6.12.117-1~deb12u1",
            "6.13.1-1",
            "1:5.0-1",
        ];
        for pair in order.windows(2) {
            assert_eq!(compare_versions(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare_versions(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare_versions("1.0-1", "1.0-1"), Ordering::Equal);
    }

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
    fn the_newest_complete_version_wins() {
        let mut security = all("6.12.107+deb12", "6.12.107-1~deb12u1", "amd64");
        security.extend(all("6.12.95+deb12", "6.12.95-1~deb12u1", "amd64"));
        // The source is not uploaded yet.
        let mut half = all("6.12.117+deb12", "6.12.117-1~deb12u1", "amd64");
        half.pop();
        security.extend(half);
        let backports = all("6.12.111+deb12", "6.12.111-1~bpo12+1", "amd64-unsigned");
        let main = all("6.1.99", "6.1.99-1", "amd64");
        let suites = [("main".into(), main), ("security".into(), security), ("backports".into(), backports)];

        let choice = newest(&LINUX_6_12, &suites).unwrap();
        assert_eq!((choice.abi.as_str(), choice.suite.as_str()), ("6.12.111+deb12", "backports"));
        assert_eq!(choice.packages[0], "linux-image-6.12.111+deb12-amd64-unsigned");

        let choice = newest(&LINUX_6_12, &suites[..2]).unwrap();
        assert_eq!((choice.version.as_str(), choice.suite.as_str()), ("6.12.107-1~deb12u1", "security"));
        assert_eq!(choice.packages[0], "linux-image-6.12.107+deb12-amd64");
        assert_eq!(newest(&LINUX_6_12, &suites[..1]), None);
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
