//! Programs that must not compile: `tests/ui/*.rs`.
//!
//! A line that the compiler must refuse ends in `//~ E0499`, with the code of the error. The compiler must report
//! these errors and no other, so a program that is refused for another reason fails. trybuild would compare whole
//! messages, which change with the toolchain, and build every dependency again in a folder of its own.

use super::libtest::{Report, Verdict};
use crate::cargo::EVERYTHING;
use crate::{process, project, ui};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Compile the programs in tests/ui, each of which the compiler must refuse.
#[derive(clap::Args)]
pub struct Args {}

/// An error of the compiler: its line, and its code or message.
type Refusal = (usize, String);

pub fn run(_: Args) -> Result<ExitCode> {
    Ok(if check()?.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Compiles each program, and says how the compiler's errors differ from those that it states.
pub(super) fn check() -> Result<Report> {
    let library = library()?;
    let folder = project::root().join("tests/ui");
    let mut files = std::fs::read_dir(&folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>())
        .with_context(|| format!("cannot list {}", folder.display()))?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
    files.sort();
    let mut report = Report::default();
    for file in files {
        let name = format!("tests/ui/{}", file.file_name().unwrap_or_default().to_string_lossy());
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {name}"))?;
        match compare(&stated(&text), &refusals(&file, &library)?) {
            Ok(()) => {
                ui::note("ok", &name);
                report.passed += 1;
                report.tests.insert(name, Verdict::Passed);
            }
            Err(difference) => {
                ui::error(&format!("{name}: {difference}"));
                report.failed += 1;
                report.tests.insert(name, Verdict::Failed);
            }
        }
    }
    Ok(report)
}

/// The library with all features, as it is built for everything else.
fn library() -> Result<PathBuf> {
    ui::note("Building", "the library");
    let mut build = project::cargo();
    build.args(["build", "--lib", "--message-format=json-render-diagnostics"]).args(EVERYTHING);
    let messages = process::output(&mut build)?;
    messages.lines().filter_map(library_in).next_back().context("cargo built no library")
}

/// The library that a message of cargo names, if it is ours.
fn library_in(message: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" || message["target"]["name"] != "dmabuf_rdma" {
        return None;
    }
    let files = message["filenames"].as_array()?.iter().filter_map(Value::as_str);
    files.filter(|file| file.ends_with(".rlib")).map(PathBuf::from).next()
}

/// The errors that the compiler reports for a program.
fn refusals(program: &Path, library: &Path) -> Result<BTreeSet<Refusal>> {
    let folder = library.parent().context("the library is in no folder")?;
    let mut external = std::ffi::OsString::from("dmabuf_rdma=");
    external.push(library);
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc
        .args(["--edition", "2024", "--emit", "metadata", "--error-format", "json", "--extern"])
        .arg(external);
    for dependencies in [folder.to_path_buf(), folder.join("deps")] {
        rustc.arg("-L").arg(format!("dependency={}", dependencies.display()));
    }
    rustc.arg("-o").arg(project::target().join("ui.rmeta")).arg(program);
    let out = rustc.output().with_context(|| format!("cannot run `{}`", process::shown(&rustc)))?;
    Ok(String::from_utf8_lossy(&out.stderr).lines().filter_map(refusal).collect())
}

/// The error that one message of the compiler is.
fn refusal(message: &str) -> Option<Refusal> {
    let message: Value = serde_json::from_str(message).ok()?;
    let spans = message["spans"].as_array()?;
    let line =
        spans.iter().find(|span| span["is_primary"] == true).and_then(|span| span["line_start"].as_u64());
    let text = message["code"]["code"].as_str().or(message["message"].as_str())?;
    // The last message counts those before and has no place.
    (message["level"] == "error" && (line.is_some() || !text.starts_with("aborting due to")))
        .then(|| (line.unwrap_or(0) as usize, text.to_string()))
}

/// The errors that a program states.
fn stated(program: &str) -> BTreeSet<Refusal> {
    let lines =
        program.lines().zip(1..).filter_map(|(line, number)| Some((number, line.split_once("//~ ")?.1)));
    lines.map(|(number, code)| (number, code.trim().to_string())).collect()
}

fn compare(stated: &BTreeSet<Refusal>, reported: &BTreeSet<Refusal>) -> Result<(), String> {
    let list = |these: &BTreeSet<Refusal>, others: &BTreeSet<Refusal>| {
        let lines = these.difference(others).map(|(line, text)| format!("line {line}: {text}"));
        lines.collect::<Vec<_>>().join(", ")
    };
    if stated.is_empty() {
        return Err("states no error; end a line in `//~ E0000` with the code".to_string());
    }
    if stated == reported {
        return Ok(());
    }
    let (missing, other) = (list(stated, reported), list(reported, stated));
    Err(format!("accepted by the compiler: [{missing}]; refused instead: [{other}]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(refusals: &[(usize, &str)]) -> BTreeSet<Refusal> {
        refusals.iter().map(|(line, text)| (*line, text.to_string())).collect()
    }

    #[test]
    fn programs_state_their_errors() {
        assert_eq!(stated("fn f() {\n    g(1); //~ E0308\n}\n"), set(&[(2, "E0308")]));
        assert!(stated("// E0308").is_empty());
    }

    #[test]
    fn messages_of_the_compiler() {
        let span = r#""spans":[{"is_primary":false,"line_start":1},{"is_primary":true,"line_start":7}]"#;
        let error = format!(r#"{{"level":"error","code":{{"code":"E0308"}},"message":"m",{span}}}"#);
        assert_eq!(refusal(&error), Some((7, "E0308".into())));
        let syntax = format!(r#"{{"level":"error","code":null,"message":"expected",{span}}}"#);
        assert_eq!(refusal(&syntax), Some((7, "expected".into())));
        assert_eq!(refusal(&error.replace("\"error\"", "\"warning\"")), None);
        let last = r#"{"level":"error","code":null,"message":"aborting due to 1 previous error","spans":[]}"#;
        assert_eq!(refusal(last), None);
        assert_eq!(refusal("not json"), None);
    }

    #[test]
    fn every_difference_is_told() {
        let one = set(&[(2, "E0308")]);
        assert_eq!(compare(&one, &one), Ok(()));
        assert!(compare(&set(&[]), &set(&[])).is_err());
        let told = compare(&one, &set(&[(3, "E0425")])).unwrap_err();
        assert!(told.contains("line 2: E0308") && told.contains("line 3: E0425"), "{told}");
    }
}
