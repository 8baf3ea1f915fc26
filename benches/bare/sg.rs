//! The scatterlist of `benches/sg.c`.

use std::marker::PhantomData;
use std::ptr::NonNull;

#[repr(C)]
struct Entry {
    _opaque: [u64; 4],
}

unsafe extern "C" {
    fn bare_sg_build(pages: *const u64, n: u64, page_size: u32, count: *mut u64) -> *mut Entry;
    fn bare_sg_free(table: *mut Entry);
    fn bare_sg_blocks(table: *const Entry, count: u64, shift: u32, blocks: *mut u64) -> u64;
    fn bare_sg_starts(table: *const Entry, count: u64, starts: *mut u64);
    fn bare_sg_find(table: *const Entry, starts: *const u64, count: u64, offsets: *const u64, n: u64) -> u64;
    fn bare_sg_find_chain(
        table: *const Entry,
        starts: *const u64,
        count: u64,
        offsets: *const u64,
        n: u64,
    ) -> u64;
    fn bare_sg_best(table: *const Entry, count: u64, length: u64, bitmap: u64, iova: u64) -> u64;
}

/// A table of entries of 32 bytes.
#[derive(Debug)]
pub struct Scatterlist {
    table: NonNull<Entry>,
    count: u64,
    length: u64,
    owned: PhantomData<Entry>,
}

impl Scatterlist {
    /// Pages merged; `None` without memory.
    pub fn build(pages: &[u64], page_size: u32) -> Option<Self> {
        let mut count = 0;
        // SAFETY: the slice is as long as it says, and the count is written to.
        let table = unsafe { bare_sg_build(pages.as_ptr(), pages.len() as u64, page_size, &mut count) };
        let length = pages.len() as u64 * u64::from(page_size);
        Some(Self { table: NonNull::new(table)?, count, length, owned: PhantomData })
    }

    /// Number of entries.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Goes through all blocks; returns how many.
    pub fn blocks(&self, page_size: u64, table: &mut [u64; 512]) -> u64 {
        // SAFETY: the table has `count` entries, the other has 512, as the C wants.
        unsafe {
            bare_sg_blocks(self.table.as_ptr(), self.count, page_size.trailing_zeros(), table.as_mut_ptr())
        }
    }

    /// Where each entry begins.
    pub fn starts(&self) -> Vec<u64> {
        let mut starts = vec![0; self.count as usize];
        // SAFETY: both have `count` elements.
        unsafe { bare_sg_starts(self.table.as_ptr(), self.count, starts.as_mut_ptr()) };
        starts
    }

    /// The sum of the addresses at offsets that lie in the list.
    pub fn find(&self, starts: &[u64], offsets: &[u64]) -> u64 {
        assert_eq!(starts.len() as u64, self.count);
        let n = offsets.len() as u64;
        // SAFETY: both tables have `count` elements, the offsets `n`; any offset finds an entry.
        unsafe { bare_sg_find(self.table.as_ptr(), starts.as_ptr(), self.count, offsets.as_ptr(), n) }
    }

    /// The last address, where each lookup waits for the one before.
    pub fn find_chain(&self, starts: &[u64], offsets: &[u64]) -> u64 {
        assert_eq!(starts.len() as u64, self.count);
        let n = offsets.len() as u64;
        // SAFETY: as in `find`.
        unsafe { bare_sg_find_chain(self.table.as_ptr(), starts.as_ptr(), self.count, offsets.as_ptr(), n) }
    }

    /// The page size that fits; 0 if none does.
    pub fn best_page_size(&self, bitmap: u64, iova: u64) -> u64 {
        // SAFETY: the table has `count` entries.
        unsafe { bare_sg_best(self.table.as_ptr(), self.count, self.length, bitmap, iova) }
    }
}

impl Drop for Scatterlist {
    fn drop(&mut self) {
        // SAFETY: it came from `bare_sg_build`, and nobody else frees it.
        unsafe { bare_sg_free(self.table.as_ptr()) };
    }
}
