//! `cargo xtask test --gpu`: the exporters' cases on this machine's own GPUs, and a report that a person can send.

use super::libtest::{Report, Verdict, parse_list};
use super::{Summary, integration, tee};
use crate::{cargo, process, project, ui};
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::fs;
use std::process::Command;

/// The module of the tests, in the binary of the integration tests.
pub const MODULE: &str = "on_gpu::";
/// Those that also need an RDMA device.
const REGISTERED: &str = "on_gpu::registered::";

pub(super) fn run(filter: &[String], summary: &mut Summary) -> Result<()> {
    let step = ui::Step::start("Building", "the tests");
    let binary = cargo::executable(&["test", "--no-run", "--test", integration::TARGET], integration::TARGET)
        .inspect_err(|_| summary.broken.push("building the tests".into()))?;
    step.done("Built", "the tests");
    let list = parse_list(&process::output(Command::new(&binary).arg("--list"))?);
    let wanted = |name: &&String| {
        name.starts_with(MODULE)
            && (filter.is_empty() || filter.iter().any(|part| name.contains(part.as_str())))
    };
    let (mut tests, mut skipped) = (Vec::new(), Vec::new());
    for name in list.iter().filter(wanted) {
        let of = if name.starts_with(REGISTERED) && !rdma_device() { &mut skipped } else { &mut tests };
        of.push(name.clone());
    }
    let lines = project::target().join("gpu-report.lines");
    let _ = fs::remove_file(&lines);
    let mut command = Command::new(&binary);
    command.args(["--test-threads=1", "--exact"]).args(&tests).current_dir(project::root());
    let (output, _) = tee(command.env("DMABUF_RDMA_REPORT", &lines))?;
    let results = Report::parse(&output);
    let report =
        report(&commit(), &fs::read_to_string(&lines).unwrap_or_default(), &tests, &skipped, &output);
    let _ = fs::remove_file(&lines);
    let path = project::target().join("gpu-report.txt");
    fs::write(&path, &report).with_context(|| format!("cannot write {}", path.display()))?;
    println!("\n{report}");
    ui::note("Report", &format!("{}; please send it, whatever it says", path.display()));
    summary.missed.extend(tests.into_iter().filter(|name| !results.tests.contains_key(name)));
    let reason = "needs an RDMA device on this machine";
    summary.skipped.extend(skipped.into_iter().map(|name| (name, reason)));
    summary.add(&results);
    Ok(())
}

/// The report: facts of the machine, each case with its result, what the drivers did, and the messages of failures.
fn report(commit: &str, lines: &str, tests: &[String], skipped: &[String], output: &str) -> String {
    let results = Report::parse(output);
    let mut text = format!("dmabuf-rdma {} on GPUs, commit {commit}\n", env!("CARGO_PKG_VERSION"));
    let of = |kind: &str| -> Vec<String> {
        lines.lines().filter_map(|line| line.strip_prefix(kind)).map(str::to_string).collect()
    };
    let mut section = |title: &str, lines: Vec<String>| {
        let lines = if lines.is_empty() { vec!["none".to_string()] } else { lines };
        let _ = write!(text, "\n{title}\n  {}\n", lines.join("\n  "));
    };
    section("Machine", of("machine: "));
    let case = |name: &String| {
        let verdict = match results.tests.get(name) {
            Some(Verdict::Passed) => "passed",
            Some(Verdict::Failed) => "FAILED",
            Some(Verdict::Ignored) | None => "NEVER RAN",
        };
        format!("{verdict:9} {}", name.trim_start_matches(MODULE))
    };
    let cases = tests.iter().map(case);
    let without = skipped
        .iter()
        .map(|name| format!("not run   {}, without an RDMA device", name.trim_start_matches(MODULE)));
    section("Cases", cases.chain(without).collect());
    section("What the drivers did", of("note: "));
    let failures = output.split_once("\nfailures:\n").map(|(_, rest)| rest).unwrap_or_default();
    section(
        "Messages of failures",
        failures.lines().map(str::to_string).take_while(|line| line != "failures:").collect(),
    );
    text
}

fn commit() -> String {
    let mut git = Command::new("git");
    git.args(["describe", "--always", "--dirty"]).current_dir(project::root());
    process::output(&mut git).map_or("unknown".into(), |text| text.trim().to_string())
}

/// Whether this machine has an RDMA device.
fn rdma_device() -> bool {
    fs::read_dir("/sys/class/infiniband").is_ok_and(|mut all| all.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_the_machine_and_every_case() {
        let lines = "machine: kernel: 6.12\nnote: CUDA: SYNC_MEMOPS: true\nmachine: page size: 4096\n";
        let tests = ["on_gpu::allocates", "on_gpu::mapped::exact", "on_gpu::gone"].map(String::from);
        let output = "running 3 tests\ntest on_gpu::allocates ... ok\ntest on_gpu::mapped::exact ... FAILED\n\nfailures:\n\n---- on_gpu::mapped::exact stdout ----\nleft: 1\n\nfailures:\n    on_gpu::mapped::exact\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let skipped = ["on_gpu::registered::wire".to_string()];
        let text = report("abc", lines, &tests, &skipped, output);
        for part in [
            "Machine\n  kernel: 6.12\n  page size: 4096\n",
            "Cases\n  passed    allocates\n  FAILED    mapped::exact\n  NEVER RAN gone\n  not run   registered::wire, without",
            "What the drivers did\n  CUDA: SYNC_MEMOPS: true\n",
            "---- on_gpu::mapped::exact stdout ----\n  left: 1",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert_eq!(text.matches("failures:").count(), 0);
        assert!(report("abc", "", &[], &[], "").contains("Machine\n  none\n"));
    }
}
