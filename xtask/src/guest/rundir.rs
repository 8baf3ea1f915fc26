//! The folder of a run: files that host and guest share, and logs.

use crate::lock::{self, Lock};
use crate::{project, ui};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const PREFIX: &str = "run-";

/// The folder of a run. Removed when dropped; [`keep_logs`](Self::keep_logs) saves the logs.
pub struct RunDir {
    path: PathBuf,
    /// Tells that the run goes on, also to a process in another container.
    _lock: Lock,
}

impl RunDir {
    pub fn new() -> Result<RunDir> {
        RunDir::below(&home())
    }

    fn below(home: &Path) -> Result<RunDir> {
        // A new folder must not look abandoned before it is locked.
        let _lock = lock::exclusive(&home.join("lock"))?;
        remove_abandoned(home);
        let path = lock::new_folder(home, |unique| format!("{PREFIX}{unique}"))?;
        let run = RunDir { _lock: lock::folder(&path)?, path };
        fs::create_dir_all(run.out()).with_context(|| format!("cannot create {}", run.path.display()))?;
        Ok(run)
    }

    /// The folder that the guest can read and write.
    pub fn share(&self) -> PathBuf {
        self.path.join("share")
    }

    /// The job's `$OUT`.
    pub fn out(&self) -> PathBuf {
        self.path.join("share/out")
    }

    /// The guest kernel's console.
    pub fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// QEMU's own output.
    pub fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }

    /// Copies the logs to the folder of the last run and returns it.
    pub fn keep_logs(&self) -> PathBuf {
        let last = home().join("last");
        // Several runs may end at once: the last one wins and none fails.
        let _ = fs::create_dir_all(&last);
        for log in [self.console(), self.qemu_log(), self.share().join("dmesg.log")] {
            if let Some(name) = log.file_name() {
                let _ = fs::remove_file(last.join(name));
                let _ = fs::copy(&log, last.join(name));
            }
        }
        last
    }

    /// Moves the contents of `$OUT` to `to` or to a new folder, and returns that
    /// folder; `None` if `$OUT` is empty.
    pub fn take_out(&self, to: Option<&Path>) -> Result<Option<PathBuf>> {
        if fs::read_dir(self.out())?.next().is_none() {
            return Ok(None);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let to = match to {
            Some(to) => to.to_path_buf(),
            None => lock::new_folder(&home(), |unique| format!("out-{now}-{unique}"))?,
        };
        fs::create_dir_all(&to).with_context(|| format!("cannot create {}", to.display()))?;
        for entry in fs::read_dir(self.out())? {
            let entry = entry?;
            let target = to.join(entry.file_name());
            move_entry(&entry.path(), &target)
                .with_context(|| format!("cannot write {}", target.display()))?;
        }
        Ok(Some(to))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = lock::remove(&self.path) {
            ui::warn(&format!("{error:#}"));
        }
    }
}

fn home() -> PathBuf {
    project::target().join("vm")
}

/// Renames a file or folder, or copies it to another file system.
fn move_entry(from: &Path, to: &Path) -> std::io::Result<()> {
    if to.is_dir() {
        fs::remove_dir_all(to)?;
    }
    if fs::rename(from, to).is_ok() {
        return Ok(());
    }
    if from.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            move_entry(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    fs::copy(from, to).map(|_| ())
}

/// Removes the folders of runs that were killed: nobody holds their locks.
fn remove_abandoned(home: &Path) {
    for entry in fs::read_dir(home).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(PREFIX)
            && let Some(_lock) = lock::try_folder(&path)
        {
            let _ = lock::remove(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_abandoned_folders_are_removed() {
        let home = lock::new_folder(&std::env::temp_dir(), |unique| format!("xtask-runs-{unique}")).unwrap();
        // The process of this number lives, but not as a run.
        let old = home.join(format!("{PREFIX}{}-0", std::process::id()));
        fs::create_dir_all(old.join("share")).unwrap();
        fs::create_dir(home.join("out-1")).unwrap();
        let first = RunDir::below(&home).unwrap();
        assert!(!old.exists() && home.join("out-1").exists());
        let second = RunDir::below(&home).unwrap();
        assert!(first.out().is_dir() && second.out().is_dir());
        let path = first.path.clone();
        drop(first);
        assert!(!path.exists() && second.path.exists());
        drop(second);
        fs::remove_dir_all(home).unwrap();
    }
}
