//! Builds with cargo and finds the executables.

use crate::{process, project};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Every build uses the same features, or cargo would build dependencies twice. The bindings for other languages are
/// suites of their own.
pub const EVERYTHING: &[&str] = &["--workspace", "--exclude", "dmabuf-rdma-python", "--all-features"];

/// Builds with everything else and returns the executable of the target called `name`.
///
/// `arguments` start with cargo's subcommand. cargo's messages go to stderr.
pub fn executable(arguments: &[&str], name: &str) -> Result<PathBuf> {
    built(&[arguments, EVERYTHING].concat(), name)
}

/// Builds the program `dmabuf-rdma` and nothing that it does not need, and returns its executable.
pub fn program() -> Result<PathBuf> {
    built(&["build", "--package", "dmabuf-rdma-cli"], "dmabuf-rdma")
}

fn built(arguments: &[&str], name: &str) -> Result<PathBuf> {
    let mut command = project::cargo();
    command.args(arguments).arg("--message-format=json-render-diagnostics");
    let text = process::shown(&command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{text}`"))?;
    let stdout = child.stdout.take().context("cargo has no output")?;
    let mut found = None;
    for line in BufReader::new(stdout).lines() {
        found = executable_in(&line?, name).or(found);
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("`{text}` failed ({status})");
    }
    found
        .with_context(|| format!("`{text}` built no executable called {name}; is it a target in Cargo.toml?"))
}

/// The executable in a JSON message of cargo, if it belongs to target `name`.
fn executable_in(message: &str, name: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" || message["target"]["name"] != name {
        return None;
    }
    message["executable"].as_str().map(PathBuf::from)
}

/// Fails, and says what to install, if cargo lacks a component.
pub fn need_component(command: &str, component: &str) -> Result<()> {
    let mut version = project::cargo();
    version.args([command, "--version"]);
    if succeeds(&mut version) {
        return Ok(());
    }
    bail!("`cargo {command}` is missing; install it with `rustup component add {component}`")
}

fn succeeds(command: &mut Command) -> bool {
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_cargo() {
        let line = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"integration"},"executable":"/t/i-1"}"#;
        assert_eq!(executable_in(line, "integration"), Some("/t/i-1".into()));
        assert_eq!(executable_in(line, "other"), None);
        let line = r#"{"reason":"compiler-artifact","target":{"name":"integration"},"executable":null}"#;
        assert_eq!(executable_in(line, "integration"), None);
        assert_eq!(executable_in("not json", "integration"), None);
    }
}
