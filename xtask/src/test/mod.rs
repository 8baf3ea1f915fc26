//! `cargo xtask test`: everything that must hold before a change goes in.

mod c;
mod features;
mod gpu;
mod integration;
mod libtest;
mod python;
pub mod refused;

use crate::cargo::{self, EVERYTHING};
use crate::host::{self, Need};
use crate::kernel::lines;
use crate::{api, kernel, lavapipe, process, project, ui};
use anyhow::{Context, Result, bail};
use libtest::Report;
use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Instant;

/// Format, lints, features, documentation, the public API, unit tests, doctests and programs that must not
/// compile; then the integration tests in guests, and the suites of the Python package (`python`) and of the
/// C library (`c`).
#[derive(clap::Args)]
pub struct Args {
    /// Run the integration tests on this machine's RDMA devices, without a guest
    #[arg(long)]
    host: bool,
    /// Run only the exporters' tests on this machine's own GPUs and drivers, and print a report
    #[arg(long, conflicts_with_all = ["host", "siw", "long"])]
    gpu: bool,
    /// Also run the tests that take minutes
    #[arg(long)]
    long: bool,
    /// Run only the integration tests of soft-iWARP
    #[arg(long, conflicts_with = "host")]
    siw: bool,
    /// Series of Debian kernels in the guests, or `debug` for one that checks itself
    #[arg(long, default_value = lines::LINUX_6_12.line)]
    kernel: String,
    /// Timeout for each guest in seconds [default: 1200, with --long or --kernel debug 5400]
    #[arg(long, value_name = "SECS")]
    timeout: Option<u64>,
    /// Run only the integration tests whose names contain one of these, or a suite by its name
    filter: Vec<String>,
}

/// The suites that are no Rust tests, by the names that a filter chooses them with.
type Suite = fn(&Args, &mut Summary) -> Result<()>;
const SUITES: &[(&str, Suite)] = &[("python", python::run), ("c", c::run)];

impl Args {
    /// The filters for the integration tests; `None` if only suites are wanted.
    fn integration_filter(&self) -> Option<Vec<&str>> {
        let names = |part: &&String| !SUITES.iter().any(|(name, _)| name == part);
        let filter: Vec<&str> = self.filter.iter().filter(names).map(String::as_str).collect();
        (!filter.is_empty() || self.filter.is_empty()).then_some(filter)
    }

    /// The suites to run. Those of a special guest or machine are Rust's alone.
    fn suites(&self) -> impl Iterator<Item = Suite> {
        let usual = !self.host && !self.siw && self.kernel == lines::LINUX_6_12.line;
        let wanted = move |name: &str| {
            self.filter.iter().any(|part| part == name) || (usual && self.filter.is_empty())
        };
        SUITES.iter().filter(move |(name, _)| wanted(name)).map(|(_, suite)| *suite)
    }
}

/// What happened so far.
#[derive(Default)]
struct Summary {
    report: Report,
    /// Tests that failed, by name.
    failures: Vec<String>,
    /// Steps that failed without a failing test to show for it.
    broken: Vec<String>,
    /// Tests that did not run in any place, without a reason.
    missed: Vec<String>,
    /// Tests that did not run, with the reason.
    skipped: Vec<(String, &'static str)>,
    /// Steps that this machine cannot run, with the reason.
    unable: Vec<(&'static str, String)>,
}

impl Summary {
    fn add(&mut self, report: &Report) {
        self.failures.extend(report.failures().map(str::to_string));
        self.report.add(report);
    }
}

pub fn run(args: Args) -> Result<ExitCode> {
    let start = Instant::now();
    let mut summary = Summary::default();
    if let Err(error) = all(&args, &mut summary) {
        ui::error(&format!("{error:#}"));
        if summary.broken.is_empty() && summary.report.failed == 0 {
            summary.broken.push("set-up".to_string());
        }
    }
    Ok(close(&summary, start))
}

/// All steps in order; an error ends them.
fn all(args: &Args, summary: &mut Summary) -> Result<()> {
    if args.gpu {
        host::ensure(&[Need::Library])?;
        return gpu::run(&args.filter, summary);
    }
    let needs: &[Need] = match args.host {
        true => &[Need::Library, Need::Peers],
        false => &[Need::Library, Need::Peers, Need::Guest],
    };
    host::ensure(needs)?;
    let kernel = lines::by_name(&args.kernel)?;
    let debug = kernel.configuration.is_some();
    if debug {
        host::ensure(&[Need::KernelBuild])?;
    }
    // Downloads go on beside the checks. Who needs a kernel waits for it, and reports what went wrong.
    if !args.host && !debug {
        let everything = args.filter.is_empty() && !args.siw;
        thread::spawn(move || {
            let fetched = kernel::unpacked(kernel);
            if everything && fetched.is_ok() {
                let _ = lavapipe::environment();
                let _ = kernel::unpacked(kernel.beside(&lines::LINUX_7));
            }
        });
    }
    // Cheap steps first; each ends the run when it fails. The kernel makes no difference to them.
    if args.filter.is_empty() && !args.siw && !debug {
        checks(summary)?;
        if args.long {
            many_cases(summary)?;
        }
    }
    if let Some(filter) = args.integration_filter() {
        integration::run(args, &filter, summary)?;
    }
    args.suites().try_for_each(|suite| suite(args, summary))
}

fn checks(summary: &mut Summary) -> Result<()> {
    step(summary, "Format", || {
        cargo::need_component("fmt", "rustfmt")?;
        shown(project::cargo().args(["fmt", "--all", "--check"]))
    })?;
    step(summary, "Clippy", || {
        cargo::need_component("clippy", "clippy")?;
        let lint = |targets: &[&str]| {
            let mut clippy = project::cargo();
            shown(clippy.arg("clippy").args(EVERYTHING).args(targets).args(["--", "-D", "warnings"]))
        };
        lint(&["--all-targets"])?;
        // Kept out of plain `cargo test`, and thereby out of --all-targets.
        lint(&["--test", integration::TARGET])
    })?;
    step(summary, "Features", features::check)?;
    step(summary, "Documentation", || {
        let mut doc = project::cargo();
        doc.env("RUSTDOCFLAGS", "-D warnings");
        shown(doc.args(["doc", "--no-deps"]).args(EVERYTHING))
    })?;
    let mut unable = None;
    step(summary, "Public API", || {
        unable = api::check(false)?;
        Ok(())
    })?;
    summary.unable.extend(unable.map(|reason| ("Public API", reason)));
    for (name, targets) in
        [("Unit tests", ["--lib", "--bins", "--tests"].as_slice()), ("Doctests", &["--doc"])]
    {
        tests(summary, name, |report| {
            let mut test = project::cargo();
            // Every binary runs, so that the summary counts what there is.
            let (output, success) =
                tee(test.arg("test").args(EVERYTHING).arg("--no-fail-fast").args(targets))?;
            *report = Report::parse(&output);
            if !success {
                bail!("{name} failed");
            }
            Ok(())
        })?;
    }
    tests(summary, "Programs that must not compile", |report| {
        *report = refused::check()?;
        if report.failed > 0 {
            bail!("the compiler does not refuse what tests/ui says");
        }
        Ok(())
    })
}

/// A step that consists of tests, which the summary counts.
fn tests(summary: &mut Summary, name: &str, run: impl FnOnce(&mut Report) -> Result<()>) -> Result<()> {
    let mut report = Report::default();
    let result = step(summary, name, || run(&mut report));
    // The tests that failed say it better than the step.
    if report.failed > 0 {
        summary.broken.pop();
    }
    summary.add(&report);
    result
}

/// Input of any kind, a million times for each property that takes it; `tests::any_` is what they are called.
fn many_cases(summary: &mut Summary) -> Result<()> {
    step(summary, "A million cases", || {
        let mut test = project::cargo();
        test.args([
            "test",
            "--release",
            "--workspace",
            "--exclude",
            "dmabuf-rdma-python",
            "--lib",
            "tests::any_",
        ])
        .env("PROPTEST_CASES", "1000000");
        shown(&mut test)
    })
}

/// One step with its verdict in one line.
fn step(summary: &mut Summary, name: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    let result = run();
    let took = ui::seconds(start.elapsed());
    match result {
        Ok(()) => {
            ui::note("ok", &format!("{name} in {took}"));
            Ok(())
        }
        Err(error) => {
            summary.broken.push(name.to_string());
            Err(error.context(format!("{name}: failed after {took}")))
        }
    }
}

/// Runs the command and shows its output.
fn shown(command: &mut Command) -> Result<()> {
    let text = process::shown(command);
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot run `{text}`"))?;
    if !status.success() {
        bail!("`{text}` failed ({status})");
    }
    Ok(())
}

/// Runs the command, shows its output, and returns the output and whether the command succeeded.
fn tee(command: &mut Command) -> Result<(String, bool)> {
    let text = process::shown(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{text}`"))?;
    let mut stdout = child.stdout.take().context("no output")?;
    let mut all = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        let n = stdout.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        all.extend(&buffer[..n]);
        let mut ours = std::io::stdout().lock();
        ours.write_all(&buffer[..n])?;
        ours.flush()?;
    }
    let success = child.wait()?.success();
    Ok((String::from_utf8_lossy(&all).into_owned(), success))
}

/// The closing summary. Its last line is for programs too.
fn close(summary: &Summary, start: Instant) -> ExitCode {
    let report = &summary.report;
    println!();
    for name in summary.failures.iter().chain(&summary.broken) {
        println!("failed: {name}");
    }
    for name in &summary.missed {
        println!("never ran: {name}");
    }
    for (name, reason) in &summary.skipped {
        println!("not run: {name} ({reason})");
    }
    for (step, reason) in &summary.unable {
        println!("not run: {step} ({reason})");
    }
    let failed = report.failed + summary.broken.len() + summary.missed.len();
    let skipped = summary.skipped.len() + summary.unable.len();
    let verdict = if failed == 0 { "all checks passed" } else { "some checks failed" };
    println!("{verdict}, after {}", ui::seconds(start.elapsed()));
    let tail = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
    println!("{} passed, {failed} failed{tail}", report.passed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn a_filter_names_suites_and_parts_of_tests() {
        let chosen = |words: &[&str]| {
            let args = Cli::parse_from(["test"].iter().chain(words)).args;
            let filter = args.integration_filter().map(|all| all.join(" "));
            (filter, args.suites().count())
        };
        assert_eq!(chosen(&[]), (Some(String::new()), SUITES.len()));
        assert_eq!(chosen(&["python"]), (None, 1));
        assert_eq!(chosen(&["cache", "python", "sets", "c"]), (Some("cache sets".into()), 2));
        assert_eq!(chosen(&["--siw"]), (Some(String::new()), 0));
    }
}
