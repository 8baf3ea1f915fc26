//! One task at a time where several terminals would prepare the same thing.

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Held until dropped; the kernel drops it too when the process dies.
pub struct Lock {
    _file: File,
}

/// Waits for the lock kept in `path`, saying so when somebody else has it.
pub fn exclusive(path: &Path) -> Result<Lock> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        crate::ui::note("Waiting", "for another cargo xtask that prepares the same");
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(Lock { _file: file })
}

/// A folder to build something in, which takes its final name only when it is
/// complete, so that an interrupted run leaves nothing that looks finished.
pub struct Staging {
    path: PathBuf,
}

impl Staging {
    /// An empty folder beside `target`. Call with the lock held.
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

    /// Gives it its name; an older one there is replaced.
    pub fn finish(self, target: &Path) -> Result<()> {
        remove(target)?;
        std::fs::rename(&self.path, target).with_context(|| format!("cannot create {}", target.display()))
    }
}

/// Removes a folder and all in it, if it is there.
pub fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
