//! Mapped files as host memory.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::OwnedFd;

use dma_sg::RangeError;
use dmabuf_rdma::host::Error;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, RegisterError};
use dmabuf_rdma::{ErrorKind, HostBuffer};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::unistd::ftruncate;

use super::host_memory::register;
use crate::assert_refused;
use crate::common::buffers::{heap, memfd};
use crate::common::census::Census;
use crate::common::host::{host, host_contents};
use crate::common::peers::domain;
use crate::common::system::{modprobe, run};
use crate::common::wire::Wire;
use crate::common::{assert_same, pattern};

/// A file in a folder that is removed when dropped.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("host-files-{name}"));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    /// A new file of these bytes, open for reading and writing.
    fn file(&self, bytes: &[u8]) -> File {
        let path = self.0.join("file");
        fs::write(&path, bytes).unwrap();
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    fn read_only(&self) -> File {
        File::open(self.0.join("file")).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn a_device_reads_and_writes_a_file() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let folder = Folder::new("both");
        let bytes = pattern(100_000, 1);
        let file = folder.file(&bytes);
        let buffer = HostBuffer::map_file(folder.read_only(), 5000..95_001).unwrap();
        assert_eq!((buffer.size(), buffer.is_writable()), (90_001, false));
        let source = MemoryRegion::builder(&near.domain, &buffer).register().unwrap();
        assert_eq!(source.path(), Path::HostMemory);
        let theirs = host(90_001);
        let target = register(&far.domain, &theirs);
        let place = target.remote().slice(..90_001).unwrap();
        near.connection.write(&source, &place).unwrap().wait().unwrap();
        assert_same(&host_contents(&theirs)[..90_001], &bytes[5000..95_001], "the part of the file");
        // What others write to the file is in the buffer.
        std::os::unix::fs::FileExt::write_all_at(&file, b"later", 5000).unwrap();
        near.connection.write(&source, &place).unwrap().wait().unwrap();
        assert_same(&host_contents(&theirs)[..5], b"later", "a later write");
        // What a device writes is in the file.
        let buffer = HostBuffer::map_file(file, 10..99_999).unwrap();
        assert!(buffer.is_writable());
        let region = register(&near.domain, &buffer);
        theirs.write(0, &pattern(90_000, 2)).unwrap();
        let from = target.slice(..90_000).unwrap();
        far.connection.write(from, region.remote().slice(7..90_007).unwrap()).unwrap().wait().unwrap();
        drop((region, buffer));
        let mut seen = Vec::new();
        folder.read_only().read_to_end(&mut seen).unwrap();
        assert_same(&seen[17..90_017], &pattern(90_000, 2), "the file");
        assert_same(&seen[90_017..], &bytes[90_017..], "the rest of the file");
    }
    census.assert_unchanged();
}

#[test]
fn a_file_that_is_read_only_is_not_written() {
    let folder = Folder::new("read-only");
    folder.file(&[0; 8192]);
    let domain = domain();
    let buffer = HostBuffer::map_file(folder.read_only(), ..).unwrap();
    let refused = buffer.write(0, &[1]);
    assert_eq!(refused.as_ref().unwrap_err().kind(), ErrorKind::Permission);
    assert_refused!(refused, Error::ReadOnly);
    let refused = MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register();
    let message = assert_refused!(refused, RegisterError::ReadOnlyBuffer { .. });
    assert!(message.contains("open the file for reading and writing"), "{message}");
    MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE_READ).register().unwrap();
}

#[test]
fn descriptors_and_ranges_that_do_not_fit() {
    let census = Census::take();
    let short = || memfd(4096);
    let refused = HostBuffer::map_file(short(), ..4097);
    assert_refused!(refused, Error::Range(RangeError::OutOfRange { offset: 0, length: 4097, size: 4096 }));
    let refused = HostBuffer::map_file(short(), 4096..4097);
    assert_refused!(refused, Error::Range(RangeError::OutOfRange { .. }));
    assert_refused!(HostBuffer::map_file(short(), 9..9), Error::Range(RangeError::Empty { offset: 9 }));
    assert_refused!(HostBuffer::map_file(memfd(0), ..), Error::Range(RangeError::Empty { .. }));
    for (fd, what) in [
        (OwnedFd::from(heap(4096)), "an anonymous kernel object"),
        (std::io::pipe().unwrap().0.into(), "a pipe"),
        (File::open("/dev/zero").unwrap().into(), "a character device"),
        (File::open("/proc/self").unwrap().into(), "a directory"),
    ] {
        let message = assert_refused!(HostBuffer::map_file(fd, ..4096), Error::NotAFile { .. });
        assert!(message.contains(what), "{message}");
    }
    let folder = Folder::new("write-only");
    folder.file(&[0; 4096]);
    let write_only = OpenOptions::new().write(true).open(folder.0.join("file")).unwrap();
    let message = assert_refused!(HostBuffer::map_file(write_only, ..), Error::Map { .. });
    assert!(message.ends_with("open it for reading, or for reading and writing"), "{message}");
    let sealed = memfd(4096);
    fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let message = assert_refused!(HostBuffer::map_file(sealed, ..), Error::Map { .. });
    assert!(message.contains("a seal of the memfd"), "{message}");
    drop(folder);
    census.assert_unchanged();
}

/// Without the checks the copies end the test with SIGBUS.
#[test]
fn a_file_cut_short_is_refused() {
    let census = Census::take();
    {
        let Wire { near, far } = Wire::new();
        let file = memfd(64 << 10);
        let buffer = HostBuffer::map_file(file.try_clone().unwrap(), ..).unwrap();
        buffer.write(0, &pattern(64 << 10, 1)).unwrap();
        let region = register(&near.domain, &buffer);
        ftruncate(&file, 8192).unwrap();
        let message =
            assert_refused!(buffer.read(8192, &mut [0]), Error::Truncated { size: 8192, end: 8193 });
        assert!(message.contains("F_SEAL_SHRINK"), "{message}");
        assert_refused!(buffer.write(0, &[0; 8193]), Error::Truncated { size: 8192, end: 8193 });
        let refused = MemoryRegion::builder(&near.domain, &buffer).register();
        assert_eq!(refused.as_ref().unwrap_err().kind(), ErrorKind::InvalidData);
        assert_refused!(refused, RegisterError::Host(Error::Truncated { end: 0x10000, .. }));
        // What is left is there, and the region still has all of its pages.
        let mut left = [0; 8192];
        buffer.read(0, &mut left).unwrap();
        assert_same(&left, &pattern(8192, 1), "what is left");
        let theirs = host(64 << 10);
        let target = register(&far.domain, &theirs);
        near.connection.write(&region, target.remote()).unwrap().wait().unwrap();
        assert_same(&host_contents(&theirs)[..8192], &pattern(8192, 1), "through the region");
        far.connection.write(&target, region.remote()).unwrap().wait().unwrap();
        // A file that grows again has new pages there.
        ftruncate(&file, 64 << 10).unwrap();
        let mut last = [1];
        buffer.read(0xffff, &mut last).unwrap();
        assert_eq!(last, [0]);
        register(&near.domain, &buffer);
    }
    census.assert_unchanged();
}

/// A file system with write-back must know who writes its pages (`writable_file_mapping_allowed` in `mm/gup.c`).
#[test]
fn a_file_of_ext4_is_registered_for_reading_only() {
    let folder = Folder::new("ext4");
    let image = folder.0.join("image");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    run("/usr/sbin/mkfs.ext4", &["-q", image.to_str().unwrap()]);
    modprobe("loop");
    modprobe("ext4");
    let mounted = folder.0.join("mounted");
    fs::create_dir(&mounted).unwrap();
    run("mount", &["-o", "loop", image.to_str().unwrap(), mounted.to_str().unwrap()]);
    {
        let Wire { near, far } = Wire::new();
        let path = mounted.join("file");
        fs::write(&path, pattern(10_000, 3)).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let buffer = HostBuffer::map_file(file, ..).unwrap();
        let refused = MemoryRegion::builder(&near.domain, &buffer).access(Access::REMOTE).register();
        assert_eq!(refused.as_ref().unwrap_err().errno(), Some(libc::EFAULT));
        let message = assert_refused!(refused, RegisterError::Refused { path: Path::HostMemory, .. });
        assert!(message.contains("a file of a file system with write-back, such as ext4"), "{message}");
        let source =
            MemoryRegion::builder(&near.domain, &buffer).access(Access::REMOTE_READ).register().unwrap();
        let theirs = host(10_000);
        let target = register(&far.domain, &theirs);
        let into = target.slice(..10_000).unwrap();
        far.connection.read(into, source.remote()).unwrap().wait().unwrap();
        assert_same(&host_contents(&theirs)[..10_000], &pattern(10_000, 3), "the file");
    }
    run("umount", &[mounted.to_str().unwrap()]);
}
