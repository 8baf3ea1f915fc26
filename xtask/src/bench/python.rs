//! Python packages that a benchmark compares with or a test uses, in a virtual environment under `target/`.

use crate::{lock, process, project, ui};
use anyhow::{Context, Result, anyhow};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Packages with pinned versions.
pub struct Packages {
    /// The folder in `target/`.
    pub folder: &'static str,
    /// Path of pip's list, from the project's root. Each line is a package with its version.
    pub requirements: &'static str,
    /// What they are for, and what to do without one.
    pub purpose: &'static str,
    pub advice: &'static str,
    /// The benchmark's arguments that choose peers among them, and those that choose other peers.
    pub words: &'static [&'static str],
    pub others: &'static [&'static str],
}

impl Packages {
    /// Whether the benchmark, with these arguments, compares with them.
    pub fn wanted(&self, arguments: &[String]) -> bool {
        let any = |words: &[&str]| arguments.iter().any(|word| words.contains(&word.as_str()));
        any(self.words) || !any(self.others)
    }

    /// Installs what is missing and returns the environment's Python.
    pub fn install(&self) -> Result<PathBuf> {
        let home = project::target().join(self.folder);
        let list = fs::read_to_string(project::root().join(self.requirements))
            .with_context(|| format!("cannot read {}", self.requirements))?;
        let (environment, key) = (home.join("venv"), home.join("installed"));
        let python = environment.join("bin/python");
        let current = || fs::read_to_string(&key).is_ok_and(|text| text == list) && python.exists();
        if current() {
            return Ok(python);
        }
        let _lock = lock::exclusive(&home.with_extension("lock"))?;
        if current() {
            return Ok(python);
        }
        lock::remove(&home)?;
        fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
        let step = ui::Step::start("Installing", &format!("the Python packages {}", self.purpose));
        process::output(Command::new("python3").args(["-m", "venv"]).arg(&environment))
            .context("cannot make a virtual environment; on Debian, install python3-venv")?;
        for package in packages(&list) {
            self.fetch(&python, package)?;
        }
        fs::write(&key, &list).with_context(|| format!("cannot write {}", key.display()))?;
        step.done("Installed", &packages(&list).collect::<Vec<_>>().join(" "));
        Ok(python)
    }

    /// One at a time, so that a failure names the package. Without dependencies, which the list has as far as
    /// they are needed, and only as wheels: no compiler runs here.
    fn fetch(&self, python: &Path, package: &str) -> Result<()> {
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]);
        pip.args(["--no-deps", "--only-binary", ":all:", package]);
        let refused = |error: anyhow::Error| {
            anyhow!(
                "cannot get a wheel of {package}, one of the Python packages {}.\npip needs a package index that has it \
                 for this machine's Python and processor.\n{}.\n\n{error:#}",
                self.purpose,
                self.advice
            )
        };
        process::output(&mut pip).map(drop).map_err(refused)
    }
}

/// Builds the project's own package and installs it, as `pip install ./python` does, but with the maturin that the
/// environment has.
pub fn install_ours(python: &Path, profile: &str) -> Result<()> {
    let programs = python.parent().context("an interpreter has no folder")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = [programs.to_path_buf()].into_iter().chain(std::env::split_paths(&path));
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]);
    pip.args(["--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall"]);
    pip.arg(project::root().join("python")).env("MATURIN_PEP517_ARGS", format!("--profile {profile}"));
    process::output(pip.env("PATH", std::env::join_paths(all)?)).map(drop)
}

/// The packages of pip's list.
fn packages(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGES: Packages = Packages {
        folder: "f",
        requirements: "r",
        purpose: "to test",
        advice: "None",
        words: &["a", "b"],
        others: &["c", "d"],
    };

    #[test]
    fn packages_are_wanted_unless_others_are_chosen() {
        let wanted = |line: &str| {
            let words: Vec<String> = line.split_whitespace().map(str::to_string).collect();
            PACKAGES.wanted(&words)
        };
        assert!(wanted("") && wanted("--quick 4k") && wanted("a") && wanted("c b"));
        assert!(!wanted("c") && !wanted("--quick 4k d c"));
    }

    #[test]
    fn comments_are_no_packages() {
        assert_eq!(packages("# why\na==1\n\n b==2\n").collect::<Vec<_>>(), ["a==1", "b==2"]);
    }
}
