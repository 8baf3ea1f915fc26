//! `cargo xtask test python`: the Python package, built, installed and tested in a guest.
//!
//! It is a suite of its own, since its tests are Python's: they print what Rust's test harness prints.

use super::integration::guest_for_tests;
use super::libtest::Report;
use super::{Args, Summary, shown};
use crate::bench::python::Packages;
use crate::cargo;
use crate::guest::Job;
use crate::host::{self, Need};
use crate::kernel::rxe::Rxe;
use crate::size::Size;
use crate::{process, project, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What builds and tests it.
const PACKAGES: Packages = Packages {
    folder: "python",
    requirements: "python/tests/requirements.txt",
    purpose: "to test the Python package with",
    advice: "Without it, choose other tests by their names: cargo xtask test NAME",
    words: &[],
    others: &[],
};

pub(super) fn run(args: &Args, summary: &mut Summary) -> Result<()> {
    host::ensure(&[Need::Python])?;
    super::step(summary, "Clippy of the Python package", || {
        let mut clippy = project::cargo();
        shown(clippy.args(["clippy", "-p", "dmabuf-rdma-python", "--", "-D", "warnings"]))
    })?;
    let (mut python, mut example) = (PathBuf::new(), PathBuf::new());
    super::step(summary, "Build of the Python package", || {
        python = installed()?;
        // A peer in Rust.
        example = cargo::executable(&["build", "--example", "kv_cache"], "kv_cache")?;
        Ok(())
    })?;
    super::step(summary, "Type stubs of the Python package", || {
        // Not in the project's folder, where the package has no native part.
        let mut stubtest = Command::new(&python);
        stubtest.args(["-m", "mypy.stubtest", "dmabuf_rdma"]).current_dir(project::target().join("python"));
        shown(&mut stubtest)
    })?;
    let start = Instant::now();
    let words = ["-m", "pytest", "-v", "-o", "faulthandler_timeout=300", "python/tests"].map(String::from);
    let mut job =
        Job::new([vec![python.to_string_lossy().into_owned()], words.to_vec()].concat())?.for_tests();
    job = job.env("DMABUF_RDMA_KV_CACHE", &example.to_string_lossy());
    job.directory = project::root().to_path_buf();
    let guest = guest_for_tests(args, Rxe::Dmabuf, Size::gib(5))?;
    let outcome = guest.run(&job)?;
    crate::vm::report(&outcome);
    let report = Report::parse(&outcome.stdout);
    let took = ui::seconds(start.elapsed());
    if outcome.success() {
        ui::note("ok", &format!("Python: {} passed in {took}", report.passed));
    } else {
        ui::error(&format!("Python: {} failed after {took}", report.failed));
        if report.failed == 0 {
            summary.broken.push("Python".into());
        }
    }
    summary.add(&report);
    Ok(())
}

/// Builds the wheel, installs it, and returns the environment's Python.
fn installed() -> Result<PathBuf> {
    let python = PACKAGES.install()?;
    let wheels = project::target().join("python/wheels");
    crate::lock::remove(&wheels)?;
    let mut maturin = Command::new(&python);
    maturin.args(["-m", "maturin", "build", "--quiet", "-m", "python/Cargo.toml", "-o"]).arg(&wheels);
    shown(maturin.arg("-i").arg(&python).current_dir(project::root()))?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]);
    process::output(pip.args(["--no-deps", "--no-index", "--force-reinstall"]).arg(wheel(&wheels)?))?;
    Ok(python)
}

/// The only wheel in a folder.
fn wheel(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let paths: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    match paths
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "whl"))
        .collect::<Vec<_>>()
    {
        mut all if all.len() == 1 => Ok(all.remove(0)),
        all => bail!("maturin left {} wheels in {} instead of one", all.len(), folder.display()),
    }
}
