//! What is sent, and where it is saved.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh64::Xxh64;

use super::extent;
use crate::{Result, pattern};

/// What a sender sends.
pub enum Source {
    File(File),
    Pattern,
}

impl Source {
    /// The file, or without one the pattern, and its length.
    pub fn open(path: Option<PathBuf>, size: Option<u64>) -> Result<(Self, u64)> {
        let Some(path) = path else {
            return Ok((Self::Pattern, size.ok_or("neither a file nor a size is given")?));
        };
        let failed = |error| format!("{}: {error}", path.display());
        let file = File::open(&path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length == 0 {
            return Err(format!("{} is empty: there is nothing to send", path.display()).into());
        }
        Ok((Self::File(file), length))
    }

    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(bytes, offset)?,
            Self::Pattern => pattern::write(bytes, offset, 1),
        }
        Ok(())
    }
}

/// Where a receiver saves blocks: a file beside the final one, until all blocks are there.
pub struct Partial {
    file: File,
    path: PathBuf,
    to: PathBuf,
}

impl Partial {
    pub fn open(to: &Path) -> Result<Self> {
        let mut name = to.file_name().ok_or_else(|| format!("{} names no file", to.display()))?.to_owned();
        name.push(".part");
        let path = to.with_file_name(name);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { file, path, to: to.into() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The blocks that are there, and the digest of their digests so far.
    pub fn have(&self, block: u64, length: u64) -> Result<(u64, Xxh64)> {
        let blocks = self.file.metadata()?.len().min(length) / block;
        Ok((
            blocks,
            digest_of(blocks, block, length, |offset, bytes| Ok(self.file.read_exact_at(bytes, offset)?))?,
        ))
    }

    pub fn save(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let saved = self.file.write_all_at(bytes, offset);
        Ok(saved.map_err(|error| format!("{}: {error}", self.path.display()))?)
    }

    /// Gives the file its name.
    pub fn finish(self, length: u64) -> Result<()> {
        self.file.set_len(length)?;
        self.file.sync_all()?;
        Ok(fs::rename(&self.path, &self.to).map_err(|error| format!("{}: {error}", self.to.display()))?)
    }
}

/// The digest of the digests of the first `blocks` blocks, to be continued.
pub fn digest_of(
    blocks: u64,
    block: u64,
    length: u64,
    read: impl Fn(u64, &mut [u8]) -> Result<()>,
) -> Result<Xxh64> {
    let mut all = Xxh64::new(0);
    let mut bytes = vec![0; block.min(length) as usize];
    for index in 0..blocks {
        let extent = extent(index, block, length);
        let bytes = &mut bytes[..(extent.end - extent.start) as usize];
        read(extent.start, bytes)?;
        all.update(&pattern::of_block(bytes).to_le_bytes());
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_are_kept_and_the_file_gets_its_name_at_the_end() {
        let folder = std::env::temp_dir().join(format!("dmabuf-rdma-copy-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (to, length, block) = (folder.join("copy"), 20, 8);
        let mut bytes = vec![0; length as usize];
        Source::Pattern.read(0, &mut bytes).unwrap();
        let partial = Partial::open(&to).unwrap();
        partial.save(0, &bytes[..8]).unwrap();
        partial.save(8, &bytes[8..13]).unwrap();
        drop(partial);

        let partial = Partial::open(&to).unwrap();
        let (have, digest) = partial.have(block, length).unwrap();
        let expected = digest_of(1, block, length, |at, bytes| Source::Pattern.read(at, bytes)).unwrap();
        assert_eq!((have, digest.digest()), (1, expected.digest()));
        partial.save(8, &bytes[8..]).unwrap();
        partial.finish(length).unwrap();
        assert_eq!(fs::read(&to).unwrap(), bytes);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(&folder).unwrap();
    }
}
