//! udmabuf: dma-bufs of memfd pages, for host memory and for tests.
//!
//! Source: `drivers/dma-buf/udmabuf.c`.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use dma_sg::{RangeError, page_size, resolve_range};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::ftruncate;
use rdma_sys_ext::udmabuf as sys;

use super::backing::{HostPages, MemfdRange};
use super::{Allocation, Backing, Error, Exporter, Result, memory, open_device, whole_pages};
use crate::dmabuf::DmaBuf;

const DEVICE: &str = "/dev/udmabuf";
const PARAMETERS: &str = "/sys/module/udmabuf/parameters";
const MISSING: &str = "load the module udmabuf, or use a kernel with CONFIG_UDMABUF (Debian from 6.12 on)";
const FORBIDDEN: &str = "run as root, or join the group that owns it (kvm under Debian's udev)";
const MIB: u64 = 1 << 20;

/// The kind of pages of a udmabuf or of a [`HostBuffer`](crate::HostBuffer).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PageKind {
    /// The kernel's base pages.
    #[default]
    Base,
    /// Transparent huge pages, as far as the kernel has free ones. In `/sys/kernel/mm/transparent_hugepage` the file
    /// `shmem_enabled` must be `advise` or `always` for a udmabuf, and `enabled` `madvise` or `always` for host memory.
    Transparent,
    /// Huge pages from the reserved pool of their size.
    Huge {
        /// Size of one huge page in bytes, a power of two.
        size: u64,
    },
}

impl PageKind {
    /// Huge pages of 2 MiB.
    pub const HUGE_2M: Self = Self::Huge { size: 2 << 20 };
    /// Huge pages of 1 GiB.
    pub const HUGE_1G: Self = Self::Huge { size: 1 << 30 };

    pub(crate) fn size(self) -> u64 {
        match self {
            Self::Base | Self::Transparent => page_size(),
            Self::Huge { size } => size,
        }
    }

    /// Whether pages can have this size. The kernel takes a huge page size of 1 byte for its default size.
    pub(crate) fn is_possible(self) -> bool {
        self.size().is_power_of_two() && self.size() >= page_size()
    }
}

/// The udmabuf device.
#[derive(Debug)]
pub struct Udmabuf {
    device: File,
    pages: PageKind,
}

impl Udmabuf {
    /// Opens `/dev/udmabuf`.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NotPermitted`], [`Error::Unusable`].
    pub fn open() -> Result<Self> {
        let device = open_device(Path::new(DEVICE), MISSING, FORBIDDEN)?;
        Ok(Self { device, pages: PageKind::default() })
    }

    /// Sets the kind of pages that [`allocate`](Exporter::allocate) takes.
    #[must_use]
    pub fn with_pages(self, pages: PageKind) -> Self {
        Self { pages, ..self }
    }

    /// Makes one dma-buf of byte ranges of memfds, in this order.
    ///
    /// Both ends of a range are multiples of the page size, for a hugetlb memfd of its huge page size. udmabuf
    /// requires memfds that are sealed against shrinking; this seals them, so make them with
    /// `MFD_ALLOW_SEALING`. The allocation's [`Backing`] keeps them.
    ///
    /// # Errors
    /// - [`Error::Range`]: a range is empty or not inside its memfd, or there is none.
    /// - [`Error::UnfitMemfd`]: a descriptor is not a memfd, cannot be sealed or is sealed against writing,
    ///   or a range is not made of whole pages.
    /// - [`Error::UdmabufLimit`]: more ranges or bytes than the module's parameters permit.
    /// - [`Error::OutOfMemory`]: the kernel has yet to allocate more of them than the machine has free, swap
    ///   included, or than the memory limit of the cgroup leaves.
    /// - [`Error::Allocate`]: the kernel refused.
    #[doc(alias = "UDMABUF_CREATE_LIST")]
    pub fn from_memfds(&self, ranges: impl IntoIterator<Item = (OwnedFd, Range<u64>)>) -> Result<Allocation> {
        let ranges: Vec<_> = ranges.into_iter().map(|(memfd, range)| MemfdRange { memfd, range }).collect();
        if ranges.is_empty() {
            return Err(RangeError::Empty { offset: 0 }.into());
        }
        let (mut total, mut missing) = (0_u64, 0_u64);
        for range in &ranges {
            missing = missing.saturating_add(check(range)?);
            total = total.saturating_add(range.len());
        }
        check_limit("list_limit", ranges.len() as u64, "ranges")?;
        let size = whole_pages(total, page_size())?;
        check_limit("size_limit_mb", size.div_ceil(MIB), "MiB")?;
        memory::check(|| self.name(), missing, true)?;
        let pages = HostPages::map(ranges).map_err(failed("map the memfds", size))?;
        self.export(pages, size)
    }

    fn export(&self, pages: HostPages, size: u64) -> Result<Allocation> {
        let device = self.device.as_fd();
        let fd = match pages.ranges.as_slice() {
            [one] => sys::create(device, one.memfd.as_fd(), one.range.start, one.len(), sys::FLAGS_CLOEXEC),
            several => {
                let items: Vec<_> =
                    several.iter().map(|part| (part.memfd.as_fd(), part.range.start, part.len())).collect();
                sys::create_list(device, &items, sys::FLAGS_CLOEXEC)
            }
        };
        let fd = fd.map_err(|source| Error::Allocate {
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
        if let PageKind::Huge { size } = self.pages {
            // The kernel expects log2 of the page size in the bits from MFD_HUGE_SHIFT (26) on.
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
            PageKind::Base => "udmabuf".into(),
            PageKind::Transparent => "udmabuf (transparent huge pages)".into(),
            PageKind::Huge { size } => format!("udmabuf ({} KiB huge pages)", size >> 10),
        }
    }

    /// The kernel charges this memory to the cgroup, except for huge pages.
    ///
    /// # Errors
    /// - [`Error::OutOfMemory`]: more than the machine has free, swap included, or than the memory limit of the
    ///   cgroup (`memory.max`, `memory.limit_in_bytes`) leaves. This is checked beforehand, because otherwise
    ///   the kernel kills processes.
    /// - [`Error::UdmabufLimit`]: more than the module's parameter `size_limit_mb`.
    /// - [`Error::HugePages`] (`ENOMEM`): the pool has too few free huge pages.
    /// - [`Error::HugePageSize`]: the huge page size is not a power of two, or is less than a page.
    /// - [`Error::Allocate`]: the kernel refused.
    #[doc(alias = "UDMABUF_CREATE")]
    fn allocate(&self, size: u64) -> Result<Allocation> {
        let _span = crate::observe::exporting(|| self.name(), size);
        if !self.pages.is_possible() {
            return Err(Error::HugePageSize { size: self.pages.size() });
        }
        let size = whole_pages(size, self.pages.size())?;
        check_limit("size_limit_mb", size.div_ceil(MIB), "MiB")?;
        // Huge pages come from their pool, which neither the machine's free memory nor the cgroup counts.
        if !matches!(self.pages, PageKind::Huge { .. }) {
            memory::check(|| self.name(), size, true)?;
        }
        let memfd = self.memfd(size)?;
        check_seals(&memfd)?;
        let whole = MemfdRange { memfd, range: 0..size };
        let pages = HostPages::map(vec![whole]).map_err(|errno| match self.pages {
            PageKind::Huge { size: page_size } if errno == Errno::ENOMEM => {
                Error::HugePages { size, page_size, source: errno.into() }
            }
            _ => failed("map the memfd", size)(errno),
        })?;
        if self.pages == PageKind::Transparent {
            pages.populate_huge().map_err(failed("populate transparent huge pages", size))?;
        }
        self.export(pages, size)
    }
}

fn failed(operation: &'static str, size: u64) -> impl Fn(Errno) -> Error {
    move |errno| Error::Allocate { exporter: "udmabuf".into(), operation, size, source: errno.into() }
}

/// Checks a request against a parameter of the module, which is an inclusive limit. If the parameter cannot
/// be read, the kernel decides.
fn check_limit(parameter: &'static str, requested: u64, unit: &'static str) -> Result<()> {
    let text = fs::read_to_string(Path::new(PARAMETERS).join(parameter)).unwrap_or_default();
    match text.trim().parse() {
        Ok(value) if requested > value => Err(Error::UdmabufLimit { parameter, value, requested, unit }),
        _ => Ok(()),
    }
}

/// Checks a range, and returns the bytes that the kernel has yet to allocate for it: at least so many.
fn check(range: &MemfdRange) -> Result<u64> {
    let MemfdRange { memfd, range } = range;
    let unfit = |errno: Errno| Error::UnfitMemfd { reason: io::Error::from(errno).to_string() };
    let stat = fstat(memfd).map_err(unfit)?;
    resolve_range(range.clone(), stat.st_size as u64)?;
    let page = memfd_page_size(memfd).map_err(unfit)?;
    if !range.start.is_multiple_of(page) || !range.end.is_multiple_of(page) {
        let reason = format!(
            "its range {}..{} must begin and end at multiples of its page size of {page} bytes",
            range.start, range.end
        );
        return Err(Error::UnfitMemfd { reason });
    }
    check_seals(memfd)?;
    let allocated = (stat.st_blocks as u64).saturating_mul(512);
    Ok(if page > page_size() { 0 } else { (range.end - range.start).saturating_sub(allocated) })
}

/// The page size that ranges of a memfd must be multiples of.
fn memfd_page_size(memfd: &OwnedFd) -> Result<u64, Errno> {
    let stat = fstatfs(memfd)?;
    Ok(if stat.filesystem_type() == HUGETLBFS_MAGIC { stat.block_size() as u64 } else { page_size() })
}

/// Seals a memfd against shrinking; udmabuf requires that, and that writing is not sealed.
fn check_seals(memfd: &OwnedFd) -> Result<()> {
    let unfit = |reason: &str| Error::UnfitMemfd { reason: reason.into() };
    let seals = fcntl(memfd, FcntlArg::F_GET_SEALS)
        .map_err(|_| unfit("it is not a memfd; make one with memfd_create(2)"))?;
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

    fn reason<T: std::fmt::Debug>(result: Result<T>) -> String {
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
        assert!(reason(check_seals(&File::open("/dev/null").unwrap().into())).contains("not a memfd"));
    }

    #[test]
    fn ranges_are_whole_pages_inside_their_memfd() {
        let check = |range| check(&MemfdRange { memfd: memfd(MFdFlags::MFD_ALLOW_SEALING, 1 << 20), range });
        check(4096..12288).unwrap();
        let empty = memfd(MFdFlags::MFD_ALLOW_SEALING, 1 << 20);
        assert_eq!(super::check(&MemfdRange { memfd: empty, range: 0..8192 }).unwrap(), 8192);
        let full = memfd(MFdFlags::MFD_ALLOW_SEALING, 8192);
        nix::sys::uio::pwrite(&full, &[1; 8192], 0).unwrap();
        assert_eq!(super::check(&MemfdRange { memfd: full, range: 0..8192 }).unwrap(), 0);
        assert!(reason(check(100..4096)).contains("multiples of its page size"));
        assert!(reason(check(0..4095)).contains("multiples of its page size"));
        assert_error!(check(0..0), Error::Range(RangeError::Empty { .. }));
        assert_error!(check(1 << 20..(1 << 20) + 4096), Error::Range(RangeError::OutOfRange { .. }));
        assert_error!(check(u64::MAX - 4095..u64::MAX), Error::Range(RangeError::OutOfRange { .. }));
    }

    #[test]
    fn ranges_are_mapped_side_by_side() {
        let first = memfd(MFdFlags::MFD_ALLOW_SEALING, 8192);
        let second = memfd(MFdFlags::MFD_ALLOW_SEALING, 8192);
        for (fd, text) in [(&first, b"one"), (&second, b"two")] {
            nix::sys::uio::pwrite(fd, text, 4096).unwrap();
        }
        let ranges = [first, second].map(|memfd| MemfdRange { memfd, range: 4096..8192 });
        let pages = HostPages::map(ranges.into()).unwrap();
        let backing = Backing::new(pages, crate::dmabuf::BufferId::UNKNOWN);
        let read = |at: usize| {
            // SAFETY: both ranges are mapped, 8192 bytes in all, and nothing writes them meanwhile.
            unsafe { std::ptr::read_volatile(backing.as_ptr().add(at).cast::<[u8; 3]>()) }
        };
        assert_eq!((&read(0), &read(4096)), (b"one", b"two"));
        assert_eq!((backing.len(), backing.memfds().len()), (8192, 2));
    }
}
