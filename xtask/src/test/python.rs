//! `cargo xtask test python`: the Python package, built, installed and tested in a guest.
//!
//! It is a suite of its own, since its tests are Python's: they print what Rust's test harness prints.

use super::integration::guest_for_tests;
use super::libtest::Report;
use super::{Args, Summary, shown};
use crate::bench::python::{self, Packages};
use crate::cargo;
use crate::guest::Job;
use crate::host::{self, Need};
use crate::kernel::rxe::Rxe;
use crate::size::Size;
use crate::{process, project, ui};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
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
    let (mut python, mut programs) = (PathBuf::new(), Vec::new());
    super::step(summary, "Build of the Python package", || {
        python = installed()?;
        // A peer in Rust.
        let example = cargo::executable(&["build", "--example", "kv_cache"], "kv_cache")?;
        programs.push(("DMABUF_RDMA_KV_CACHE", example));
        programs.push(("DMABUF_RDMA_PROGRAM", cargo::executable(&["build"], "dmabuf-rdma")?));
        programs.push(("DMABUF_RDMA_STUB_CUDA", stub()?));
        Ok(())
    })?;
    super::step(summary, "Type stubs of the Python package", || {
        // Not in the project's folder, where the package has no native part.
        let mut stubtest = Command::new(&python);
        stubtest.args(["-m", "mypy.stubtest", "dmabuf_rdma"]).current_dir(project::target().join("python"));
        shown(&mut stubtest)
    })?;
    super::step(summary, "Tables of 100,000 blocks, natively", || {
        shown(Command::new(&python).arg("natively.py").current_dir(project::root().join("python/tests")))
    })?;
    let start = Instant::now();
    let words = ["-m", "pytest", "-v", "--durations=10", "-o", "faulthandler_timeout=300", "python/tests"]
        .map(String::from);
    let mut job =
        Job::new([vec![python.to_string_lossy().into_owned()], words.to_vec()].concat())?.for_tests();
    for (name, program) in &programs {
        job = job.env(name, &program.to_string_lossy());
    }
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

/// Installs the package, and returns the environment's Python. The suites share what the first one has built.
pub(super) fn installed() -> Result<PathBuf> {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    if let Some(python) = PYTHON.get() {
        return Ok(python.clone());
    }
    let python = PACKAGES.install()?;
    python::install_ours(&python, "dev")?;
    Ok(PYTHON.get_or_init(|| python).clone())
}

/// Builds the stub of CUDA's driver: in the guest the compiler takes a hundred times as long.
fn stub() -> Result<PathBuf> {
    let name = "libcuda.so.1";
    let library = project::target().join("python").join(name);
    let mut compiler = Command::new("gcc");
    compiler.args(["-shared", "-fPIC", "-O1", "-Wno-unused-function", &format!("-Wl,-soname,{name}")]);
    compiler.arg(project::root().join("tests/stubs/cuda.c")).arg("-o").arg(&library);
    process::output(&mut compiler)?;
    Ok(library)
}
