//! Locks and staging folders, for several xtasks that prepare the same files.

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::path::{Path, PathBuf};

/// A file lock. The kernel releases it when it is dropped or the process dies.
pub struct Lock {
    _file: File,
}

/// Takes the lock on `path`. Prints a note if it must wait.
pub fn exclusive(path: &Path) -> Result<Lock> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        crate::ui::note("Waiting", &format!("for another cargo xtask, which holds {}", path.display()));
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(Lock { _file: file })
}

/// A temporary folder that gets its final name only when it is complete, so an
/// interrupted run leaves no folder that looks complete.
pub struct Staging {
    path: PathBuf,
}

impl Staging {
    /// Creates an empty folder beside `target`. The caller holds the lock.
    pub fn beside(target: &Path) -> Result<Staging> {
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let path = target.with_file_name(name);
        remove(&path)?;
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Staging { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renames the folder to `target`, replacing an older one.
    pub fn finish(self, target: &Path) -> Result<()> {
        remove(target)?;
        std::fs::rename(&self.path, target).with_context(|| format!("cannot create {}", target.display()))
    }
}

/// Removes a folder and its contents, if it exists.
pub fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
