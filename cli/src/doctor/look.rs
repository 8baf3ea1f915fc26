//! Reads the files of a machine: this one's, or copies of another's in a folder.

use std::fmt::Display;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Something that is known about the machine, or the reason why doctor could not look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Fact<T> {
    Unknown { unknown: String },
    Known(T),
}

impl<T> Fact<T> {
    pub fn unknown(why: impl Display) -> Self {
        Self::Unknown { unknown: why.to_string() }
    }

    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unknown { .. } => None,
        }
    }

    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Known(_) => None,
            Self::Unknown { unknown } => Some(unknown),
        }
    }

    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Fact<U> {
        match self {
            Self::Known(value) => Fact::Known(change(value)),
            Self::Unknown { unknown } => Fact::Unknown { unknown },
        }
    }

    pub fn and_then<U>(self, change: impl FnOnce(T) -> Fact<U>) -> Fact<U> {
        match self {
            Self::Known(value) => change(value),
            Self::Unknown { unknown } => Fact::Unknown { unknown },
        }
    }
}

impl<T, E: Display> From<Result<T, E>> for Fact<T> {
    fn from(result: Result<T, E>) -> Self {
        match result {
            Ok(value) => Self::Known(value),
            Err(error) => Self::unknown(error),
        }
    }
}

/// The machine to look at.
#[derive(Debug, Clone)]
pub struct Look {
    root: PathBuf,
    /// Whether it is the machine that this program runs on.
    pub here: bool,
}

impl Look {
    pub fn here() -> Self {
        Self { root: "/".into(), here: true }
    }

    /// A folder with copies of another machine's `sys`, `proc`, `dev`, `etc` and `lib`.
    pub fn at(root: &Path) -> Self {
        Self { root: root.into(), here: false }
    }

    /// The place of an absolute path.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The text of a file without the white space at its ends.
    pub fn text(&self, path: &str) -> Fact<String> {
        let read = fs::read(self.path(path)).map_err(|error| failed(path, &error));
        Fact::from(read).map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The text of a file, if it can be read.
    pub fn any_text(&self, path: &str) -> Option<String> {
        self.text(path).known().cloned()
    }

    pub fn number(&self, path: &str) -> Fact<u64> {
        self.text(path)
            .and_then(|text| text.parse().map_err(|_| format!("{path}: {text:?} is no number")).into())
    }

    pub fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The names in a folder, sorted; none without the folder.
    pub fn names(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort_by_key(|name| {
            (name.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned(), name.len(), name.clone())
        });
        names
    }

    /// The last part of where a link leads: the driver of a device.
    pub fn link(&self, path: &str) -> Option<String> {
        let target = fs::read_link(self.path(path)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    pub fn sysfs(&self) -> dma_sg::pci::Sysfs {
        dma_sg::pci::Sysfs::at(self.path("/sys"))
    }
}

/// A message without the "(os error 2)" of std.
pub fn failed(path: &str, error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    format!("{path}: {text}")
}
