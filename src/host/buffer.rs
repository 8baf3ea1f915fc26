//! Memory of this process that regions hold.
//!
//! `unsafe` is here for memory that devices write at any time: it is reached through pointers only, by atomic copies.

use std::any::Any;
use std::fmt;
use std::mem;
use std::num::NonZeroUsize;
use std::ops::RangeBounds;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use dma_sg::{RangeError, check_range, page_size, resolve_range};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::mapping::Mapping;
use super::{Error, Result};
use crate::dmabuf::copy::{copy_in, copy_out};
use crate::dmabuf::{self, BufferId};
use crate::exporter::{self, PageKind, memory, whole_pages};
use crate::observe::Process;

/// Host memory for a registration: allocated, a mapped file, or memory of others.
///
/// A `HostBuffer` is a handle. Clones share the memory, and a region holds one, so the memory stays until the last
/// clone is dropped and the last region of it is deregistered, whatever is dropped or forgotten. If the kernel refuses
/// a deregistration, the memory is never freed.
///
/// A device may write the memory at any time, so the buffer lends no reference; [`read`](Self::read) and
/// [`write`](Self::write) copy. In a child of `fork` they fail: allocated memory and mapped files stay with the parent
/// (`MADV_DONTFORK`).
///
/// A registration pins the pages, and the kernel charges them to RLIMIT_MEMLOCK (`drivers/infiniband/core/umem.c`).
#[derive(Clone)]
pub struct HostBuffer {
    inner: Arc<Inner>,
}

struct Inner {
    start: NonNull<u8>,
    size: u64,
    writable: bool,
    id: BufferId,
    creator: Process,
    memory: Memory,
}

/// What the buffer is, and holds.
enum Memory {
    Allocated(#[allow(dead_code)] Mapping),
    /// A mapped file, and the offset of the buffer's first byte in it.
    File {
        _mapping: Mapping,
        file: OwnedFd,
        offset: u64,
    },
    /// What keeps the memory alive.
    Foreign(Box<dyn Any + Send + Sync>),
}

// SAFETY: the memory belongs to the process and not to a thread. All access here is by atomic operations, so threads
// that use it at the same time do not race.
unsafe impl Send for Inner {}
// SAFETY: as above; no method returns a reference into the memory.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // What a keeper releases may belong to the parent alone, as objects of the kernel and of GPU runtimes do.
        if let (Memory::Foreign(keeper), false) = (&mut self.memory, self.creator.is_current()) {
            mem::forget(mem::replace(keeper, Box::new(())));
        }
    }
}

impl HostBuffer {
    /// Allocates at least `size` bytes, zeroed, at an address that is a multiple of the pages' size. `size` is rounded
    /// up to whole pages.
    ///
    /// Huge pages come from the pool of their size. Transparent ones are a request, which the kernel follows as far as
    /// it has free ones.
    ///
    /// # Errors
    /// [`Error::Allocate`], with one of these:
    /// - [`exporter::Error::Range`]: a size of 0. [`exporter::Error::SizeTooLarge`]: more than 2^63 - 1 bytes.
    /// - [`exporter::Error::OutOfMemory`]: more than the machine has free, swap included, or than the memory limit of
    ///   the cgroup leaves. Checked beforehand, because otherwise the kernel kills processes.
    /// - [`exporter::Error::HugePages`] (`ENOMEM`): the pool has too few free huge pages.
    /// - [`exporter::Error::HugePageSize`]: the huge page size is not a power of two, or is less than a page.
    /// - [`exporter::Error::Allocate`]: the kernel refused; `EINVAL` for a size of huge pages that it does not have.
    #[doc(alias("mmap", "MAP_HUGETLB"))]
    pub fn allocate(size: u64, pages: PageKind) -> Result<Self> {
        let page_size = pages.size();
        if !pages.is_possible() {
            return Err(exporter::Error::HugePageSize { size: page_size }.into());
        }
        let size = whole_pages(size, page_size)?;
        let failed = |errno: Errno| match (pages, errno) {
            (PageKind::Huge { .. }, Errno::ENOMEM) => {
                exporter::Error::HugePages { size, page_size, source: errno.into() }
            }
            _ => exporter::Error::Allocate {
                exporter: "host memory".into(),
                operation: "map anonymous memory",
                size,
                source: errno.into(),
            },
        };
        // Huge pages come from their pool, which neither the machine's free memory nor the cgroup counts.
        if !matches!(pages, PageKind::Huge { .. }) {
            memory::check(|| "host memory".into(), size, true)?;
        }
        let length = usize::try_from(size).ok().and_then(NonZeroUsize::new);
        let length = length.ok_or(exporter::Error::SizeTooLarge { size })?;
        let mapping = Mapping::anonymous(length, pages).map_err(failed)?;
        Ok(Self::new(mapping.start(), size, true, Memory::Allocated(mapping)))
    }

    /// Maps a byte range of a file, shared: what a device writes is in the file, and what others write to the file is
    /// in the buffer. Its ends need not be multiples of the page size. A file that is open for reading only gives a
    /// buffer that no device may write.
    ///
    /// The buffer holds the descriptor. Since Linux 6.5 the kernel lets devices write files of tmpfs and hugetlbfs and
    /// memfds, but none of a file system with write-back such as ext4: a registration for writing then fails with
    /// `EFAULT`. Registered for reading, every file is fine.
    ///
    /// If somebody cuts the file short, [`read`](Self::read), [`write`](Self::write) and registrations of the part that
    /// is gone fail with [`Error::Truncated`]. If that happens during a copy, the kernel ends the process with SIGBUS;
    /// a memfd that is sealed with F_SEAL_SHRINK excludes it. A registered region keeps the pages that it had.
    ///
    /// # Errors
    /// - [`Error::NotAFile`]: the descriptor is something else, such as a dma-buf or a device. It is closed.
    /// - [`Error::Range`]: the range is empty, inverted, or not inside the file.
    /// - [`Error::Map`]: the kernel refused: `EACCES` for a file that is open for writing only, `EPERM` for a memfd
    ///   that is sealed against writing.
    /// - [`Error::Inspect`]: the kernel did not report size or mode.
    #[doc(alias = "mmap")]
    pub fn map_file(file: impl Into<OwnedFd>, range: impl RangeBounds<u64>) -> Result<Self> {
        let file: OwnedFd = file.into();
        let stat = inspect(&file)?;
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        if kind != SFlag::S_IFREG {
            return Err(Error::NotAFile { fd: file.as_raw_fd(), what: dmabuf::describe(&file) });
        }
        let range = resolve_range(range, stat.st_size as u64)?;
        let refused = |property| move |errno: Errno| Error::Inspect { property, source: errno.into() };
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(refused("mode"))?;
        let writable = OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDWR;
        // Mappings of hugetlbfs begin and end at its pages.
        let huge = fstatfs(&file).map_err(refused("file system"))?.filesystem_type() == HUGETLBFS_MAGIC;
        let align = if huge { stat.st_blksize as u64 } else { page_size() };
        let (offset, size) = (range.start, range.end - range.start);
        let skipped = offset % align;
        let map = |errno: Errno| Error::Map { offset, length: size, source: errno.into() };
        let length = (skipped + size).checked_next_multiple_of(align);
        let length = length.and_then(|length| usize::try_from(length).ok()).and_then(NonZeroUsize::new);
        let length = length.ok_or_else(|| map(Errno::ENOMEM))?;
        let mapping = Mapping::of_file(&file, (offset - skipped) as i64, length, writable).map_err(map)?;
        // SAFETY: the mapping has `skipped + size` bytes.
        let start = unsafe { mapping.start().add(skipped as usize) };
        Ok(Self::new(start, size, writable, Memory::File { _mapping: mapping, file, offset }))
    }

    /// Wraps memory that another allocator owns, such as a runtime's pinned memory or an arena. The buffer drops
    /// `keeper` after the last clone and the last region, but never in a child of `fork`.
    ///
    /// The address need not be a multiple of the page size. A registration pins whole pages, but no key reaches bytes
    /// outside the memory.
    ///
    /// # Safety
    /// Until `keeper` is dropped:
    /// - the memory is mapped readable and writable, and nobody frees, unmaps or remaps it;
    /// - no reference to it is used, and this process accesses it by atomic or volatile operations only, since a device
    ///   may write it at any time.
    ///
    /// On old kernels a `fork` can give the parent a new page while the device keeps the old one, unless the program
    /// excludes the memory from the child (`MADV_DONTFORK`, `ibv_fork_init`). Kernels whose `rdma system` says
    /// `copy-on-fork on` copy pinned pages for the child.
    ///
    /// # Errors
    /// - [`Error::Null`]: `start` is null.
    /// - [`Error::Range`]: `length` is 0.
    /// - [`Error::AddressOverflow`]: `length` exceeds 2^63 - 1, or the end is beyond the address space.
    pub unsafe fn from_raw(start: *mut u8, length: u64, keeper: impl Send + Sync + 'static) -> Result<Self> {
        Self::foreign(start, length, true, Box::new(keeper))
    }

    /// Like [`from_raw`](Self::from_raw), for memory that neither devices nor [`write`](Self::write) may write, such as
    /// an immutable array: a registration for writing is refused.
    ///
    /// # Safety
    /// As [`from_raw`](Self::from_raw), but the memory need only be readable, and nobody writes it by other than atomic
    /// or volatile operations.
    ///
    /// # Errors
    /// As [`from_raw`](Self::from_raw).
    pub unsafe fn from_raw_read_only(
        start: *const u8,
        length: u64,
        keeper: impl Send + Sync + 'static,
    ) -> Result<Self> {
        Self::foreign(start.cast_mut(), length, false, Box::new(keeper))
    }

    fn foreign(
        start: *mut u8,
        length: u64,
        writable: bool,
        keeper: Box<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let address = start.addr() as u64;
        let start = NonNull::new(start).ok_or(Error::Null { length })?;
        if length == 0 {
            return Err(RangeError::Empty { offset: 0 }.into());
        }
        // The largest object of Rust, and the largest address.
        if length > isize::MAX as u64 || address.checked_add(length).is_none() {
            return Err(Error::AddressOverflow { address, length });
        }
        Ok(Self::new(start, length, writable, Memory::Foreign(keeper)))
    }

    fn new(start: NonNull<u8>, size: u64, writable: bool, memory: Memory) -> Self {
        let (id, creator) = (BufferId::of_host_memory(), Process::current());
        Self { inner: Arc::new(Inner { start, size, writable, id, creator, memory }) }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    /// The buffer's identity, equal for all clones. No other buffer ever gets it.
    pub fn id(&self) -> BufferId {
        self.inner.id
    }

    /// Whether it can be written: false for a file that is open for reading only, and for read-only memory of others.
    pub fn is_writable(&self) -> bool {
        self.inner.writable
    }

    /// Address of the first byte. It is valid while a clone or a region of the buffer lives, and not in a child of
    /// `fork`. Access the memory by atomic or volatile operations, and never form a reference to it.
    pub fn as_ptr(&self) -> *mut u8 {
        self.inner.start.as_ptr()
    }

    /// Copies `into.len()` bytes out, from `offset` of the buffer.
    ///
    /// As with [`CpuGuard::read`](crate::dmabuf::CpuGuard::read), the CPU never reads half of an aligned 64-bit value
    /// that a peer writes at once, and a read of a single aligned word (1, 2, 4 or 8 bytes) has acquire semantics.
    ///
    /// # Errors
    /// - [`Error::Range`]: the range is empty or not inside the buffer.
    /// - [`Error::Truncated`]: somebody cut the mapped file short.
    /// - [`Error::OtherProcess`]: this is a child of the process that made the buffer.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: `at` checked the range. This process has the memory mapped and accesses it by `copy_out`, `copy_in`
        // and what the contract of `from_raw` permits; devices and other processes also write it.
        unsafe { copy_out(from, into) };
        Ok(())
    }

    /// Copies `from` in, to `offset` of the buffer.
    ///
    /// An aligned group of 8 bytes is written with one store. A write of a single aligned word (1, 2, 4 or 8 bytes) has
    /// release semantics.
    ///
    /// # Errors
    /// - [`Error::ReadOnly`]: a file that is open for reading only.
    /// - As [`read`](Self::read).
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        if !self.inner.writable {
            return Err(Error::ReadOnly);
        }
        let into = self.at(offset, from.len())?;
        // SAFETY: as in `read`, and the memory is mapped for writing.
        unsafe { copy_in(from, into) };
        Ok(())
    }

    fn at(&self, offset: u64, length: usize) -> Result<*mut u8> {
        check_range(offset, length as u64, self.size())?;
        self.check_present(offset + length as u64)?;
        Ok(self.as_ptr().wrapping_add(offset as usize))
    }

    /// Checks that this process has the memory, and that a mapped file still has the bytes before `end`, an offset in
    /// the buffer.
    pub(crate) fn check_present(&self, end: u64) -> Result<()> {
        if !self.inner.creator.is_current() {
            return Err(Error::OtherProcess);
        }
        if let Memory::File { file, offset, .. } = &self.inner.memory {
            let (size, end) = (inspect(file)?.st_size as u64, offset + end);
            if size < end {
                return Err(Error::Truncated { size, end });
            }
        }
        Ok(())
    }

    /// Bytes from the page boundary to the first byte.
    pub(crate) fn page_offset(&self) -> u64 {
        self.as_ptr().addr() as u64 % page_size()
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { start, size, writable, id, memory, .. } = &*self.inner;
        let kind = match memory {
            Memory::Allocated(_) => "allocated",
            Memory::File { .. } => "mapped file",
            Memory::Foreign(_) => "foreign",
        };
        f.debug_struct("HostBuffer")
            .field("kind", &kind)
            .field("start", start)
            .field("size", size)
            .field("writable", writable)
            .field("id", id)
            .finish()
    }
}

fn inspect(file: &OwnedFd) -> Result<FileStat> {
    fstat(file).map_err(|errno| Error::Inspect { property: "size", source: errno.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::in_a_child;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    fn mappings() -> usize {
        std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
    }

    #[test]
    fn allocated_memory_is_zeroed_aligned_and_copied() {
        for pages in [PageKind::Base, PageKind::Transparent] {
            let buffer = HostBuffer::allocate((5 << 20) + 1, pages).unwrap();
            assert_eq!(buffer.size(), (5 << 20) + page_size());
            let align =
                if pages == PageKind::Base { page_size() } else { exporter::transparent_page_size() as u64 };
            assert_eq!(buffer.as_ptr().addr() as u64 % align, 0);
            let last = buffer.size() - 3;
            buffer.write(last, b"end").unwrap();
            let (mut first, mut seen) = ([1; 64], [0; 3]);
            buffer.read(0, &mut first).unwrap();
            buffer.read(last, &mut seen).unwrap();
            assert_eq!((first, &seen), ([0; 64], b"end"));
        }
    }

    /// Of 1 byte, the kernel would map huge pages of its default size, and the unmapping of 4096 bytes would fail.
    #[test]
    fn no_huge_page_is_smaller_than_a_page() {
        for size in [0, 1, 2, 2048, 3 << 20] {
            match HostBuffer::allocate(4096, PageKind::Huge { size }) {
                Err(Error::Allocate(exporter::Error::HugePageSize { size: named })) => {
                    assert_eq!(named, size)
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_part_of_a_file_is_shared_with_the_file() {
        let path = std::env::temp_dir().join(format!("dmabuf-rdma-host-{}", std::process::id()));
        std::fs::write(&path, [7; 10_000]).unwrap();
        let open = || std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let buffer = HostBuffer::map_file(open(), 5001..9000).unwrap();
        assert_eq!((buffer.size(), buffer.page_offset()), (3999, 5001 % page_size()));
        buffer.write(3990, &[8; 9]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((&bytes[8991..9000], &bytes[9000..9002], bytes[8990]), (&[8; 9][..], &[7; 2][..], 7));
        open().set_len(6000).unwrap();
        match buffer.read(999, &mut [0]) {
            Err(Error::Truncated { size: 6000, end: 6001 }) => {}
            other => panic!("{other:?}"),
        }
        buffer.read(998, &mut [0]).unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_child_has_neither_the_memory_nor_its_end() {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

        let buffer = HostBuffer::allocate(4096, PageKind::Base).unwrap();
        let mut slot = Some(buffer);
        let passed = in_a_child(|| {
            let Some(copy) = slot.take() else { return false };
            let refused = matches!(copy.read(0, &mut [0]), Err(Error::OtherProcess));
            // Other memory gets the address in the child, and stays.
            let at = NonZeroUsize::new(copy.as_ptr().addr());
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
            let length = NonZeroUsize::new(4096).unwrap();
            // SAFETY: MAP_FIXED_NOREPLACE replaces nothing.
            let other = unsafe { mmap_anonymous(at, length, ProtFlags::PROT_READ, flags) };
            let before = mappings();
            drop(copy);
            refused && other.is_ok() && mappings() == before
        });
        assert!(passed);
        slot.unwrap().write(0, &[1]).unwrap();
    }

    #[test]
    fn memory_of_others_can_be_read_only() {
        static BYTES: [u8; 64] = [7; 64];
        // SAFETY: nothing writes the bytes.
        let buffer = unsafe { HostBuffer::from_raw_read_only(BYTES.as_ptr(), 64, ()) }.unwrap();
        let mut seen = [0; 64];
        buffer.read(0, &mut seen).unwrap();
        assert_eq!((buffer.is_writable(), seen), (false, BYTES));
        assert!(matches!(buffer.write(0, &[1]), Err(Error::ReadOnly)));
    }

    #[test]
    fn a_child_leaves_what_keeps_foreign_memory_alone() {
        static DROPPED: AtomicBool = AtomicBool::new(false);
        struct Keeper([AtomicU64; 8]);
        impl Drop for Keeper {
            fn drop(&mut self) {
                DROPPED.store(true, Ordering::SeqCst);
            }
        }
        let keeper = Box::new(Keeper(Default::default()));
        let start = keeper.0.as_ptr().cast_mut().cast();
        // SAFETY: the words live as long as the keeper, and are accessed by atomic operations only.
        let mut slot = Some(unsafe { HostBuffer::from_raw(start, 64, keeper) }.unwrap());
        assert!(in_a_child(|| {
            drop(slot.take());
            !DROPPED.load(Ordering::SeqCst)
        }));
        let buffer = slot.unwrap();
        let region = buffer.clone();
        drop(buffer);
        assert!(!DROPPED.load(Ordering::SeqCst));
        drop(region);
        assert!(DROPPED.load(Ordering::SeqCst));
    }
}
