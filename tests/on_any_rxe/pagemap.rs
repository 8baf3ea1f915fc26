//! The physical pages of host memory, proved by reading them through the kernel's own view.

use dma_sg::{Error, PageList, pagemap};
use dmabuf_rdma::exporter::PageKind;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

use crate::assert_refused;
use crate::common::buffers::{heap, udmabuf, udmabuf_kinds};
use crate::common::kcore::Kcore;
use crate::common::system::{huge_pages, transparent_huge_pages, unprivileged};
use crate::common::{assert_same, pattern};

const PAGE: u64 = 4096;

fn physical(pages: &PageList) -> impl Iterator<Item = (u64, u64)> {
    pages.runs().map(|run| (run.pfn * PAGE, run.count * PAGE))
}

#[test]
fn the_pages_of_every_udmabuf_hold_its_bytes() {
    let kcore = Kcore::open();
    for kind in udmabuf_kinds() {
        let subject = (kind.allocate)(6 << 20);
        let put = pattern(6 << 20, 41);
        subject.dmabuf.map().unwrap().write(0, &put).unwrap();
        let pages = subject.backing.as_ref().unwrap().page_list().expect(kind.name);
        assert_eq!((pages.total_len(), pages.page_size()), (6 << 20, PAGE), "{}", kind.name);
        assert_same(&kcore.gather(physical(&pages)), &put, kind.name);
    }
}

#[test]
fn huge_pages_are_few_and_aligned_runs() {
    let _transparent = transparent_huge_pages();
    let _pool = huge_pages(16);
    for pages in [PageKind::Transparent, PageKind::HUGE_2M] {
        let subject = udmabuf(pages, 6 << 20);
        let pages = subject.backing.unwrap().page_list().unwrap();
        assert!(pages.runs().len() <= 3, "{} runs of 3 huge pages", pages.runs().len());
        for (address, length) in physical(&pages) {
            assert_eq!((address % (2 << 20), length % (2 << 20)), (0, 0), "{address:#x} + {length:#x}");
        }
    }
}

#[test]
fn pages_that_nobody_touched_are_brought_in_and_keep_their_bytes() {
    let length = 1 << 20;
    let (read, write) = (ProtFlags::PROT_READ, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let memfd = nix::sys::memfd::memfd_create(c"untouched", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let put = pattern(length as usize, 42);
    nix::sys::uio::pwrite(&memfd, &put, 0).unwrap();
    for protection in [write, read] {
        // Twice as long as the file.
        let size = std::num::NonZeroUsize::new(2 * length as usize).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice, of which no reference is made.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &memfd, 0).unwrap() };
        // From inside one page into another.
        let start = start.as_ptr().cast::<u8>().wrapping_add(PAGE as usize + 100);
        let pages = pagemap::host_range(start, 2 * PAGE).unwrap();
        assert_eq!(pages.num_pages(), 3);
        let seen = Kcore::open().gather(physical(&pages));
        assert_same(&seen, &put[PAGE as usize..][..3 * PAGE as usize], "the pages that the range touches");
        // Beyond the end of the file there is no page to bring in.
        let end = start.wrapping_add(length as usize);
        let beyond = pagemap::host_range(end, 8);
        assert_refused!(beyond, Error::NoFrame { .. });
        assert_eq!(beyond.unwrap_err().errno(), Some(libc::EFAULT));
    }
}

#[test]
fn a_dma_bufs_own_mapping_is_refused_and_not_shown_as_zeros() {
    let buffer = heap(1 << 20);
    let size = std::num::NonZeroUsize::new(1 << 20).unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice, of which no reference is made.
    let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &buffer, 0).unwrap() };
    let refused = pagemap::host_range(start.as_ptr().cast(), 1 << 20);
    let message = assert_refused!(refused, Error::NoFrame { .. });
    assert!(message.contains("a udmabuf's memfds"), "{message}");
    assert_eq!(refused.unwrap_err().errno(), Some(libc::EINVAL));
    // SAFETY: this test's own mapping, used no more.
    unsafe { nix::sys::mman::munmap(start, size.get()).unwrap() };
}

#[test]
fn without_the_privilege_there_are_no_addresses() {
    let backing = udmabuf(PageKind::Base, 1 << 20).backing.unwrap();
    let refused = unprivileged(|| backing.page_list());
    let message = assert_refused!(refused, Error::FramesHidden);
    assert!(message.contains("CAP_SYS_ADMIN"), "{message}");
}

#[test]
fn addresses_that_are_not_mapped_are_refused() {
    let null = pagemap::host_range(std::ptr::null(), 1);
    assert_refused!(null, Error::NoFrame { address: 0, .. });
    let odd = pagemap::host_range(std::ptr::without_provenance(1 << 62), PAGE);
    assert!(matches!(odd, Err(Error::NoFrame { .. } | Error::PagemapTruncated { .. })), "{odd:?}");
    assert_refused!(
        pagemap::host_range(std::ptr::without_provenance(16), u64::MAX - 20),
        Error::AddressOverflow { .. }
    );
}
