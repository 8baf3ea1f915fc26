//! Reads the Debian mirrors of this machine from its apt sources.
//!
//! Both formats work: deb822 (`*.sources`) and one-line (`*.list`). Mirrors and
//! keys stay as they are, so local mirrors and pinned keys keep working.

use std::fmt::Write;

/// An archive and its suites.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    pub uri: String,
    pub suites: Vec<String>,
    /// `Signed-By`: a file, or an inline key with its continuation lines.
    pub signed_by: Option<String>,
}

/// The entries of a deb822 file that are binary, enabled and have `main`.
pub fn parse_deb822(text: &str) -> Vec<Archive> {
    let mut archives = Vec::new();
    // Comments may also be inside a stanza.
    let text: String = text.lines().filter(|l| !l.starts_with('#')).fold(String::new(), |t, l| t + l + "\n");
    for stanza in text.split("\n\n") {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza.lines() {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push('\n');
                    value.push_str(line);
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.to_ascii_lowercase(), value.trim().to_string()));
            }
        }
        let field = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        let words =
            |name| field(name).unwrap_or("").split_whitespace().map(str::to_string).collect::<Vec<_>>();
        let enabled = !matches!(field("enabled"), Some("no" | "false" | "0"));
        if !enabled
            || !words("types").contains(&"deb".into())
            || !words("components").contains(&"main".into())
        {
            continue;
        }
        for uri in words("uris") {
            archives.push(Archive {
                uri,
                suites: words("suites"),
                signed_by: field("signed-by").map(str::to_string),
            });
        }
    }
    archives
}

/// The same entries of a file in the one-line format.
pub fn parse_list(text: &str) -> Vec<Archive> {
    let mut archives = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or("").trim();
        let Some(rest) = line.strip_prefix("deb ").or(line.strip_prefix("deb\t")).map(str::trim) else {
            continue;
        };
        let (options, rest) = match rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
        if words.any(|component| component == "main") {
            let signed_by = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by="));
            archives.push(Archive {
                uri: uri.to_string(),
                suites: vec![suite.to_string()],
                signed_by: signed_by.map(str::to_string),
            });
        }
    }
    archives
}

/// The suites of a release on the mirrors of a machine of the release `own`.
pub fn of_machine(archives: &[Archive], own: &str, release: &str, backports: bool) -> Vec<Archive> {
    if own == release {
        return for_release(archives, own, backports);
    }
    let rolling = [own, "stable", "testing", "unstable", "sid"];
    let main =
        archives.iter().find(|archive| archive.suites.iter().any(|suite| rolling.contains(&suite.as_str())));
    let mut suites = vec![release.to_string()];
    suites.extend(backports.then(|| format!("{release}-backports")));
    main.map(|main| Archive { suites, ..main.clone() }).into_iter().collect()
}

/// The suites of a release on a mirror of the user's choice, from all of them to the main one alone.
pub fn at_mirror(url: &str, release: &str, keyring: &str) -> Vec<Vec<Archive>> {
    let url = url.trim_end_matches('/');
    let archive = |uri: &str, suites: &[String]| Archive {
        uri: uri.to_string(),
        suites: suites.to_vec(),
        signed_by: Some(keyring.to_string()),
    };
    let (main, backports) = (release.to_string(), format!("{release}-backports"));
    let both = archive(url, &[main.clone(), backports]);
    let mut attempts = Vec::new();
    // Where mirrors have it, beside the main archive.
    if let Some(parent) = url.strip_suffix("/debian") {
        let security = archive(&format!("{parent}/debian-security"), &[format!("{release}-security")]);
        attempts.push(vec![both.clone(), security]);
    }
    attempts.extend([vec![both], vec![archive(url, &[main])]]);
    attempts
}

/// The suites that can have kernels of the release `codename`. With `backports`,
/// also the backports from the mirror of the main suite, even if the machine does
/// not use them.
fn for_release(archives: &[Archive], codename: &str, backports: bool) -> Vec<Archive> {
    let names = [codename, "stable", "oldstable"];
    let belongs = |suite: &str| {
        let base = suite.strip_suffix("/updates").unwrap_or(suite);
        names.iter().any(|name| {
            base.strip_prefix(name)
                .is_some_and(|rest| matches!(rest, "" | "-updates" | "-security" | "-backports"))
        })
    };
    let mut chosen: Vec<Archive> = Vec::new();
    for archive in archives.iter().filter(|a| !a.uri.starts_with("cdrom:")) {
        let mut suites: Vec<String> = archive.suites.iter().filter(|s| belongs(s)).cloned().collect();
        if backports {
            let main = suites.iter().find(|s| names.contains(&s.as_str())).cloned();
            suites.extend(main.map(|main| format!("{main}-backports")));
        }
        // apt warns about a suite that is in several files.
        suites.sort();
        suites.dedup();
        suites.retain(|s| !chosen.iter().any(|c| c.uri == archive.uri && c.suites.contains(s)));
        if !suites.is_empty() {
            chosen.push(Archive { suites, ..archive.clone() });
        }
    }
    chosen
}

/// Formats the archives as a deb822 file.
pub fn to_deb822(archives: &[Archive]) -> String {
    let mut text = String::new();
    for archive in archives {
        let _ = write!(
            text,
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n",
            archive.uri,
            archive.suites.join(" ")
        );
        if let Some(key) = &archive.signed_by {
            let _ = writeln!(text, "Signed-By: {key}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# a comment
Types: deb deb-src
# an older mirror
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEY865UxYJKwYBBAHaRw8BAQdAd7Z0srwuhlB6JKFkcf4HU4SSS/xcRfwEQWzr
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://other.example/
Suites: bookworm
Components: main
";

    #[test]
    fn deb822_entries() {
        let archives = parse_deb822(DEB822);
        assert_eq!(archives.len(), 2);
        assert_eq!(archives[0].uri, "http://mirror.example/debian");
        assert_eq!(archives[0].suites, ["bookworm", "bookworm-updates"]);
        assert!(archives[1].signed_by.as_ref().unwrap().contains("\n .\n mDME"));
        assert_eq!(parse_deb822(&to_deb822(&archives)), archives);
    }

    #[test]
    fn one_line_entries() {
        let archives = parse_list(
            "deb http://m/debian bookworm main contrib # note\n\
             # deb http://m/off bookworm main\n\
             deb-src http://m/debian bookworm main\n\
             deb [arch=amd64 signed-by=/k.gpg] http://m/sec bookworm-security main\n\
             deb http://m/other bookworm nonfree\n",
        );
        assert_eq!(archives.len(), 2);
        assert_eq!(archives[0].signed_by, None);
        assert_eq!(archives[1].uri, "http://m/sec");
        assert_eq!(archives[1].signed_by.as_deref(), Some("/k.gpg"));
    }

    #[test]
    fn backports_come_from_the_mirror_of_the_main_suite() {
        let mut archives = parse_deb822(DEB822);
        archives.push(Archive { uri: "http://x/".into(), suites: vec!["nodistro".into()], signed_by: None });
        let with = for_release(&archives, "bookworm", true);
        assert_eq!(with[0].suites, ["bookworm", "bookworm-backports", "bookworm-updates"]);
        assert_eq!(with[1].suites, ["bookworm-security"]);
        assert_eq!(with.len(), 2);
        let without = for_release(&archives, "bookworm", false);
        assert_eq!(without[0].suites, ["bookworm", "bookworm-updates"]);
        // A machine that already has the backports gets them once.
        archives[0].suites.push("bookworm-backports".into());
        assert_eq!(for_release(&archives, "bookworm", true)[0].suites.len(), 3);
        assert!(for_release(&archives, "trixie", true).is_empty());
    }

    #[test]
    fn another_release_comes_from_the_same_mirror() {
        let archives = parse_deb822(DEB822);
        let other = of_machine(&archives, "bookworm", "trixie", true);
        assert_eq!(other.len(), 1);
        assert_eq!((&other[0].uri, &other[0].signed_by), (&archives[0].uri, &archives[0].signed_by));
        assert_eq!(other[0].suites, ["trixie", "trixie-backports"]);
        assert_eq!(of_machine(&archives, "bookworm", "trixie", false)[0].suites, ["trixie"]);
        assert_eq!(
            of_machine(&archives, "bookworm", "bookworm", false),
            for_release(&archives, "bookworm", false)
        );
        assert!(of_machine(&archives, "noble", "trixie", true).is_empty());
        // A machine of no release.
        let sid = parse_list("deb http://m/debian sid main");
        assert_eq!(of_machine(&sid, "forky", "trixie", true)[0].suites, ["trixie", "trixie-backports"]);
    }

    #[test]
    fn a_mirror_of_choice_is_checked_with_debians_keys() {
        let attempts = at_mirror("http://m/debian/", "trixie", "/k.gpg");
        let text: Vec<String> = attempts.iter().map(|archives| to_deb822(archives)).collect();
        assert_eq!(text.len(), 3);
        assert!(text[0].contains("URIs: http://m/debian-security\nSuites: trixie-security\n"), "{}", text[0]);
        assert!(text[1].contains("URIs: http://m/debian\nSuites: trixie trixie-backports\n"), "{}", text[1]);
        for (text, archives) in text.iter().zip(&attempts) {
            assert_eq!(text.matches("Signed-By: /k.gpg").count(), archives.len(), "{text}");
        }
        assert_eq!(at_mirror("http://m/mirror", "trixie", "/k.gpg").len(), 2);
    }
}
