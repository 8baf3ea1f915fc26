//! Host memory of every kind.
//!
//! `unsafe` is here for memory that the library does not own.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dmabuf_rdma::HostBuffer;
use dmabuf_rdma::exporter::PageKind;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::buffers::memfd;
use super::pattern;
use super::system::{Setting, huge_pages};

/// Memory of base pages.
#[track_caller]
pub fn host(size: u64) -> HostBuffer {
    HostBuffer::allocate(size, PageKind::Base).expect("host memory")
}

/// Memory of base pages, filled with a pattern.
#[track_caller]
pub fn filled(size: u64, seed: u64) -> HostBuffer {
    let buffer = host(size);
    buffer.write(0, &pattern(size as usize, seed)).expect("write");
    buffer
}

/// All bytes of a buffer.
#[track_caller]
pub fn host_contents(buffer: &HostBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.size() as usize];
    buffer.read(0, &mut bytes).expect("read");
    bytes
}

/// Memory of the C allocator's, which counts when it is freed.
pub struct Arena {
    start: *mut u8,
    layout: Layout,
    freed: Arc<AtomicUsize>,
}

// SAFETY: the memory belongs to no thread, and this type does not access it.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Zeroed memory, which begins 16 bytes after a page boundary, and its count of frees.
    pub fn new(size: u64) -> (Self, Arc<AtomicUsize>) {
        let layout = Layout::from_size_align(size as usize + 16, 4096).unwrap();
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        assert!(!start.is_null());
        let freed = Arc::new(AtomicUsize::new(0));
        (Self { start, layout, freed: freed.clone() }, freed)
    }

    pub fn start(&self) -> *mut u8 {
        self.start.wrapping_add(16)
    }

    /// A buffer that keeps the arena.
    pub fn into_buffer(self) -> HostBuffer {
        let (start, length) = (self.start(), self.layout.size() as u64 - 16);
        // SAFETY: the memory lives as long as the arena, and nothing else accesses it.
        unsafe { HostBuffer::from_raw(start, length, self) }.expect("from_raw")
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.freed.fetch_add(1, Ordering::SeqCst);
        // SAFETY: it was allocated with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// A kind of host memory to test with.
pub struct HostKind {
    pub name: &'static str,
    pub allocate: fn(u64) -> HostBuffer,
    /// A setting that must hold while such memory exists.
    _setting: Option<Rc<Setting>>,
}

/// A part of a hugetlb memfd that begins inside a huge page.
fn huge_memfd(size: u64) -> HostBuffer {
    const HUGE: u64 = 2 << 20;
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB | MFdFlags::MFD_CLOEXEC;
    let memfd = memfd_create(c"test", flags).expect("memfd");
    nix::unistd::ftruncate(&memfd, (size.next_multiple_of(HUGE) + HUGE) as i64).expect("ftruncate");
    HostBuffer::map_file(memfd, 4096..4096 + size).expect("a hugetlb memfd")
}

/// All kinds of host memory. Some begin inside a page.
pub fn host_kinds() -> Vec<HostKind> {
    let kind = |name, allocate| HostKind { name, allocate, _setting: None };
    let enabled = Setting::new("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
    let pool = Rc::new(huge_pages(16));
    vec![
        kind("base pages", host),
        HostKind {
            name: "transparent huge pages",
            allocate: |size| HostBuffer::allocate(size, PageKind::Transparent).expect("host memory"),
            _setting: Some(Rc::new(enabled)),
        },
        HostKind {
            name: "2 MiB huge pages",
            allocate: |size| HostBuffer::allocate(size, PageKind::HUGE_2M).expect("host memory"),
            _setting: Some(pool.clone()),
        },
        HostKind { name: "a part of a memfd of huge pages", allocate: huge_memfd, _setting: Some(pool) },
        kind("a memfd", |size| HostBuffer::map_file(memfd(size), ..).expect("a memfd")),
        kind("a part of a memfd", |size| {
            HostBuffer::map_file(memfd(size + 8192), 4200..4200 + size).expect("a memfd")
        }),
        kind("memory of others", |size| Arena::new(size).0.into_buffer()),
    ]
}
