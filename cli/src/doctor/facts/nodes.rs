//! The device nodes, and whether this user may open them.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::unistd::{AccessFlags, access};
use serde::{Deserialize, Serialize};

use super::super::look::{Fact, Look, failed};

/// Folders, and prefixes of names in them.
const PLACES: &[(&str, &[&str])] = &[
    ("/dev/infiniband", &[""]),
    ("/dev", &["udmabuf", "kfd", "nvidia", "dma_sg", "video", "vfio"]),
    ("/dev/dma_heap", &[""]),
    ("/dev/dri", &["card", "renderD"]),
    ("/dev/vfio", &[""]),
];

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub path: String,
    pub owner: u32,
    pub group: u32,
    /// The permissions in octal.
    pub mode: String,
    /// Whether this user may read and write it by these permissions. A cgroup may still forbid it.
    pub permitted: Fact<bool>,
}

pub fn gather(look: &Look) -> Vec<Node> {
    let in_folder = |(folder, prefixes): &(&str, &[&str])| {
        let named = |name: &String| prefixes.iter().any(|prefix| name.starts_with(prefix));
        let names = look.names(folder).into_iter().filter(named);
        names.filter_map(|name| node(look, &format!("{folder}/{name}"))).collect::<Vec<_>>()
    };
    PLACES.iter().flat_map(in_folder).collect()
}

fn node(look: &Look, path: &str) -> Option<Node> {
    let meta = fs::metadata(look.path(path)).ok()?;
    if meta.is_dir() {
        return None;
    }
    let permitted = match look.here {
        true => match access(&look.path(path), AccessFlags::R_OK | AccessFlags::W_OK) {
            Ok(()) => Fact::Known(true),
            Err(nix::Error::EACCES | nix::Error::EPERM | nix::Error::EROFS) => Fact::Known(false),
            Err(error) => Fact::unknown(failed(path, &error.into())),
        },
        false => Fact::unknown("this is a copy of another machine's files"),
    };
    let mode = format!("{:04o}", meta.mode() & 0o7777);
    Some(Node { path: path.into(), owner: meta.uid(), group: meta.gid(), mode, permitted })
}
