//! The folder of a run: files that host and guest share, and logs.

use crate::{lock, project, ui};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// The folder of a run. Removed when dropped; [`keep_logs`](Self::keep_logs) saves the logs.
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    pub fn new() -> Result<RunDir> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let home = home();
        fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
        remove_stale(&home);
        let name = format!("run-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let run = RunDir { path: home.join(name) };
        lock::remove(&run.path)?;
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
        let to =
            to.map_or_else(|| home().join(format!("out-{now}-{}", std::process::id())), Path::to_path_buf);
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

/// Removes the folders of runs that were killed.
fn remove_stale(home: &Path) {
    for entry in fs::read_dir(home).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("run-").and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
