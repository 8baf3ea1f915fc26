//! `cargo xtask api`: the public API as text, one line for each item, and how large it is.
//!
//! `docs/api/` keeps the text, so that a change of the API shows in a review; so does the header of the C library. The text
//! comes from rustdoc's JSON. Its format and the paths inside std belong to a toolchain, so only the one that wrote the text compares.

pub mod c;
mod listing;

use crate::{process, project, ui};
use anyhow::{Context, Result, bail};
use listing::Listing;
use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// Compare the public API with docs/api, or write it there.
#[derive(clap::Args)]
pub struct Args {
    /// Write docs/api instead of comparing with it
    #[arg(long)]
    update: bool,
}

/// The crates whose API is kept, with the most public types that each may have. It had 90 before host memory,
/// notifications, workers, asynchronous events and request chains.
const CRATES: &[(&str, Option<usize>)] = &[("dmabuf-rdma", Some(105)), ("dma-sg", None)];

/// The most variants that a public error enum may have.
const MOST_VARIANTS: usize = 15;

/// The most lines of a difference that a person wants to see here.
const MOST_LINES: usize = 60;

pub fn run(args: Args) -> Result<ExitCode> {
    if let Some(reason) = check(args.update)? {
        bail!("the public API was not compared: {reason}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Compares the API with `docs/api`, or writes it there, and its size with the limits.
///
/// Returns the reason when this toolchain cannot compare.
pub fn check(update: bool) -> Result<Option<String>> {
    let mut complaints = c::check(update)?;
    let compiler = compiler()?;
    document()?;
    let header = format!("# All features, {compiler}. Written by `cargo xtask api --update`.");
    let mut not_compared = None;
    for &(name, most_types) in CRATES {
        let listing = match Listing::of(&documented(name)) {
            Ok(listing) => listing,
            Err(error) if error.is::<listing::OtherFormat>() && complaints.is_empty() => {
                return Ok(Some(format!("{compiler} {error}")));
            }
            Err(error) => return Err(error.context(format!("the API of {name}"))),
        };
        complaints.extend(size(name, &listing, most_types));
        let kept = format!("docs/api/{name}.txt");
        let file = project::root().join(&kept);
        if update {
            std::fs::create_dir_all(file.parent().context("no folder")?)?;
            let text = format!("{header}\n{}\n", listing.lines.join("\n"));
            std::fs::write(&file, text).with_context(|| format!("cannot write {kept}"))?;
            continue;
        }
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {kept}"))?;
        let (first, lines) = text.split_once('\n').unwrap_or_default();
        if first != header {
            not_compared = Some(format!("this is {compiler}, and {kept} has \"{first}\""));
            continue;
        }
        let change = difference(&lines.lines().collect::<Vec<_>>(), &listing.lines);
        if !change.is_empty() {
            let (shown, more) = change.split_at(change.len().min(MOST_LINES));
            let more = if more.is_empty() { String::new() } else { format!("… and {} more\n", more.len()) };
            complaints.push(format!(
                "The API of {name} is not what {kept} has:\n{}\n{more}`cargo xtask api --update` writes it there.",
                shown.join("\n")
            ));
        }
    }
    if !complaints.is_empty() {
        bail!("{}", complaints.join("\n"));
    }
    Ok(not_compared)
}

/// Says how large an API is, and returns what is too large.
fn size(name: &str, listing: &Listing, most_types: Option<usize>) -> Vec<String> {
    let limit = most_types.map_or(String::new(), |most| format!(" (at most {most})"));
    let (error, variants) =
        listing.largest_error.as_ref().map_or(("none", 0), |(name, n)| (name.as_str(), *n));
    let types = listing.types;
    ui::note("API", &format!("{name}: {types} public types{limit}"));
    ui::detail(&format!("{variants} variants in the largest error, {error} (at most {MOST_VARIANTS})"));
    let mut complaints = Vec::new();
    if most_types.is_some_and(|most| types > most) {
        complaints.push(format!("{name} has {types} public types{limit}."));
    }
    if variants > MOST_VARIANTS {
        complaints.push(format!("{error} has {variants} variants (at most {MOST_VARIANTS})."));
    }
    complaints
}

/// Lines that only one side has, marked as diff marks them.
fn difference(kept: &[&str], now: &[String]) -> Vec<String> {
    let (before, after): (HashSet<&str>, HashSet<&str>) =
        (kept.iter().copied().collect(), now.iter().map(String::as_str).collect());
    let gone = kept.iter().filter(|line| !after.contains(*line)).map(|line| format!("- {line}"));
    let new = now.iter().filter(|line| !before.contains(line.as_str())).map(|line| format!("+ {line}"));
    gone.chain(new).collect()
}

/// The compiler without its patch version: `rustc 1.95`.
fn compiler() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = process::output(Command::new(rustc).arg("--version"))?;
    let number = version.split_whitespace().nth(1).context("rustc has no version")?;
    Ok(format!("rustc {}", number.split('.').take(2).collect::<Vec<_>>().join(".")))
}

/// Has rustdoc write the workspace's APIs as JSON, with the features that all else is built with.
fn document() -> Result<()> {
    ui::note("Reading", "the public API");
    let mut cargo = project::cargo();
    cargo.env("RUSTDOC", project::root().join("xtask/src/api/rustdoc.sh"));
    cargo.env("RUSTDOCFLAGS", "-Z unstable-options --output-format json");
    process::output(cargo.args(["doc", "--no-deps", "--lib"]).args(crate::cargo::EVERYTHING))?;
    Ok(())
}

/// Where rustdoc writes the JSON of a crate.
fn documented(name: &str) -> PathBuf {
    project::target().join("doc").join(name.replace('-', "_")).with_extension("json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_has_both_sides() {
        let now = ["a", "c", "d"].map(String::from);
        assert_eq!(difference(&["a", "b", "c"], &now), ["- b", "+ d"]);
        assert!(difference(&["a", "c", "d"], &now).is_empty());
    }

    #[test]
    fn what_is_too_large_is_named() {
        let listing = |types, variants| Listing {
            lines: Vec::new(),
            types,
            largest_error: Some(("x::Error".into(), variants)),
        };
        assert!(size("x", &listing(90, 15), Some(90)).is_empty());
        assert!(size("x", &listing(91, 0), None).is_empty());
        assert_eq!(size("x", &listing(91, 16), Some(90)).len(), 2);
    }
}
