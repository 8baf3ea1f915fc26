//! Locks and staging folders, for several xtasks that prepare the same files.

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::ErrorKind;
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
    wait(file, path)
}

/// Takes the lock on a folder itself. Prints a note if it must wait.
pub fn folder(path: &Path) -> Result<Lock> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    wait(file, path)
}

/// Takes the lock on a folder if nobody has it.
pub fn try_folder(path: &Path) -> Option<Lock> {
    let file = File::open(path).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(Lock { _file: file })
}

fn wait(file: File, path: &Path) -> Result<Lock> {
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        crate::ui::note("Waiting", &format!("for another cargo xtask, which holds {}", path.display()));
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(Lock { _file: file })
}

/// A temporary folder that gets its final name only when it is complete, so an
/// interrupted run leaves no folder that looks complete. Removed when dropped.
pub struct Staging {
    path: PathBuf,
}

/// The end of a staging folder's name.
const PARTIAL: &str = ".partial";

impl Staging {
    /// Creates an empty folder beside `target`. The caller holds the lock.
    ///
    /// What an interrupted run left is removed. If that is impossible, it stays: the name of each folder is new.
    pub fn beside(target: &Path) -> Result<Staging> {
        let parent = target.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let other = entry.file_name().to_string_lossy().into_owned();
            if other.starts_with(&name)
                && other[name.len()..].contains(PARTIAL)
                && remove(&entry.path()).is_err()
            {
                crate::ui::warn(&format!(
                    "cannot remove {}, which an interrupted run left",
                    entry.path().display()
                ));
            }
        }
        let path = new_folder(parent, |unique| format!("{name}.{unique}{PARTIAL}"))?;
        Ok(Staging { path })
    }

    /// Whether a folder's name is one of these: an interrupted run may have left it.
    pub fn is_partial(name: &str) -> bool {
        name.ends_with(PARTIAL)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the folder until the next start, for its logs.
    pub fn keep(self) {
        std::mem::forget(self);
    }

    /// Renames the folder to `target`, replacing an older one.
    pub fn finish(self, target: &Path) -> Result<()> {
        remove(target)?;
        std::fs::rename(&self.path, target).with_context(|| format!("cannot create {}", target.display()))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Nothing is there after `finish`. The error that led here is the one to report.
        let _ = remove(&self.path);
    }
}

/// Creates a folder in `parent` whose name no other has: process numbers repeat in other containers.
pub fn new_folder(parent: &Path, name: impl Fn(&str) -> String) -> Result<PathBuf> {
    loop {
        let unique = RandomState::new().build_hasher().finish() as u32;
        let path = parent.join(name(&format!("{unique:08x}")));
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot create {}", path.display())),
            Ok(()) => return Ok(path),
        }
    }
}

/// Removes a folder and its contents, or a file in its place, if it exists.
pub fn remove(path: &Path) -> Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(data) if data.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    fn scene(name: &str) -> Staging {
        Staging {
            path: new_folder(&std::env::temp_dir(), |unique| format!("xtask-{name}-{unique}")).unwrap(),
        }
    }

    #[test]
    fn what_an_interrupted_run_left_never_blocks() {
        let scene = scene("staging");
        let target = scene.path().join("linux-6.12");
        // Of an older xtask, a file in the place of a folder, a link to nowhere, and a folder that cannot be read.
        fs::create_dir_all(scene.path().join("linux-6.12.partial/debs")).unwrap();
        fs::write(scene.path().join("linux-6.12.0.partial"), "").unwrap();
        std::os::unix::fs::symlink("/nowhere", scene.path().join("linux-6.12.1.partial")).unwrap();
        let closed = scene.path().join("linux-6.12.2.partial");
        fs::create_dir_all(closed.join("inside")).unwrap();
        fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
        fs::create_dir(scene.path().join("linux-7.partial")).unwrap();

        let staging = Staging::beside(&target).unwrap();
        assert_eq!(fs::read_dir(staging.path()).unwrap().count(), 0);
        fs::write(staging.path().join("file"), "complete").unwrap();
        staging.finish(&target).unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "complete");
        // One that does not finish leaves the older result, and nothing else.
        let _ = fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o700));
        drop(Staging::beside(&target).unwrap());
        let mut left: Vec<_> = fs::read_dir(scene.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["linux-6.12", "linux-7.partial"]);
    }

    #[test]
    fn the_second_of_two_runs_waits() {
        let scene = scene("lock");
        let path = scene.path().join("sub/lock");
        let first = exclusive(&path).unwrap();
        let (sender, events) = channel();
        let second = std::thread::spawn(move || {
            let _lock = exclusive(&path).unwrap();
            sender.send(()).unwrap();
        });
        assert!(events.recv_timeout(Duration::from_millis(100)).is_err());
        drop(first);
        events.recv_timeout(Duration::from_secs(20)).unwrap();
        second.join().unwrap();

        let first = try_folder(scene.path()).unwrap();
        assert!(try_folder(scene.path()).is_none());
        drop(first);
        folder(scene.path()).unwrap();
    }
}
