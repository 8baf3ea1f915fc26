//! The command that runs in the guest, as files for its second stage.

use crate::process::quote;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// A command with where and with what it runs.
#[derive(Clone, Debug)]
pub struct Job {
    pub command: Vec<String>,
    pub directory: PathBuf,
    pub environment: Vec<(String, String)>,
}

/// Variables that mean the same in the guest, which has the host's files.
const KEPT: &[&str] = &[
    "HOME",
    "USER",
    "LOGNAME",
    "PATH",
    "LANG",
    "LANGUAGE",
    "TERM",
    "COLORTERM",
    "NO_COLOR",
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "RUSTUP_HOME",
    "RUST_BACKTRACE",
    "RUST_LIB_BACKTRACE",
    "RUST_LOG",
    "RUST_MIN_STACK",
];

/// Families of variables that are meant for programs under test.
const KEPT_PREFIXES: &[&str] =
    &["LC_", "CLICOLOR", "RUST_TEST_", "DMABUF_RDMA_", "BENCH_", "VK_", "LP_", "MESA_"];

impl Job {
    /// The command in this process's directory, with what the guest should
    /// know of its environment.
    pub fn new(command: Vec<String>) -> Result<Job> {
        let environment = std::env::vars()
            .filter(|(name, _)| {
                KEPT.contains(&name.as_str()) || KEPT_PREFIXES.iter().any(|p| name.starts_with(p))
            })
            .collect();
        let directory = std::env::current_dir().context("the current directory is gone")?;
        Ok(Job { command, directory, environment })
    }

    pub fn env(mut self, name: &str, value: &str) -> Job {
        self.environment.retain(|(n, _)| n != name);
        self.environment.push((name.to_string(), value.to_string()));
        self
    }

    /// The shell script that is this job.
    fn script(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.environment {
            // Made by the guest itself.
            if name != "OUT" {
                text += &format!("export {name}={}\n", quote(value));
            }
        }
        // Root needs the administrator's programs, whoever called.
        text += "PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin\n";
        let words: Vec<String> = self.command.iter().map(|word| quote(word)).collect();
        text += &format!("cd {} || exit 127\n", quote(&self.directory.to_string_lossy()));
        text += &format!("exec {}\n", words.join(" "));
        text
    }

    /// Writes it into the folder that the guest sees, with what else its
    /// second stage has to know.
    pub fn write(&self, share: &Path, settings: &[(&str, String)]) -> Result<()> {
        let lines: String = settings.iter().map(|(n, v)| format!("{n}={}\n", quote(v))).collect();
        for (name, text) in [("job", self.script()), ("settings", lines)] {
            let path = share.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_a_script_that_keeps_words_and_values() {
        let job = Job {
            command: vec!["sh".into(), "-c".into(), "echo \"$A\"; pwd; exit 7".into()],
            directory: "/".into(),
            environment: vec![("A".into(), "two 'words'".into()), ("PATH".into(), "/bin".into())],
        };
        let out = std::process::Command::new("sh").arg("-c").arg(job.script()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&out.stdout), "two 'words'\n/\n");
        assert_eq!(out.status.code(), Some(7));
    }
}
