//! The physical pages behind this process's memory, from `/proc/self/pagemap`.
//!
//! Reading them takes `CAP_SYS_ADMIN` in the initial user namespace, and no kernel module. A udmabuf
//! consists of the pages of its memfds, so this shows the pages that every importer of a udmabuf gets. A
//! mapping of a dma-buf itself shows no pages (`VM_PFNMAP`); for the buffers of other exporters, use a
//! [device's view](crate::device_view).
//!
//! `unsafe` calls madvise(2). Source: `fs/proc/task_mmu.c`, `Documentation/admin-guide/mm/pagemap.rst`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};

use crate::{Error, PageList, PageRun, RangeError, Result, page_size};

const PAGEMAP: &str = "/proc/self/pagemap";
const ENTRY: usize = size_of::<u64>();
/// Entries per read: enough to hide the cost of the call, few enough to stay in the cache.
const BATCH: usize = (128 << 10) / ENTRY;

const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Returns the physical pages that `length` bytes of this process's memory at `start` touch.
///
/// The list holds whole pages; the range begins `start % page_size` bytes into it. The kernel faults missing
/// pages in, for writing if the mapping is writable. The contents do not change, and `start` is never
/// dereferenced, so any address may be passed.
///
/// The kernel may move pages that nothing pins, even locked ones, and then the list is out of date. Pin them
/// first: by a memory region, a udmabuf, or io_uring's registered buffers.
///
/// # Errors
/// - [`RangeError::Empty`]: `length` is 0.
/// - [`Error::AddressOverflow`]: the range ends beyond 64 bits.
/// - [`Error::FramesHidden`]: this process lacks `CAP_SYS_ADMIN` in the initial user namespace. The kernel
///   then shows zeros, which are never returned, or refuses to open the file.
/// - [`Error::NoFrame`]: there is no page. Nothing is mapped there (`ENOMEM`), it is a mapping of a dma-buf
///   or of device memory (`EINVAL`), or an access would raise SIGBUS (`EFAULT`, `EHWPOISON`).
/// - [`Error::PagemapTruncated`]: the range reaches beyond the address space.
/// - [`Error::Pagemap`]: the file cannot be opened or read.
#[doc(alias = "pagemap")]
pub fn host_range(start: *const u8, length: u64) -> Result<PageList> {
    frames_here(start, length, |address, length| {
        match populate(address, length, MmapAdvise::MADV_POPULATE_WRITE) {
            // The mapping is not writable.
            Err(Errno::EINVAL) => populate(address, length, MmapAdvise::MADV_POPULATE_READ),
            answer => answer,
        }
    })
}

/// Like [`host_range`], but faults missing pages in for reading.
///
/// Use it for shared file mappings, such as a memfd's: a read fault brings in the same pages as a write
/// fault, and many of them at once.
///
/// # Errors
/// See [`host_range`].
pub fn shared_range(start: *const u8, length: u64) -> Result<PageList> {
    frames_here(start, length, |address, length| populate(address, length, MmapAdvise::MADV_POPULATE_READ))
}

/// Calls [`frames`] for this process.
fn frames_here(
    start: *const u8,
    length: u64,
    populate: impl Fn(u64, u64) -> Result<(), Errno>,
) -> Result<PageList> {
    let file = File::open(PAGEMAP).map_err(|source| match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => Error::FramesHidden,
        _ => Error::Pagemap { operation: "open", source },
    })?;
    let read = |buffer: &mut [u8], offset| file.read_at(buffer, offset);
    frames(start.addr() as u64, length, page_size(), read, populate)
}

/// Faults pages in without changing their contents. `advice` is one of `MADV_POPULATE_*`.
fn populate(address: u64, length: u64, advice: MmapAdvise) -> Result<(), Errno> {
    let start = NonNull::new(std::ptr::without_provenance_mut(address as usize)).ok_or(Errno::EINVAL)?;
    // SAFETY: MADV_POPULATE_* faults pages in as an access would. It changes neither contents nor mappings,
    // whoever owns the range, and the kernel checks that it is mapped.
    unsafe { madvise(start, length as usize, advice) }
}

/// Makes the list of pages. The caller supplies the file and the call that faults pages in.
fn frames(
    start: u64,
    length: u64,
    page_size: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    populate: impl Fn(u64, u64) -> Result<(), Errno>,
) -> Result<PageList> {
    if length == 0 {
        return Err(Error::Range(RangeError::Empty { offset: 0 }));
    }
    // One page is left below 2^64, so that rounding the end up does not overflow.
    let end = start.checked_add(length).filter(|end| *end <= u64::MAX - page_size);
    let end = end.ok_or(Error::AddressOverflow { addr: start, length })?.next_multiple_of(page_size);
    let mut address = start - start % page_size;
    let pages = (end - address) / page_size;
    let mut buffer = vec![0; ENTRY * BATCH.min(pages as usize)];
    let mut runs: Vec<PageRun> = Vec::new();
    while address < end {
        let count = BATCH.min(((end - address) / page_size) as usize);
        let buffer = &mut buffer[..count * ENTRY];
        read_entries(buffer, address / page_size, page_size, &read)?;
        let mut present = merge(buffer, &mut runs)?;
        if present < count {
            // The rest of the batch in one call; pages that are present cost little.
            let from = address + present as u64 * page_size;
            let rest = (count - present) as u64 * page_size;
            populate(from, rest).map_err(|errno| Error::NoFrame { address: from, source: errno.into() })?;
            let buffer = &mut buffer[present * ENTRY..];
            read_entries(buffer, from / page_size, page_size, &read)?;
            present += merge(buffer, &mut runs)?;
        }
        if present < count {
            let source = io::Error::from(Errno::EFAULT);
            return Err(Error::NoFrame { address: address + present as u64 * page_size, source });
        }
        address += count as u64 * page_size;
    }
    PageList::from_runs(page_size, runs)
}

/// Fills the buffer with the entries from page number `first` on.
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
                return Err(Error::PagemapTruncated { address: (first + (done / ENTRY) as u64) * page_size });
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(Error::Pagemap { operation: "read", source });
            }
        }
    }
    Ok(())
}

/// Appends the frames to the runs, up to the first page that is not present, and returns their number.
fn merge(entries: &[u8], runs: &mut Vec<PageRun>) -> Result<usize> {
    // The last run is a local, which the loop keeps in registers.
    let mut last = runs.pop().unwrap_or(PageRun { pfn: 0, count: 0 });
    // A page that continues a run mostly has the flags of the page before too, so one comparison is enough.
    // No entry equals the initial value: some of its bits are always 0.
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
                return Err(Error::FramesHidden);
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

    /// A pagemap of these entries from page `first` on. A read returns at most `most` bytes.
    struct Fake {
        first: u64,
        entries: RefCell<Vec<u64>>,
        most: usize,
        populated: RefCell<Vec<(u64, u64)>>,
    }

    impl Fake {
        fn new(first: u64, entries: Vec<u64>) -> Self {
            Self { first, entries: entries.into(), most: usize::MAX, populated: RefCell::default() }
        }

        fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let at = offset.checked_sub(self.first * 8).expect("no page before the range") as usize;
            let entries = self.entries.borrow();
            let wanted = entries.iter().skip(at / 8).take(buffer.len() / 8 + 2);
            let bytes: Vec<u8> = wanted.flat_map(|entry| entry.to_ne_bytes()).collect();
            let rest = bytes.get(at % 8..).unwrap_or(&[]);
            let count = rest.len().min(buffer.len()).min(self.most);
            buffer[..count].copy_from_slice(&rest[..count]);
            Ok(count)
        }

        /// A populated page gets the frame number 7000 + its index.
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
        // Bits above the frame number: file page, exclusive, soft-dirty.
        PRESENT | 1 << 61 | 1 << 56 | 1 << 55 | pfn
    }

    #[test]
    fn contiguous_pages_merge_across_batches_and_short_reads() {
        let pages = 2 * BATCH as u64 + 77;
        let mut fake = Fake::new(0x100, (0..pages).map(|n| at(5000 + n)).collect());
        assert_eq!(fake.frames(0x100 * PAGE, pages * PAGE).unwrap(), [(5000, pages)]);
        fake.entries.borrow_mut()[70] ^= 1 << 55; // soft-dirty does not affect merging
        assert_eq!(fake.frames(0x100 * PAGE, pages * PAGE).unwrap(), [(5000, pages)]);
        fake.most = 1001; // not a whole number of entries
        assert_eq!(fake.frames(0x100 * PAGE, pages * PAGE).unwrap(), [(5000, pages)]);
        fake.entries.borrow_mut()[BATCH] = at(9);
        let rest = pages - BATCH as u64 - 1;
        let expected = [(5000, BATCH as u64), (9, 1), (5001 + BATCH as u64, rest)];
        assert_eq!(fake.frames(0x100 * PAGE, pages * PAGE).unwrap(), expected);
        // The list holds the whole pages that the range touches.
        assert_eq!(fake.frames(0x100 * PAGE + 4095, 2).unwrap(), [(5000, 2)]);
        assert_eq!(fake.frames(0x101 * PAGE + 1, 1).unwrap(), [(5001, 1)]);
    }

    /// Compared with a model that does not merge.
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
    fn missing_pages_are_faulted_in() {
        let swapped = 1 << 62 | 0x1234;
        let fake = Fake::new(0, vec![at(50), at(51), 0, at(52), swapped, at(53)]);
        assert_eq!(fake.frames(0, 6 * PAGE).unwrap(), [(50, 2), (7002, 1), (52, 1), (7004, 1), (53, 1)]);
        assert_eq!(
            *fake.populated.borrow(),
            [(2 * PAGE, 4 * PAGE)],
            "one call, from the first missing page on"
        );
        // An error names the first page that cannot be faulted in, or is still missing afterwards.
        let fake = Fake::new(0, vec![at(50), 0]);
        let refuse = |_, _| Err(Errno::EINVAL);
        let refused = frames(0, 2 * PAGE, PAGE, |b, o| fake.read(b, o), refuse).unwrap_err();
        assert!(matches!(refused, Error::NoFrame { address: 4096, .. }), "{refused:?}");
        assert_eq!(refused.errno(), Some(libc::EINVAL));
        let refused = frames(0, 2 * PAGE, PAGE, |b, o| fake.read(b, o), |_, _| Ok(())).unwrap_err();
        assert!(matches!(refused, Error::NoFrame { address: 4096, .. }), "{refused:?}");
    }

    #[test]
    fn hidden_frames_and_bad_ranges_are_refused() {
        let hidden = Fake::new(0, vec![at(50), PRESENT]);
        assert!(matches!(hidden.frames(0, 2 * PAGE), Err(Error::FramesHidden)));
        let short = Fake::new(0x10, vec![at(50); 3]);
        assert!(matches!(
            short.frames(0x10 * PAGE, 4 * PAGE),
            Err(Error::PagemapTruncated { address: 0x13000 })
        ));
        assert!(matches!(short.frames(0, 0), Err(Error::Range(RangeError::Empty { .. }))));
        for (start, length) in
            [(u64::MAX, 1), (1, u64::MAX), (PAGE, u64::MAX - PAGE - 5), (u64::MAX - PAGE, 1)]
        {
            assert!(matches!(short.frames(start, length), Err(Error::AddressOverflow { .. })), "{start:#x}");
        }
        let broken = |_: &mut [u8], _| Err(io::Error::from_raw_os_error(libc::EIO));
        let refused = frames(0, PAGE, PAGE, broken, |_, _| Ok(())).unwrap_err();
        assert!(matches!(refused, Error::Pagemap { operation: "read", .. }), "{refused:?}");
    }
}
