//! udmabuf: a dma-buf made of memfd pages, for testing and for host memory.
//!
//! Source: `drivers/dma-buf/udmabuf.c`.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::ftruncate;
use rdma_sys_ext::udmabuf as sys;

use super::backing::HostPages;
pub use super::backing::Piece;
use super::{Allocation, Backing, Exporter, open_device, whole_pages};
use crate::dmabuf::DmaBuf;
use crate::umem::{check_range, page_size};
use crate::{Error, Result};

const DEVICE: &str = "/dev/udmabuf";
const PARAMETERS: &str = "/sys/module/udmabuf/parameters";
const MISSING: &str = "load the module udmabuf, or use a kernel with CONFIG_UDMABUF (Debian from 6.12 on)";
const FORBIDDEN: &str = "run as root, or join the group that owns it (kvm under Debian's udev)";
const MIB: u64 = 1 << 20;

/// Which pages the memory behind a udmabuf is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pages {
    /// The kernel's base pages.
    #[default]
    Base,
    /// Transparent huge pages where the kernel has them to give
    /// (`/sys/kernel/mm/transparent_hugepage/shmem_enabled` must be `advise` or `always`).
    Transparent,
    /// Huge pages of `size` bytes (a power of two) from the reserved pool of that size.
    Huge {
        /// Size of one huge page in bytes.
        size: u64,
    },
}

impl Pages {
    /// 2 MiB huge pages.
    pub const HUGE_2M: Self = Self::Huge { size: 2 << 20 };
    /// 1 GiB huge pages.
    pub const HUGE_1G: Self = Self::Huge { size: 1 << 30 };

    fn size(self) -> u64 {
        match self {
            Self::Base | Self::Transparent => page_size(),
            Self::Huge { size } => size,
        }
    }
}

/// The udmabuf device.
#[derive(Debug)]
pub struct Udmabuf {
    device: File,
    pages: Pages,
}

impl Udmabuf {
    /// Opens `/dev/udmabuf`.
    ///
    /// # Errors
    /// [`Error::ExporterMissing`], [`Error::ExporterNotPermitted`].
    pub fn open() -> Result<Self> {
        let device = open_device(Path::new(DEVICE), MISSING, FORBIDDEN)?;
        Ok(Self { device, pages: Pages::default() })
    }

    /// Which pages [`allocate`](Exporter::allocate) takes.
    #[must_use]
    pub fn with_pages(self, pages: Pages) -> Self {
        Self { pages, ..self }
    }

    /// Makes one dma-buf of ranges of memfds, in order. The memfds are sealed against shrinking, which
    /// udmabuf demands, and stay reachable through the allocation's [`Backing`].
    ///
    /// # Errors
    /// - [`Error::ZeroLength`], [`Error::OutOfRange`]: a range that is empty or not inside its memfd.
    /// - [`Error::UnfitMemfd`]: not a memfd, not sealable, sealed against writing, or a range that is
    ///   not made of whole pages.
    /// - [`Error::UdmabufLimit`]: more pieces or bytes than the module's parameters allow.
    /// - [`Error::Export`]: the kernel refused.
    #[doc(alias = "UDMABUF_CREATE_LIST")]
    pub fn from_pieces(&self, pieces: Vec<Piece>) -> Result<Allocation> {
        if pieces.is_empty() {
            return Err(Error::ZeroLength { offset: 0 });
        }
        let mut total = 0_u64;
        for piece in &pieces {
            check_piece(piece)?;
            total = total.saturating_add(piece.length);
        }
        check_limit("list_limit", pieces.len() as u64, "pieces")?;
        let size = whole_pages(total, page_size())?;
        check_limit("size_limit_mb", size.div_ceil(MIB), "MiB")?;
        let pages = HostPages::map(pieces).map_err(failed("map the memfds", size))?;
        self.export(pages, size)
    }

    fn export(&self, pages: HostPages, size: u64) -> Result<Allocation> {
        let device = self.device.as_fd();
        let fd = match pages.pieces.as_slice() {
            [one] => sys::create(device, one.memfd.as_fd(), one.offset, one.length, sys::FLAGS_CLOEXEC),
            several => {
                let items: Vec<_> =
                    several.iter().map(|piece| (piece.memfd.as_fd(), piece.offset, piece.length)).collect();
                sys::create_list(device, &items, sys::FLAGS_CLOEXEC)
            }
        };
        let fd = fd.map_err(|source| Error::Export {
            exporter: self.name(),
            operation: "make a dma-buf of the memfd",
            size,
            source,
        })?;
        let dmabuf = DmaBuf::from_fd(fd)?;
        let backing = Backing::new(pages, dmabuf.id());
        Ok(Allocation { dmabuf, backing: Some(backing) })
    }

    fn memfd(&self, size: u64) -> Result<OwnedFd> {
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        if let Pages::Huge { size } = self.pages {
            // The kernel takes the size as its logarithm, above bit 26 (MFD_HUGE_SHIFT).
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(size.trailing_zeros() << 26);
        }
        let memfd = memfd_create(c"udmabuf", flags).map_err(failed("make a memfd", size))?;
        ftruncate(&memfd, size as i64).map_err(failed("size the memfd", size))?;
        Ok(memfd)
    }
}

impl Exporter for Udmabuf {
    fn name(&self) -> String {
        match self.pages {
            Pages::Base => "udmabuf".into(),
            Pages::Transparent => "udmabuf (transparent huge pages)".into(),
            Pages::Huge { size } => format!("udmabuf ({} KiB huge pages)", size >> 10),
        }
    }

    /// # Errors
    /// - [`Error::UdmabufLimit`]: larger than `size_limit_mb`.
    /// - [`Error::HugePages`]: the pool of huge pages is too small.
    /// - [`Error::HugePageSize`]: a huge page size that is no power of two.
    /// - [`Error::Export`]: the kernel refused.
    #[doc(alias = "UDMABUF_CREATE")]
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let _span = crate::observe::exporting(|| self.name(), size);
        if !self.pages.size().is_power_of_two() {
            return Err(Error::HugePageSize { size: self.pages.size() });
        }
        let size = whole_pages(size, self.pages.size())?;
        check_limit("size_limit_mb", size.div_ceil(MIB), "MiB")?;
        let memfd = self.memfd(size)?;
        check_seals(&memfd)?;
        let pages =
            HostPages::map(vec![Piece { memfd, offset: 0, length: size }]).map_err(|errno| {
                match self.pages {
                    Pages::Huge { size: page_size } if errno == Errno::ENOMEM => {
                        Error::HugePages { size, page_size, source: errno.into() }
                    }
                    _ => failed("map the memfd", size)(errno),
                }
            })?;
        if self.pages == Pages::Transparent {
            pages.populate_huge().map_err(failed("bring in transparent huge pages", size))?;
        }
        self.export(pages, size)
    }
}

fn failed(operation: &'static str, size: u64) -> impl Fn(Errno) -> Error {
    move |errno| Error::Export { exporter: "udmabuf".into(), operation, size, source: errno.into() }
}

/// Compares with a parameter of the module; both limits are inclusive. Where the parameter cannot be
/// read there is nothing to say beforehand, and the kernel decides.
fn check_limit(parameter: &'static str, requested: u64, unit: &'static str) -> Result<()> {
    let text = fs::read_to_string(Path::new(PARAMETERS).join(parameter)).unwrap_or_default();
    match text.trim().parse() {
        Ok(value) if requested > value => Err(Error::UdmabufLimit { parameter, value, requested, unit }),
        _ => Ok(()),
    }
}

fn check_piece(piece: &Piece) -> Result<()> {
    let unfit = |errno: Errno| Error::UnfitMemfd { reason: io::Error::from(errno).to_string() };
    let stat = fstat(&piece.memfd).map_err(unfit)?;
    check_range(piece.offset, piece.length, stat.st_size as u64)?;
    let page = memfd_page_size(&piece.memfd).map_err(unfit)?;
    if !piece.offset.is_multiple_of(page) || !piece.length.is_multiple_of(page) {
        return Err(Error::UnfitMemfd {
            reason: format!(
                "offset {} and length {} must be multiples of its page size of {page} bytes",
                piece.offset, piece.length
            ),
        });
    }
    check_seals(&piece.memfd)
}

/// Size of the pages that a memfd is made of, as far as ranges of it must heed them.
fn memfd_page_size(memfd: &OwnedFd) -> Result<u64, Errno> {
    let stat = fstatfs(memfd)?;
    Ok(if stat.filesystem_type() == HUGETLBFS_MAGIC { stat.block_size() as u64 } else { page_size() })
}

/// udmabuf takes a memfd that cannot shrink and can be written.
fn check_seals(memfd: &OwnedFd) -> Result<()> {
    let unfit = |reason: &str| Error::UnfitMemfd { reason: reason.into() };
    let seals = fcntl(memfd, FcntlArg::F_GET_SEALS)
        .map_err(|_| unfit("it is no memfd; make one with memfd_create(2)"))?;
    let seals = SealFlag::from_bits_retain(seals);
    if seals.contains(SealFlag::F_SEAL_WRITE) {
        return Err(unfit("it is sealed against writing (F_SEAL_WRITE)"));
    }
    if !seals.contains(SealFlag::F_SEAL_SHRINK) {
        fcntl(memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))
            .map_err(|_| unfit("it cannot be sealed against shrinking; make it with MFD_ALLOW_SEALING"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(flags: MFdFlags, size: u64) -> OwnedFd {
        let memfd = memfd_create(c"test", flags).unwrap();
        ftruncate(&memfd, size as i64).unwrap();
        memfd
    }

    fn reason(result: Result<()>) -> String {
        match result {
            Err(Error::UnfitMemfd { reason }) => reason,
            other => panic!("expected UnfitMemfd, got {other:?}"),
        }
    }

    #[test]
    fn memfds_are_sealed_and_unfit_ones_refused() {
        let fit = memfd(MFdFlags::MFD_ALLOW_SEALING, 8192);
        check_seals(&fit).unwrap();
        let seals = fcntl(&fit, FcntlArg::F_GET_SEALS).unwrap();
        assert!(SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK));

        assert!(reason(check_seals(&memfd(MFdFlags::empty(), 8192))).contains("MFD_ALLOW_SEALING"));
        fcntl(&fit, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        assert!(reason(check_seals(&fit)).contains("F_SEAL_WRITE"));
        assert!(reason(check_seals(&File::open("/dev/null").unwrap().into())).contains("no memfd"));
    }

    #[test]
    fn pieces_are_whole_pages_inside_their_memfd() {
        let piece =
            |offset, length| Piece { memfd: memfd(MFdFlags::MFD_ALLOW_SEALING, 1 << 20), offset, length };
        check_piece(&piece(4096, 8192)).unwrap();
        assert!(reason(check_piece(&piece(100, 4096))).contains("multiples of its page size"));
        assert!(matches!(check_piece(&piece(0, 0)), Err(Error::ZeroLength { .. })));
        assert!(matches!(check_piece(&piece(1 << 20, 4096)), Err(Error::OutOfRange { .. })));
        assert!(matches!(check_piece(&piece(u64::MAX - 4095, 4096)), Err(Error::OutOfRange { .. })));
    }

    #[test]
    fn pieces_are_mapped_side_by_side() {
        let first = memfd(MFdFlags::MFD_ALLOW_SEALING, 8192);
        let second = memfd(MFdFlags::MFD_ALLOW_SEALING, 8192);
        for (fd, text) in [(&first, b"one"), (&second, b"two")] {
            nix::sys::uio::pwrite(fd, text, 4096).unwrap();
        }
        let pieces = [first, second].map(|memfd| Piece { memfd, offset: 4096, length: 4096 });
        let pages = HostPages::map(pieces.into()).unwrap();
        let backing = Backing::new(pages, crate::dmabuf::BufferId::UNKNOWN);
        let read = |at: usize| {
            // SAFETY: both pieces are mapped, 8192 bytes in all, and nobody writes them meanwhile.
            unsafe { std::ptr::read_volatile(backing.as_ptr().add(at).cast::<[u8; 3]>()) }
        };
        assert_eq!((&read(0), &read(4096)), (b"one", b"two"));
        assert_eq!((backing.len(), backing.memfds().len()), (8192, 2));
    }
}
