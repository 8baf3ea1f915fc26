//! One imported dma-buf: what it is, how large, who made it, and how the CPU may look at it.

mod fence;
mod mapping;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Whence, lseek64};
use rdma_sys_ext::dma_buf as sys;

pub use mapping::{CpuAccess, CpuGuard, Mapping};

use crate::observe::{self, HeldFd};
use crate::tag::Tag;
use crate::{Error, Result};

/// Longest name of a dma-buf in bytes (`DMA_BUF_NAME_LEN` less its NUL).
const MAX_NAME: usize = 31;

/// A dma-buf: memory that some driver allocated, held by a descriptor of ours.
///
/// Two `DmaBuf`s may refer to one buffer; [`id`](Self::id) tells. Dropping it closes the descriptor
/// and nothing else: a registration or a [`Mapping`] made from it holds the memory by itself.
///
/// Source: `drivers/dma-buf/dma-buf.c`, `include/uapi/linux/dma-buf.h`.
#[derive(Debug)]
pub struct DmaBuf {
    fd: OwnedFd,
    size: u64,
    id: BufferId,
    writable: bool,
    tag: Tag,
    _held: HeldFd,
}

/// Identity of a buffer: equal for every descriptor of one dma-buf, in any process.
///
/// It is the inode of the kernel's dma-buf file system, unique while any reference to the buffer
/// lives, so keep one (a `DmaBuf`, a region) as long as the identity is compared. Two dma-bufs that
/// share memory, as V4L2's EXPBUF makes, have two identities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct BufferId {
    device: u64,
    inode: u64,
}

impl BufferId {
    /// Of a buffer that nobody has named, such as that of a peer that has no dma-buf.
    pub const UNKNOWN: Self = Self { device: 0, inode: 0 };

    /// The two numbers that it is of, for a peer.
    pub(crate) fn parts(self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// The number of its inode, which it is known by among the dma-bufs of one machine.
    #[inline]
    pub(crate) fn inode(self) -> u64 {
        self.inode
    }

    /// The identity that a peer sent.
    pub(crate) fn from_parts(device: u64, inode: u64) -> Self {
        Self { device, inode }
    }
}

impl DmaBuf {
    /// Takes ownership of a descriptor that an exporter returned.
    ///
    /// # Errors
    /// - [`Error::NotDmaBuf`]: it is something else; the message says what. It is closed then.
    /// - [`Error::BadFd`] (`EBADF`): the number is not open; nothing is closed.
    /// - [`Error::Inspect`]: its size or identity cannot be read.
    pub fn from_fd(fd: impl Into<OwnedFd>) -> Result<Self> {
        let fd: OwnedFd = fd.into();
        let inspect = |property| move |e: Errno| Error::Inspect { property, source: e.into() };
        let stat = match fstat(&fd) {
            // Not ours to close: by now the number may belong to somebody else.
            Err(Errno::EBADF) => return Err(Error::BadFd { fd: fd.into_raw_fd() }),
            answer => answer.map_err(inspect("identity"))?,
        };
        // All dma-bufs of a machine are in one file system: that of the first is remembered.
        static FILE_SYSTEM: OnceLock<u64> = OnceLock::new();
        if FILE_SYSTEM.get() != Some(&stat.st_dev) {
            match fstatfs(&fd) {
                Ok(found) if found.filesystem_type().0 == sys::MAGIC => {
                    FILE_SYSTEM.get_or_init(|| stat.st_dev);
                }
                _ => return Err(Error::NotDmaBuf { fd: fd.as_raw_fd(), what: describe(&fd) }),
            }
        }
        // Kernels from 5.3 on say it here, which spares a call.
        let size = match stat.st_size {
            0 => lseek64(&fd, 0, Whence::SeekEnd).map_err(inspect("size"))?,
            size => size,
        } as u64;
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(inspect("mode"))?;
        let writable = OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDWR;
        let id = BufferId { device: stat.st_dev, inode: stat.st_ino };
        let tag = Tag::of_buffer(id.inode, writable);
        if observe::listening() {
            // For the span of the exporter's allocation, when this is within one.
            tracing::Span::current().record("buffer", id.inode);
        }
        Ok(Self { fd, size, id, writable, tag, _held: HeldFd::new() })
    }

    /// Size of the buffer in bytes; always a multiple of the page size.
    #[inline]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The buffer's identity, equal for every descriptor of it.
    #[inline]
    pub fn id(&self) -> BufferId {
        self.id
    }

    /// Whether the descriptor is open for reading and writing. The mode was fixed when the buffer was
    /// exported; through a read-only one this library registers no write access.
    #[inline]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Its part of what a cache compares.
    #[inline(always)]
    pub(crate) fn tag(&self) -> Tag {
        self.tag
    }

    /// Name of the exporter as the kernel gives it: `udmabuf`, `system`, `virtio_gpu`, `drm`, …
    ///
    /// # Errors
    /// [`Error::Inspect`] when `/proc/self/fdinfo` cannot be read.
    pub fn exporter_name(&self) -> Result<String> {
        Ok(self.fdinfo("exporter name", "exp_name:")?.unwrap_or_default())
    }

    /// The name that somebody gave the buffer for debugging, `None` where nobody did.
    ///
    /// # Errors
    /// [`Error::Inspect`] when `/proc/self/fdinfo` cannot be read.
    pub fn name(&self) -> Result<Option<String>> {
        self.fdinfo("name", "name:")
    }

    /// Names the buffer, for `/sys/kernel/debug/dma_buf/bufinfo` and fdinfo: at most 31 bytes.
    ///
    /// # Errors
    /// - [`Error::InvalidName`]: too long, or a NUL inside.
    /// - [`Error::SetName`]: the kernel refused.
    #[doc(alias = "DMA_BUF_SET_NAME")]
    pub fn set_name(&self, name: &str) -> Result<()> {
        let invalid = || Error::InvalidName { name: name.into() };
        if name.len() > MAX_NAME {
            return Err(invalid());
        }
        let text = CString::new(name).map_err(|_| invalid())?;
        sys::set_name(self.as_fd(), &text).map_err(|source| Error::SetName { name: name.into(), source })
    }

    /// A second descriptor of the same buffer.
    ///
    /// # Errors
    /// [`Error::Inspect`] (`EMFILE`): the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.duplicate()?;
        let Self { size, id, writable, tag, .. } = *self;
        Ok(Self { fd, size, id, writable, tag, _held: HeldFd::new() })
    }

    /// Maps the whole buffer for the CPU; see [`Mapping`].
    ///
    /// # Errors
    /// [`Error::Map`]: the exporter does not offer it (VRAM, a BAR), or there is no address space.
    pub fn map(&self) -> Result<Mapping> {
        Mapping::new(self)
    }

    fn duplicate(&self) -> Result<OwnedFd> {
        self.fd.try_clone().map_err(|source| Error::Inspect { property: "second descriptor", source })
    }

    fn fdinfo(&self, property: &'static str, key: &str) -> Result<Option<String>> {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let text = fs::read_to_string(path).map_err(|source| Error::Inspect { property, source })?;
        Ok(field(&text, key).map(str::to_owned))
    }
}

impl AsFd for DmaBuf {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<DmaBuf> for OwnedFd {
    fn from(buffer: DmaBuf) -> Self {
        buffer.fd
    }
}

impl TryFrom<OwnedFd> for DmaBuf {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Self> {
        Self::from_fd(fd)
    }
}

/// The value of a `key:\tvalue` line of fdinfo.
fn field<'t>(fdinfo: &'t str, key: &str) -> Option<&'t str> {
    fdinfo.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// What a descriptor is, in words, for somebody who passed the wrong one.
fn describe(fd: &OwnedFd) -> String {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let target = link.map(|path| path.display().to_string()).unwrap_or_default();
    let kind = match fstat(fd).map(|stat| SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())) {
        Ok(SFlag::S_IFREG) if target.starts_with("/memfd:") => "a memfd (make a udmabuf of it)",
        Ok(SFlag::S_IFREG) => "a regular file",
        Ok(SFlag::S_IFDIR) => "a directory",
        Ok(SFlag::S_IFCHR) => "a character device",
        Ok(SFlag::S_IFBLK) => "a block device",
        Ok(SFlag::S_IFSOCK) => "a socket",
        Ok(SFlag::S_IFIFO) => "a pipe",
        Ok(_) => "an anonymous kernel object",
        Err(error) => return io::Error::from(error).to_string(),
    };
    format!("{kind}, {target}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    fn refusal(fd: impl Into<OwnedFd>) -> String {
        match DmaBuf::from_fd(fd) {
            Err(Error::NotDmaBuf { what, .. }) => what,
            other => panic!("expected NotDmaBuf, got {other:?}"),
        }
    }

    #[test]
    fn other_descriptors_are_refused_by_what_they_are() {
        let memfd = nix::sys::memfd::memfd_create(c"frames", nix::sys::memfd::MFdFlags::empty()).unwrap();
        assert_eq!(refusal(memfd), "a memfd (make a udmabuf of it), /memfd:frames (deleted)");
        assert_eq!(refusal(fs::File::open("/dev/null").unwrap()), "a character device, /dev/null");
        assert_eq!(
            refusal(fs::File::open("/proc/self/status").unwrap()).split(',').next(),
            Some("a regular file")
        );
        assert!(refusal(std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).starts_with("a socket, socket:["));
        assert!(refusal(io::pipe().unwrap().0).starts_with("a pipe, pipe:["));
    }

    #[test]
    fn a_number_that_is_not_open_is_refused_and_not_closed() {
        // SAFETY: nothing owns descriptor 1_000_000, which is above any limit; `from_fd` gives it back
        // to nobody when it finds it closed, so no foreign descriptor is ever closed here.
        let fd = unsafe { OwnedFd::from_raw_fd(1_000_000) };
        assert!(matches!(DmaBuf::from_fd(fd), Err(Error::BadFd { fd: 1_000_000 })));
    }

    #[test]
    fn fdinfo_fields_are_found_by_name() {
        let text = "pos:\t0\nino:\t7\nsize:\t4096\ncount:\t2\nexp_name:\tudmabuf\nname:\tframes\n";
        assert_eq!(field(text, "exp_name:"), Some("udmabuf"));
        assert_eq!(field(text, "name:"), Some("frames"));
        assert_eq!(field("exp_name:\tudmabuf\n", "name:"), None);
    }
}
