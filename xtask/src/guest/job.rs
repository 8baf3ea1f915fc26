//! The command that runs in the guest, as files for the guest's `main.sh`.

use crate::process::quote;
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// A command with its directory and environment.
#[derive(Clone, Debug)]
pub struct Job {
    pub command: Vec<String>,
    pub directory: PathBuf,
    pub environment: Vec<(String, String)>,
}

/// Variables to pass to the guest. They stay valid there, since it has the host's files.
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

/// Prefixes of variables for programs under test.
const KEPT_PREFIXES: &[&str] =
    &["LC_", "CLICOLOR", "RUST_TEST_", "DMABUF_RDMA_", "BENCH_", "VK_", "LP_", "MESA_"];

/// Those for Vulkan.
const VULKAN_PREFIXES: &[&str] = &["VK_", "LP_", "MESA_"];

/// The device that the provider pretends to be; see `provider/`.
const PROFILE: &str = "DMABUF_RDMA_PROFILE";

/// The variables to pass. One that is not UTF-8 cannot be written into the script, and no program needs it.
fn kept(variables: impl Iterator<Item = (OsString, OsString)>) -> Vec<(String, String)> {
    let text =
        variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    text.filter(|(name, _)| {
        KEPT.contains(&name.as_str()) || KEPT_PREFIXES.iter().any(|p| name.starts_with(p))
    })
    .collect()
}

impl Job {
    /// The command in this process's directory, with the variables to pass.
    pub fn new(command: Vec<String>) -> Result<Job> {
        let environment = kept(std::env::vars_os());
        let directory = std::env::current_dir().context("the current directory is gone")?;
        Ok(Job { command, directory, environment })
    }

    /// The job without the variables that choose Vulkan's drivers and layers or the provider's profile, and in the
    /// language C: a test must not depend on how the user has set up this machine.
    pub fn for_tests(mut self) -> Job {
        let chooses = |name: &str| name == PROFILE || VULKAN_PREFIXES.iter().any(|p| name.starts_with(p));
        self.environment.retain(|(name, _)| !chooses(name));
        self.env("LC_ALL", "C")
    }

    pub fn env(mut self, name: &str, value: &str) -> Job {
        self.environment.retain(|(n, _)| n != name);
        self.environment.push((name.to_string(), value.to_string()));
        self
    }

    /// Puts a folder before those in which the dynamic linker looks.
    pub fn library_path(self, folder: &Path) -> Job {
        const NAME: &str = "LD_LIBRARY_PATH";
        let mut value = folder.to_string_lossy().into_owned();
        if let Some((_, others)) = self.environment.iter().find(|(name, _)| name == NAME) {
            value += &format!(":{others}");
        }
        self.env(NAME, &value)
    }

    /// The job as a shell script.
    fn script(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.environment {
            // The guest sets OUT itself.
            if name != "OUT" {
                text += &format!("export {name}={}\n", quote(value));
            }
        }
        // The job runs as root, so it needs the sbin folders too.
        text += "PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin\n";
        let words: Vec<String> = self.command.iter().map(|word| quote(word)).collect();
        text += &format!("cd {} || exit 127\n", quote(&self.directory.to_string_lossy()));
        text += &format!("exec {}\n", words.join(" "));
        text
    }

    /// Writes the job and the settings of `main.sh` to the folder that the guest sees.
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
    fn variables_of_any_bytes_are_passed_or_left_out() {
        use std::os::unix::ffi::OsStringExt;
        let odd = OsString::from_vec(vec![b'a', 0xff]);
        let variables = [
            ("LC_ALL".into(), "de_DE".into()),
            ("VK_DRIVER_FILES".into(), "/nowhere".into()),
            (PROFILE.into(), "efa".into()),
            ("HOME".into(), odd.clone()),
            (odd, "value".into()),
            ("LD_PRELOAD".into(), "libx.so".into()),
        ];
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        let environment = kept(variables.into_iter());
        let kept = [pair("LC_ALL", "de_DE"), pair("VK_DRIVER_FILES", "/nowhere"), pair(PROFILE, "efa")];
        assert_eq!(environment, kept);
        let job = Job { command: Vec::new(), directory: "/".into(), environment };
        let job = job.for_tests();
        assert_eq!(job.environment, [pair("LC_ALL", "C")]);
        let job = job.library_path("/b".as_ref()).library_path("/a".as_ref());
        assert_eq!(job.environment[1], pair("LD_LIBRARY_PATH", "/a:/b"));
    }

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
