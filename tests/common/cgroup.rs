//! A cgroup with a memory limit.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup with a memory limit that this process is in until this is dropped.
pub struct Cgroup(PathBuf);

impl Cgroup {
    #[track_caller]
    pub fn new(limit: u64) -> Self {
        let write = |path: &Path, text: &str| {
            fs::write(path, text).unwrap_or_else(|error| panic!("{} = {text}: {error}", path.display()));
        };
        write(&Path::new(ROOT).join("cgroup.subtree_control"), "+memory");
        let group = Self(Path::new(ROOT).join("limited"));
        fs::create_dir(&group.0).unwrap();
        write(&group.0.join("memory.max"), &limit.to_string());
        write(&group.0.join("cgroup.procs"), &std::process::id().to_string());
        group
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        fs::write(Path::new(ROOT).join("cgroup.procs"), std::process::id().to_string()).unwrap();
        fs::remove_dir(&self.0).unwrap();
    }
}
