//! Builds a list: merges contiguous runs as they come and checks every sum.
//!
//! `unsafe` sets the lengths of vectors after their spare capacity was filled. Pushing the runs of scattered
//! pages one by one would double the time of a build.

use crate::list::STRIDE;
use crate::{DmaSg, DmaSgList, Error, RangeError, Result};

/// Collects runs in the order of their bytes, and merges contiguous ones.
///
/// It takes 16 bytes of memory per merged run, however many pages are pushed.
#[derive(Debug, Clone, Default)]
pub struct DmaSgBuilder {
    runs: Vec<DmaSg>,
    /// The offset at which each stride of runs begins.
    index: Vec<u64>,
    /// The open run, which the next one may continue, and the number of bytes before it.
    last: OpenRun,
    before: u64,
}

/// Limit in runs (16 MiB) of the capacity that a caller's number or an iterator's size hint reserves.
const RESERVE: usize = 1 << 20;

/// The open run. It stores its end, because the next run is compared with that.
#[derive(Debug, Clone, Copy)]
struct OpenRun {
    addr: u64,
    end: u64,
}

impl OpenRun {
    /// No run. Nothing continues it: a byte at its end would end beyond 64 bits.
    const NONE: Self = Self { addr: u64::MAX, end: u64::MAX };

    fn is_none(self) -> bool {
        self.end == self.addr
    }

    fn len(self) -> u64 {
        self.end - self.addr
    }

    fn run(self) -> DmaSg {
        DmaSg { addr: self.addr, len: self.len() }
    }

    /// The largest end with which, after `before` bytes, both end and total fit in 64 bits.
    fn limit(self, before: u64) -> u64 {
        self.addr.saturating_add(u64::MAX - before)
    }
}

impl Default for OpenRun {
    fn default() -> Self {
        Self::NONE
    }
}

impl DmaSgBuilder {
    /// Makes an empty builder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes an empty builder with capacity for `runs` merged runs, at most 2^20 (16 MiB). More runs grow it.
    pub fn with_capacity(runs: usize) -> Self {
        Self { runs: Vec::with_capacity(runs.min(RESERVE)), ..Self::default() }
    }

    /// Number of bytes pushed so far.
    pub fn total_len(&self) -> u64 {
        self.before + self.last.len()
    }

    /// Appends a run. A run that begins where the last one ends extends that one.
    ///
    /// # Errors
    /// The builder does not change if it returns an error:
    /// - [`RangeError::Empty`]: the run is empty; the error's offset is the run's place in the list.
    /// - [`Error::AddressOverflow`]: the end of the run does not fit in 64 bits.
    /// - [`Error::TotalOverflow`]: the total length does not fit in 64 bits.
    #[inline]
    pub fn push(&mut self, run: DmaSg) -> Result<()> {
        self.extend([run])
    }

    /// Appends a run without merging it into the last one, for a device that limits its segments.
    ///
    /// # Errors
    /// See [`push`](Self::push).
    pub fn push_unmerged(&mut self, run: DmaSg) -> Result<()> {
        let total = self.total_len();
        let end = checked(run, total).ok_or_else(|| refused(run, total))?;
        self.close();
        self.last = OpenRun { addr: run.addr, end };
        Ok(())
    }

    /// Appends many runs, each as [`push`](Self::push) does.
    ///
    /// # Errors
    /// See [`push`](Self::push). The runs before the refused one stay in the builder.
    #[inline]
    pub fn extend(&mut self, runs: impl IntoIterator<Item = DmaSg>) -> Result<()> {
        let mut runs = runs.into_iter();
        // Enough if no runs merge. Unused capacity is freed without having been touched.
        self.runs.reserve(runs.size_hint().0.min(RESERVE));
        if self.last.is_none() {
            let Some(run) = runs.next() else { return Ok(()) };
            self.push_unmerged(run)?;
        }
        loop {
            match self.fill(&mut runs) {
                Stop::End => return Ok(()),
                Stop::Refused(run) => return Err(refused(run, self.total_len())),
                Stop::Full => self.runs.reserve(1),
            }
        }
    }

    /// Appends runs until the capacity is used up.
    ///
    /// The loop calls nothing and keeps its state in locals: a page that continues the open run costs a few
    /// instructions and no store, any other page little more than the store of a run.
    #[inline]
    fn fill(&mut self, runs: &mut impl Iterator<Item = DmaSg>) -> Stop {
        let (mut last, mut before) = (self.last, self.before);
        let room = self.runs.capacity();
        self.index.reserve(strides(room) - self.index.len());
        let mut starts = self.index.spare_capacity_mut().iter_mut();
        let mut places = self.runs.spare_capacity_mut().iter_mut();
        let stop = loop {
            if places.len() == 0 {
                break Stop::Full;
            }
            let limit = last.limit(before);
            let next = loop {
                match runs.next() {
                    // A length of 0 wraps to more than the limit.
                    Some(run) if run.addr == last.end && run.len.wrapping_sub(1) < limit - run.addr => {
                        last.end = run.addr + run.len;
                    }
                    other => break other,
                }
            };
            let Some(run) = next else { break Stop::End };
            let total = before + last.len();
            let Some(end) = checked(run, total) else { break Stop::Refused(run) };
            if starts_stride(room - places.len()) {
                starts.next().expect("capacity for all strides").write(before);
            }
            places.next().expect("not full").write(last.run());
            (last, before) = (OpenRun { addr: run.addr, end }, total);
        };
        let filled = room - places.len();
        // SAFETY: both lengths are within capacity. `filled` counts the places taken so far, and the loop
        // wrote each place that it took. It also wrote an index entry for each run that starts a stride,
        // and `strides(filled)` counts those.
        unsafe {
            self.runs.set_len(filled);
            self.index.set_len(strides(filled));
        }
        (self.last, self.before) = (last, before);
        stop
    }

    /// Makes the list of all runs pushed.
    ///
    /// # Errors
    /// [`RangeError::Empty`]: nothing was pushed.
    pub fn finish(mut self) -> Result<DmaSgList> {
        let total = self.total_len();
        if total == 0 {
            return Err(Error::Range(RangeError::Empty { offset: 0 }));
        }
        self.close();
        self.index.push(total);
        Ok(DmaSgList::from_checked(self.runs.into(), self.index.into(), total))
    }

    /// Stores the open run, if there is one.
    fn close(&mut self) {
        let last = std::mem::take(&mut self.last);
        if last.is_none() {
            return;
        }
        if starts_stride(self.runs.len()) {
            self.index.push(self.before);
        }
        self.runs.push(last.run());
        self.before += last.len();
    }
}

/// Whether the index has an entry for the run with this index.
#[inline]
fn starts_stride(run: usize) -> bool {
    run.is_multiple_of(STRIDE)
}

/// Number of strides that hold so many runs.
#[inline]
fn strides(runs: usize) -> usize {
    runs.div_ceil(STRIDE)
}

/// Why `fill` returned.
enum Stop {
    End,
    Full,
    Refused(DmaSg),
}

/// The end of a run that fits after `total` bytes; `None` for one that [`refused`] explains.
#[inline]
fn checked(run: DmaSg, total: u64) -> Option<u64> {
    total.checked_add(run.len)?;
    run.addr.checked_add(run.len).filter(|&end| end != run.addr)
}

#[cold]
#[inline(never)]
fn refused(run: DmaSg, total: u64) -> Error {
    let DmaSg { addr, len: length } = run;
    if length == 0 {
        Error::Range(RangeError::Empty { offset: total })
    } else if addr.checked_add(length).is_none() {
        Error::AddressOverflow { addr, length }
    } else {
        Error::TotalOverflow { total, length }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sg(addr: u64, len: u64) -> DmaSg {
        DmaSg { addr, len }
    }

    #[test]
    fn contiguous_runs_merge() {
        let list = DmaSgList::from_runs([sg(0, 1), sg(1, 4095), sg(0x2000, 8), sg(0x1ff0, 8), sg(0x1ff8, 8)])
            .unwrap();
        assert_eq!(list.runs(), [sg(0, 0x1000), sg(0x2000, 8), sg(0x1ff0, 16)]);
        let mut apart = DmaSgBuilder::with_capacity(2);
        apart.push_unmerged(sg(0, 1)).unwrap();
        apart.push_unmerged(sg(1, 1)).unwrap();
        apart.push(sg(2, 1)).unwrap();
        assert_eq!(apart.finish().unwrap().runs(), [sg(0, 1), sg(1, 2)]);
    }

    #[test]
    fn any_capacity_and_size_hint_are_taken() {
        struct Endless;
        impl Iterator for Endless {
            type Item = DmaSg;
            fn next(&mut self) -> Option<DmaSg> {
                None
            }
            fn size_hint(&self) -> (usize, Option<usize>) {
                (usize::MAX, None)
            }
        }
        for capacity in [0, 1, usize::MAX] {
            let mut builder = DmaSgBuilder::with_capacity(capacity);
            builder.extend(Endless).unwrap();
            builder.push(sg(0, 1)).unwrap();
            assert_eq!(builder.finish().unwrap().runs(), [sg(0, 1)]);
        }
    }

    #[test]
    fn a_refused_run_does_not_change_the_builder() {
        let mut builder = DmaSgBuilder::new();
        builder.push(sg(0x1000, 0x1000)).unwrap();
        assert!(matches!(builder.push(sg(7, 0)), Err(Error::Range(RangeError::Empty { offset: 0x1000 }))));
        assert!(matches!(
            builder.push_unmerged(sg(7, 0)),
            Err(Error::Range(RangeError::Empty { offset: 0x1000 }))
        ));
        assert!(matches!(
            builder.push(sg(u64::MAX, 1)),
            Err(Error::AddressOverflow { addr: u64::MAX, length: 1 })
        ));
        let most = u64::MAX - 0xfff;
        assert!(matches!(
            builder.push(sg(0, most)),
            Err(Error::TotalOverflow { total: 0x1000, length }) if length == most
        ));
        assert!(matches!(
            builder.extend([sg(0x2000, 5), sg(0, 0)]),
            Err(Error::Range(RangeError::Empty { offset: 0x1005 }))
        ));
        assert_eq!(builder.finish().unwrap().runs(), [sg(0x1000, 0x1005)]);
        assert!(matches!(DmaSgBuilder::new().finish(), Err(Error::Range(RangeError::Empty { offset: 0 }))));
        assert!(matches!(DmaSgList::from_runs([]), Err(Error::Range(RangeError::Empty { offset: 0 }))));
    }

    /// The builder never stores more than the open run.
    #[test]
    fn a_tebibyte_of_contiguous_pages_is_one_run() {
        let mut builder = DmaSgBuilder::new();
        // Runs of 2 MiB keep a debug build fast.
        builder.extend((0..1 << 19).map(|i| sg(i << 21, 2 << 20))).unwrap();
        assert!(builder.runs.is_empty() && builder.runs.capacity() <= RESERVE);
        assert_eq!(builder.finish().unwrap().runs(), [sg(0, 1 << 40)]);
    }
}
