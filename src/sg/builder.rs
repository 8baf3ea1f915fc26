//! Making a list: neighbours merged as they come, every sum checked.
//!
//! `unsafe` is here to give vectors the length to which their spare room was filled: pushing the runs of
//! scattered pages one by one costs as much again as all the rest.

use super::list::STRIDE;
use super::{DmaSg, DmaSgList};
use crate::{Error, Result};

/// Collects runs in the order of their bytes and merges those that continue one another.
///
/// Memory is 16 bytes for each merged run, however many pages were pushed.
#[derive(Debug, Clone, Default)]
pub struct DmaSgBuilder {
    runs: Vec<DmaSg>,
    /// The offset at which each stride of runs begins.
    index: Vec<u64>,
    /// The run that grows, and the bytes before it.
    last: Last,
    before: u64,
}

/// The most runs to make room for before they come: 16 MiB.
const RESERVE: usize = 1 << 20;

/// The run that grows, by its ends, since that is what the next one is compared with.
#[derive(Debug, Clone, Copy)]
struct Last {
    addr: u64,
    end: u64,
}

impl Last {
    /// None yet. No run begins at its end: one byte there would end beyond 64 bits.
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

    /// How far it may grow with so many bytes before it: neither its end nor the total leaves 64 bits.
    fn limit(self, before: u64) -> u64 {
        self.addr.saturating_add(u64::MAX - before)
    }
}

impl Default for Last {
    fn default() -> Self {
        Self::NONE
    }
}

impl DmaSgBuilder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty builder with room for so many merged runs.
    pub fn with_capacity(runs: usize) -> Self {
        Self { runs: Vec::with_capacity(runs), ..Self::default() }
    }

    /// Bytes pushed so far.
    pub fn total_len(&self) -> u64 {
        self.before + self.last.len()
    }

    /// Appends a run; one that begins where the last ended makes that longer.
    ///
    /// # Errors
    /// - [`Error::ZeroLength`]: the run is empty; the offset is where in the list it would be.
    /// - [`AddressError::AddressOverflow`](crate::error::AddressError::AddressOverflow): its end does not fit in 64 bits.
    /// - [`AddressError::TotalOverflow`](crate::error::AddressError::TotalOverflow): the length of all runs together does not.
    ///
    /// After an error the builder is as before.
    #[inline]
    pub fn push(&mut self, run: DmaSg) -> Result<()> {
        self.extend([run])
    }

    /// Appends a run that stays a run of its own, also where it continues the last one: the segments of
    /// a device with limits.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_apart(&mut self, run: DmaSg) -> Result<()> {
        let total = self.total_len();
        let end = checked(run, total).ok_or_else(|| refused(run, total))?;
        self.close();
        self.last = Last { addr: run.addr, end };
        Ok(())
    }

    /// Appends many runs, as [`push`](Self::push) does one.
    ///
    /// # Errors
    /// As [`push`](Self::push); the runs before the one refused stay.
    #[inline]
    pub fn extend(&mut self, runs: impl IntoIterator<Item = DmaSg>) -> Result<()> {
        let mut runs = runs.into_iter();
        // Room for the list that nothing merges in; what is not used is given back untouched.
        self.runs.reserve(runs.size_hint().0.min(RESERVE));
        if self.last.is_none() {
            let Some(run) = runs.next() else { return Ok(()) };
            self.push_apart(run)?;
        }
        loop {
            match self.fill(&mut runs) {
                Stop::End => return Ok(()),
                Stop::Refused(run) => return Err(refused(run, self.total_len())),
                Stop::Full => self.runs.reserve(1),
            }
        }
    }

    /// Appends runs to the one that grows, until there is no more room.
    ///
    /// Nothing is called in here, and what changes is in locals: a page that continues the last one costs a
    /// few instructions and no store, any other its place in the list and little more.
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
                    // A length of 0 wraps, and is more than there is room for.
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
                starts.next().expect("room for all strides").write(before);
            }
            places.next().expect("not full").write(last.run());
            (last, before) = (Last { addr: run.addr, end }, total);
        };
        let filled = room - places.len();
        // SAFETY: both are within what the vectors have room for. The places were taken one by one, each
        // written before the next, and `filled` counts those taken; an entry of the index was taken and
        // written with each that starts a stride, which is what `strides` counts.
        unsafe {
            self.runs.set_len(filled);
            self.index.set_len(strides(filled));
        }
        (self.last, self.before) = (last, before);
        stop
    }

    /// The list of what was pushed.
    ///
    /// # Errors
    /// [`Error::ZeroLength`]: nothing was.
    pub fn finish(mut self) -> Result<DmaSgList> {
        let total = self.total_len();
        if total == 0 {
            return Err(Error::ZeroLength { offset: 0 });
        }
        self.close();
        self.index.push(total);
        Ok(DmaSgList::from_checked(self.runs.into(), self.index.into(), total))
    }

    /// Ends the run that grows, if there is one.
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

/// Whether the index has an entry for this run.
#[inline]
fn starts_stride(run: usize) -> bool {
    run.is_multiple_of(STRIDE)
}

/// How many strides so many runs are.
#[inline]
fn strides(runs: usize) -> usize {
    runs.div_ceil(STRIDE)
}

/// Why no more was appended.
enum Stop {
    End,
    Full,
    Refused(DmaSg),
}

/// The end of a run that fits, alone and after `total` bytes; none for one that [`refused`] explains.
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
        Error::ZeroLength { offset: total }
    } else if addr.checked_add(length).is_none() {
        Error::Addresses(crate::error::AddressError::AddressOverflow { addr, length })
    } else {
        Error::Addresses(crate::error::AddressError::TotalOverflow { total, length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sg(addr: u64, len: u64) -> DmaSg {
        DmaSg { addr, len }
    }

    #[test]
    fn neighbours_merge_and_others_do_not() {
        let list = DmaSgList::from_runs([sg(0, 1), sg(1, 4095), sg(0x2000, 8), sg(0x1ff0, 8), sg(0x1ff8, 8)])
            .unwrap();
        assert_eq!(list.runs(), [sg(0, 0x1000), sg(0x2000, 8), sg(0x1ff0, 16)]);
        let mut apart = DmaSgBuilder::with_capacity(2);
        apart.push_apart(sg(0, 1)).unwrap();
        apart.push_apart(sg(1, 1)).unwrap();
        apart.push(sg(2, 1)).unwrap();
        assert_eq!(apart.finish().unwrap().runs(), [sg(0, 1), sg(1, 2)]);
    }

    #[test]
    fn a_refused_run_has_its_own_error_and_leaves_the_builder_as_it_was() {
        let mut builder = DmaSgBuilder::new();
        builder.push(sg(0x1000, 0x1000)).unwrap();
        assert!(matches!(builder.push(sg(7, 0)), Err(Error::ZeroLength { offset: 0x1000 })));
        assert!(matches!(builder.push_apart(sg(7, 0)), Err(Error::ZeroLength { offset: 0x1000 })));
        assert!(matches!(
            builder.push(sg(u64::MAX, 1)),
            Err(Error::Addresses(crate::error::AddressError::AddressOverflow { addr: u64::MAX, length: 1 }))
        ));
        let most = u64::MAX - 0xfff;
        assert!(matches!(
            builder.push(sg(0, most)),
            Err(Error::Addresses(crate::error::AddressError::TotalOverflow { total: 0x1000, length })) if length == most
        ));
        assert!(matches!(
            builder.extend([sg(0x2000, 5), sg(0, 0)]),
            Err(Error::ZeroLength { offset: 0x1005 })
        ));
        assert_eq!(builder.finish().unwrap().runs(), [sg(0x1000, 0x1005)]);
        assert!(matches!(DmaSgBuilder::new().finish(), Err(Error::ZeroLength { offset: 0 })));
        assert!(matches!(DmaSgList::from_runs([]), Err(Error::ZeroLength { offset: 0 })));
    }

    /// 2^28 pages that lie together are one run, and a builder of them never holds more.
    #[test]
    fn a_tebibyte_of_pages_is_one_run() {
        let mut builder = DmaSgBuilder::new();
        // As runs of 2 MiB, to be quick in a debug build.
        builder.extend((0..1 << 19).map(|i| sg(i << 21, 2 << 20))).unwrap();
        assert!(builder.runs.is_empty() && builder.runs.capacity() <= RESERVE);
        assert_eq!(builder.finish().unwrap().runs(), [sg(0, 1 << 40)]);
    }
}
