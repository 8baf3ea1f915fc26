//! The physical pages behind host memory, from /proc/self/pagemap: no module needed, only privilege.
//!
//! For a udmabuf this shows what any importer gets, since its pages are those of the memfds in its
//! [`Backing`]. The mapping of a dma-buf itself shows nothing there (`VM_PFNMAP`), so for other exporters
//! it takes a device's view.
//!
//! `unsafe` is here for one madvise(2). Source: `fs/proc/task_mmu.c`,
//! `Documentation/admin-guide/mm/pagemap.rst`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};

use super::{PageList, PageRun};
use crate::exporter::Backing;
use crate::umem::page_size;
use crate::{Error, Result};

const PAGEMAP: &str = "/proc/self/pagemap";
const ENTRY: usize = size_of::<u64>();
/// Entries a read: enough to make the call's cost vanish, few enough to stay in the cache.
const BATCH: usize = (128 << 10) / ENTRY;

const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// The pages behind a udmabuf, in the order of its bytes. udmabuf holds them where they are, so the list
/// is true for as long as the dma-buf lives.
///
/// # Errors
/// As [`host_range`].
pub fn of_backing(backing: &Backing) -> Result<PageList> {
    // They are shared and exist, so a read brings in the same ones as a write, and many at a time.
    frames_here(backing.as_ptr(), backing.len(), |address, length| {
        bring_in(address, length, MmapAdvise::MADV_POPULATE_READ)
    })
}

/// The pages that `length` bytes of this process's memory from `start` touch, whole pages, so that the
/// range begins `start % page_size` bytes into the list. Pages that are not in memory are brought in,
/// for writing where the mapping is writable; the contents stay as they are.
///
/// The kernel moves pages that nobody pins, even locked ones. Who asks must know that something does: a
/// memory region, a udmabuf, io_uring's registered buffers. Otherwise the list is of the moment.
///
/// # Errors
/// - [`Error::ZeroLength`], [`AddressError::AddressOverflow`](crate::error::AddressError::AddressOverflow): an empty range, or one beyond the address space.
/// - [`AddressError::FramesHidden`](crate::error::AddressError::FramesHidden): the kernel shows page frames only to CAP_SYS_ADMIN of the initial user
///   namespace; to others it gives zeros, which are never returned.
/// - [`AddressError::NoFrame`](crate::error::AddressError::NoFrame): there is no page: nothing is mapped, a fault would raise SIGBUS, or it is the
///   mapping of a dma-buf or of device memory (`EINVAL`, `ENOMEM`, `EFAULT`, `EHWPOISON`).
/// - [`AddressError::PagemapTruncated`](crate::error::AddressError::PagemapTruncated), [`AddressError::Pagemap`](crate::error::AddressError::Pagemap): the file ended early, or cannot be read.
#[doc(alias = "pagemap")]
pub fn host_range(start: *const u8, length: u64) -> Result<PageList> {
    frames_here(start, length, |address, length| {
        match bring_in(address, length, MmapAdvise::MADV_POPULATE_WRITE) {
            // A mapping that is not writable.
            Err(Errno::EINVAL) => bring_in(address, length, MmapAdvise::MADV_POPULATE_READ),
            answer => answer,
        }
    })
}

/// [`frames`] of this process.
fn frames_here(
    start: *const u8,
    length: u64,
    populate: impl Fn(u64, u64) -> Result<(), Errno>,
) -> Result<PageList> {
    let file = File::open(PAGEMAP).map_err(|source| match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => Error::Addresses(crate::error::AddressError::FramesHidden),
        _ => Error::Addresses(crate::error::AddressError::Pagemap { operation: "open", source }),
    })?;
    let read = |buffer: &mut [u8], offset| file.read_at(buffer, offset);
    frames(start.addr() as u64, length, page_size(), read, populate)
}

/// Brings pages in, without changing what is in them. `advice` is one of the two that populate.
fn bring_in(address: u64, length: u64, advice: MmapAdvise) -> Result<(), Errno> {
    let start = NonNull::new(std::ptr::without_provenance_mut(address as usize)).ok_or(Errno::EINVAL)?;
    // SAFETY: these two advices fault pages in as an access would; they change neither contents nor
    // mappings, whoever owns the range, and the kernel checks that it is mapped.
    unsafe { madvise(start, length as usize, advice) }
}

/// A list of pages with the file and the populating call of the caller's choice.
fn frames(
    start: u64,
    length: u64,
    page_size: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    populate: impl Fn(u64, u64) -> Result<(), Errno>,
) -> Result<PageList> {
    if length == 0 {
        return Err(Error::ZeroLength { offset: 0 });
    }
    // One page less than 64 bits hold, so that no end is beyond them.
    let end = start.checked_add(length).filter(|end| *end <= u64::MAX - page_size);
    let end = end
        .ok_or(Error::Addresses(crate::error::AddressError::AddressOverflow { addr: start, length }))?
        .next_multiple_of(page_size);
    let mut address = start - start % page_size;
    let pages = (end - address) / page_size;
    let mut buffer = vec![0; ENTRY * BATCH.min(pages as usize)];
    let mut runs: Vec<PageRun> = Vec::new();
    while address < end {
        let count = BATCH.min(((end - address) / page_size) as usize);
        let buffer = &mut buffer[..count * ENTRY];
        read_entries(buffer, address / page_size, page_size, &read)?;
        let mut missing = merge(buffer, &mut runs)?;
        if missing < count {
            // All the rest of the batch at once: what is there already costs little.
            let from = address + missing as u64 * page_size;
            let rest = (count - missing) as u64 * page_size;
            populate(from, rest).map_err(|errno| {
                Error::Addresses(crate::error::AddressError::NoFrame { address: from, source: errno.into() })
            })?;
            let buffer = &mut buffer[missing * ENTRY..];
            read_entries(buffer, from / page_size, page_size, &read)?;
            missing += merge(buffer, &mut runs)?;
        }
        if missing < count {
            let source = io::Error::from(Errno::EFAULT);
            return Err(Error::Addresses(crate::error::AddressError::NoFrame {
                address: address + missing as u64 * page_size,
                source,
            }));
        }
        address += count as u64 * page_size;
    }
    PageList::from_runs(page_size, runs)
}

/// Fills a buffer with the entries from page number `first`.
fn read_entries(
    buffer: &mut [u8],
    first: u64,
    page_size: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
) -> Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match read(&mut buffer[done..], first * ENTRY as u64 + done as u64) {
            Ok(0) => {
                return Err(Error::Addresses(crate::error::AddressError::PagemapTruncated {
                    address: (first + (done / ENTRY) as u64) * page_size,
                }));
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(Error::Addresses(crate::error::AddressError::Pagemap {
                    operation: "read",
                    source,
                }));
            }
        }
    }
    Ok(())
}

/// Appends the frames of entries to the runs, up to the first page that is not in memory; returns how
/// many those were.
fn merge(entries: &[u8], runs: &mut Vec<PageRun>) -> Result<usize> {
    // The last run lives outside the list, where the loop can keep it in registers.
    let mut last = runs.pop().unwrap_or(PageRun { pfn: 0, count: 0 });
    // What continues a run mostly has the flags of the page before too, and takes one comparison. To
    // begin with nothing does: some bits of an entry are never set.
    let mut expected = u64::MAX;
    let mut count = 0;
    for entry in entries.as_chunks::<ENTRY>().0 {
        let entry = u64::from_ne_bytes(*entry);
        if entry != expected {
            let pfn = entry & FRAME;
            if entry & PRESENT == 0 {
                break;
            }
            if pfn == 0 {
                return Err(Error::Addresses(crate::error::AddressError::FramesHidden));
            }
            if last.count == 0 || pfn != last.pfn + last.count {
                if last.count > 0 {
                    runs.push(last);
                }
                last = PageRun { pfn, count: 0 };
            }
        }
        last.count += 1;
        count += 1;
        expected = entry.wrapping_add(1);
    }
    if last.count > 0 {
        runs.push(last);
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const PAGE: u64 = 4096;

    /// A pagemap of these entries from page `first` on, read in pieces of at most `piece` bytes.
    struct Fake {
        first: u64,
        entries: RefCell<Vec<u64>>,
        piece: usize,
        populated: RefCell<Vec<(u64, u64)>>,
    }

    impl Fake {
        fn new(first: u64, entries: Vec<u64>) -> Self {
            Self { first, entries: entries.into(), piece: usize::MAX, populated: RefCell::default() }
        }

        fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let at = offset.checked_sub(self.first * 8).expect("no page before the range") as usize;
            let entries = self.entries.borrow();
            let wanted = entries.iter().skip(at / 8).take(buffer.len() / 8 + 2);
            let bytes: Vec<u8> = wanted.flat_map(|entry| entry.to_ne_bytes()).collect();
            let rest = bytes.get(at % 8..).unwrap_or(&[]);
            let count = rest.len().min(buffer.len()).min(self.piece);
            buffer[..count].copy_from_slice(&rest[..count]);
            Ok(count)
        }

        /// Pages get the frame number 7000 + their place.
        fn populate(&self, address: u64, length: u64) -> Result<(), Errno> {
            self.populated.borrow_mut().push((address, length));
            let first = (address / PAGE - self.first) as usize;
            for (place, entry) in self.entries.borrow_mut().iter_mut().enumerate().skip(first) {
                if *entry & PRESENT == 0 && place < first + (length / PAGE) as usize {
                    *entry = PRESENT | (7000 + place as u64);
                }
            }
            Ok(())
        }

        fn frames(&self, start: u64, length: u64) -> Result<Vec<(u64, u64)>> {
            let list = frames(start, length, PAGE, |b, o| self.read(b, o), |a, l| self.populate(a, l))?;
            Ok(list.runs().map(|run| (run.pfn, run.count)).collect())
        }
    }

    fn at(pfn: u64) -> u64 {
        // Bits above the frame number: soft-dirty, exclusive, file page.
        PRESENT | 1 << 61 | 1 << 56 | 1 << 55 | pfn
    }

    #[test]
    fn neighbours_merge_across_batches_and_short_reads() {
        let pages = 2 * BATCH as u64 + 77;
        let mut fake = Fake::new(0x100, (0..pages).map(|n| at(5000 + n)).collect());
        assert_eq!(fake.frames(0x100 * PAGE, pages * PAGE).unwrap(), [(5000, pages)]);
        fake.entries.borrow_mut()[70] ^= 1 << 55; // soft-dirty says nothing about the place
        assert_eq!(fake.frames(0x100 * PAGE, pages * PAGE).unwrap(), [(5000, pages)]);
        fake.piece = 1001; // not even whole entries
        assert_eq!(fake.frames(0x100 * PAGE, pages * PAGE).unwrap(), [(5000, pages)]);
        fake.entries.borrow_mut()[BATCH] = at(9);
        let rest = pages - BATCH as u64 - 1;
        let expected = [(5000, BATCH as u64), (9, 1), (5001 + BATCH as u64, rest)];
        assert_eq!(fake.frames(0x100 * PAGE, pages * PAGE).unwrap(), expected);
        // A range inside pages takes those that it touches.
        assert_eq!(fake.frames(0x100 * PAGE + 4095, 2).unwrap(), [(5000, 2)]);
        assert_eq!(fake.frames(0x101 * PAGE + 1, 1).unwrap(), [(5001, 1)]);
    }

    /// Against a model that merges nothing.
    #[test]
    fn the_runs_are_the_pages_in_their_order() {
        let mut seed = 7_u64;
        for round in 0..200 {
            let pages: Vec<u64> = (0..1 + round % 50)
                .map(|_| {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    1 + (seed >> 33) % 6
                })
                .collect();
            let fake = Fake::new(3, pages.iter().map(|pfn| at(*pfn)).collect());
            let runs = fake.frames(3 * PAGE, pages.len() as u64 * PAGE).unwrap();
            let seen: Vec<u64> = runs.iter().flat_map(|(pfn, count)| *pfn..pfn + count).collect();
            assert_eq!(seen, pages);
            assert!(
                runs.windows(2).all(|pair| pair[0].0 + pair[0].1 != pair[1].0),
                "{runs:?} are not merged"
            );
        }
    }

    #[test]
    fn pages_that_are_not_in_memory_are_brought_in() {
        let swapped = 1 << 62 | 0x1234;
        let fake = Fake::new(0, vec![at(50), at(51), 0, at(52), swapped, at(53)]);
        assert_eq!(fake.frames(0, 6 * PAGE).unwrap(), [(50, 2), (7002, 1), (52, 1), (7004, 1), (53, 1)]);
        assert_eq!(*fake.populated.borrow(), [(2 * PAGE, 4 * PAGE)], "once, and only what follows");
        // What cannot be brought in, or is not there even then, is an error with its address.
        let fake = Fake::new(0, vec![at(50), 0]);
        let refuse = |_, _| Err(Errno::EINVAL);
        let refused = frames(0, 2 * PAGE, PAGE, |b, o| fake.read(b, o), refuse).unwrap_err();
        assert!(
            matches!(refused, Error::Addresses(crate::error::AddressError::NoFrame { address: 4096, .. })),
            "{refused:?}"
        );
        assert_eq!(refused.errno(), Some(libc::EINVAL));
        let refused = frames(0, 2 * PAGE, PAGE, |b, o| fake.read(b, o), |_, _| Ok(())).unwrap_err();
        assert!(
            matches!(refused, Error::Addresses(crate::error::AddressError::NoFrame { address: 4096, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn zeros_and_ends_are_named() {
        let hidden = Fake::new(0, vec![at(50), PRESENT]);
        assert!(matches!(
            hidden.frames(0, 2 * PAGE),
            Err(Error::Addresses(crate::error::AddressError::FramesHidden))
        ));
        let short = Fake::new(0x10, vec![at(50); 3]);
        assert!(matches!(
            short.frames(0x10 * PAGE, 4 * PAGE),
            Err(Error::Addresses(crate::error::AddressError::PagemapTruncated { address: 0x13000 }))
        ));
        assert!(matches!(short.frames(0, 0), Err(Error::ZeroLength { .. })));
        for (start, length) in
            [(u64::MAX, 1), (1, u64::MAX), (PAGE, u64::MAX - PAGE - 5), (u64::MAX - PAGE, 1)]
        {
            assert!(
                matches!(
                    short.frames(start, length),
                    Err(Error::Addresses(crate::error::AddressError::AddressOverflow { .. }))
                ),
                "{start:#x}"
            );
        }
        let broken = |_: &mut [u8], _| Err(io::Error::from_raw_os_error(libc::EIO));
        let refused = frames(0, PAGE, PAGE, broken, |_, _| Ok(())).unwrap_err();
        assert!(
            matches!(
                refused,
                Error::Addresses(crate::error::AddressError::Pagemap { operation: "read", .. })
            ),
            "{refused:?}"
        );
    }
}
