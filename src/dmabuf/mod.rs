//! A dma-buf: its identity, size, exporter and fences, and CPU access to its bytes.

pub(crate) mod copy;
mod error;
mod fence;
mod mapping;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::SystemTime;

use dma_sg::pci::PciAddress;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Whence, lseek64};
use rdma_sys_ext::dma_buf as sys;

pub use error::Error;
pub use mapping::{CpuAccess, CpuGuard, Mapping};

use crate::observe::{self, HeldFd};

type Result<T> = std::result::Result<T, Error>;

/// Longest name of a dma-buf in bytes (`DMA_BUF_NAME_LEN` less its NUL).
const MAX_NAME: usize = 31;

/// An open descriptor of a dma-buf: memory that a driver allocated and exported.
///
/// Two `DmaBuf`s of one buffer have the same [`id`](Self::id). Dropping a `DmaBuf` only closes the descriptor. A
/// registration and a [`Mapping`] hold the memory themselves.
///
/// Source: `drivers/dma-buf/dma-buf.c`, `include/uapi/linux/dma-buf.h`.
#[derive(Debug)]
pub struct DmaBuf {
    fd: OwnedFd,
    size: u64,
    id: BufferId,
    writable: bool,
    origin: Origin,
    _held: HeldFd,
}

/// What the exporter knows about the memory, and the descriptor does not tell.
#[derive(Debug, Clone, Copy, Default)]
struct Origin {
    device: Option<PciAddress>,
    pcie: bool,
}

/// Identity of a buffer, equal for every descriptor of one dma-buf in any process.
///
/// It is the inode in the kernel's dma-buf file system, which is unique while any reference to the buffer lives.
/// Keep a reference (a `DmaBuf`, a region) while you compare identities. Two dma-bufs of the same memory, such as
/// those of V4L2's EXPBUF, have two identities. Each [`HostBuffer`](crate::HostBuffer) has one of its own, which no
/// later buffer gets, whatever its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct BufferId {
    device: u64,
    inode: u64,
}

impl BufferId {
    /// Stands for no buffer, as in the description of a peer that registered other memory.
    pub const UNKNOWN: Self = Self { device: 0, inode: 0 };

    /// The identity of new host memory. No file system has the first number, and the second differs from that of any
    /// earlier process with the same pid.
    pub(crate) fn of_host_memory() -> Self {
        static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            AtomicU64::new(since.as_nanos() as u64)
        });
        // The kernel's device numbers have 32 bits.
        let device = u64::from(u32::from_be_bytes(*b"HOST")) << 32 | u64::from(std::process::id());
        Self { device, inode: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// File system and inode, to send to a peer.
    pub(crate) fn parts(self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// The inode, which identifies a buffer within one machine.
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
    /// - [`Error::NotDmaBuf`]: the descriptor is something else; the message says what. It is closed.
    /// - [`Error::BadFd`] (`EBADF`): the number is not open. Nothing is closed.
    /// - [`Error::Inspect`]: the kernel did not report its size, identity or mode.
    pub fn from_fd(fd: impl Into<OwnedFd>) -> Result<Self> {
        let fd: OwnedFd = fd.into();
        let inspect = |property| move |e: Errno| Error::Inspect { property, source: e.into() };
        let stat = match fstat(&fd) {
            // Do not close it: by now the number may belong to another owner.
            Err(Errno::EBADF) => return Err(Error::BadFd { fd: fd.into_raw_fd() }),
            answer => answer.map_err(inspect("identity"))?,
        };
        // All dma-bufs of a machine are in one file system, so remember that of the first.
        static FILE_SYSTEM: OnceLock<u64> = OnceLock::new();
        if FILE_SYSTEM.get() != Some(&stat.st_dev) {
            match fstatfs(&fd) {
                Ok(found) if found.filesystem_type().0 == sys::MAGIC => {
                    FILE_SYSTEM.get_or_init(|| stat.st_dev);
                }
                _ => return Err(Error::NotDmaBuf { fd: fd.as_raw_fd(), what: describe(&fd) }),
            }
        }
        // Linux 5.3 and later report the size here, which saves a call.
        let size = match stat.st_size {
            0 => lseek64(&fd, 0, Whence::SeekEnd).map_err(inspect("size"))?,
            size => size,
        } as u64;
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(inspect("mode"))?;
        let writable = OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDWR;
        let id = BufferId { device: stat.st_dev, inode: stat.st_ino };
        if observe::listening() {
            // Completes the span of an exporter's allocation, if this runs within one.
            tracing::Span::current().record("buffer", id.inode);
        }
        Ok(Self { fd, size, id, writable, origin: Origin::default(), _held: HeldFd::new() })
    }

    /// A buffer for a unit test that needs only identity and size; its descriptor is /dev/null.
    #[cfg(test)]
    pub(crate) fn fake(inode: u64, size: u64) -> Self {
        let fd = fs::File::open("/dev/null").expect("/dev/null").into();
        let (id, origin) = (BufferId { device: 13, inode }, Origin::default());
        Self { fd, size, id, writable: true, origin, _held: HeldFd::new() }
    }

    /// Notes the PCI device that the memory belongs to.
    pub(crate) fn with_device(mut self, device: Option<PciAddress>) -> Self {
        self.origin.device = device;
        self
    }

    /// Notes that the exporter maps the memory through the PCIe BAR although a nearer path exists.
    #[cfg(feature = "cuda")]
    pub(crate) fn with_pcie_mapping(mut self, pcie: bool) -> Self {
        self.origin.pcie = pcie;
        self
    }

    /// Whether the exporter maps the memory through the PCIe BAR although a nearer path exists.
    pub(crate) fn is_mapped_by_pcie(&self) -> bool {
        self.origin.pcie
    }

    /// The PCI device that the memory belongs to, if this process exported the buffer and the exporter knows it: a
    /// GPU, a DRM card, a VFIO device, a camera. A descriptor alone does not tell.
    pub fn pci_device(&self) -> Option<PciAddress> {
        self.origin.device
    }

    /// Size of the buffer in bytes, a multiple of the page size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The buffer's identity, equal for all its descriptors.
    pub fn id(&self) -> BufferId {
        self.id
    }

    /// Whether the descriptor is open for reading and writing. The export fixed the mode. This library
    /// registers no write access through a read-only descriptor.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The exporter's name as the kernel reports it: `udmabuf`, `system`, `virtio_gpu`, `drm`, …
    ///
    /// # Errors
    /// [`Error::Inspect`] when `/proc/self/fdinfo` cannot be read.
    pub fn exporter_name(&self) -> Result<String> {
        Ok(self.fdinfo("exporter name", "exp_name:")?.unwrap_or_default())
    }

    /// The buffer's debug name, if [`set_name`](Self::set_name) or another process gave it one.
    ///
    /// # Errors
    /// [`Error::Inspect`] when `/proc/self/fdinfo` cannot be read.
    pub fn name(&self) -> Result<Option<String>> {
        self.fdinfo("name", "name:")
    }

    /// Sets the debug name that fdinfo and `/sys/kernel/debug/dma_buf/bufinfo` show: at most 31 bytes.
    ///
    /// # Errors
    /// - [`Error::InvalidName`]: the name is too long or contains a NUL.
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

    /// Duplicates the descriptor.
    ///
    /// # Errors
    /// [`Error::Inspect`] (`EMFILE`): the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.duplicate()?;
        let Self { size, id, writable, origin, .. } = *self;
        Ok(Self { fd, size, id, writable, origin, _held: HeldFd::new() })
    }

    /// Maps the whole buffer for the CPU; see [`Mapping`].
    ///
    /// # Errors
    /// - [`Error::Map`]: the exporter does not map this memory (VRAM, a BAR), or `ENOMEM`.
    /// - [`Error::Inspect`] (`EMFILE`): the process is out of descriptors.
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

/// What a descriptor refers to, in words, for the error message.
pub(crate) fn describe(fd: &OwnedFd) -> String {
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
        // SAFETY: nothing owns descriptor 1_000_000, which is above any limit. `from_fd` finds it closed and
        // closes nothing.
        let fd = unsafe { OwnedFd::from_raw_fd(1_000_000) };
        assert!(matches!(DmaBuf::from_fd(fd), Err(Error::BadFd { fd: 1_000_000 })));
    }

    #[test]
    fn host_memory_has_an_identity_that_no_file_has() {
        let (one, other) = (BufferId::of_host_memory(), BufferId::of_host_memory());
        assert_ne!(one, other);
        assert_ne!(one, BufferId::UNKNOWN);
        // The kernel's device numbers have 32 bits.
        assert!(one.device > u64::from(u32::MAX), "{one:?}");
    }

    #[test]
    fn fdinfo_fields_are_found_by_name() {
        let text = "pos:\t0\nino:\t7\nsize:\t4096\ncount:\t2\nexp_name:\tudmabuf\nname:\tframes\n";
        assert_eq!(field(text, "exp_name:"), Some("udmabuf"));
        assert_eq!(field(text, "name:"), Some("frames"));
        assert_eq!(field("exp_name:\tudmabuf\n", "name:"), None);
    }
}
