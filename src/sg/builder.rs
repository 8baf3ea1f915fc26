//! Making a list: neighbours merged as they come, every sum checked.

use super::list::STRIDE;
use super::{DmaSg, DmaSgList};
use crate::{Error, Result};

/// Collects runs in the order of their bytes and merges those that continue one another.
///
/// Memory is 16 bytes for each merged run, however many pages were pushed.
#[derive(Debug, Clone, Default)]
pub struct DmaSgBuilder {
    runs: Vec<DmaSg>,
    /// The offset at which each stride of runs after the first begins.
    index: Vec<u64>,
    /// The run that grows; none before the first.
    last: Last,
    /// Bytes pushed so far.
    total: u64,
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

    fn run(self) -> DmaSg {
        DmaSg { addr: self.addr, len: self.end - self.addr }
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
        self.total
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
        let (end, total) = checked(run, self.total).ok_or_else(|| refused(run, self.total))?;
        self.total = total;
        if self.last.end == run.addr {
            self.last.end = end;
        } else {
            let done = std::mem::replace(&mut self.last, Last { addr: run.addr, end });
            self.close(done, total - run.len);
        }
        Ok(())
    }

    /// Appends a run that stays a run of its own, also where it continues the last one: the segments of
    /// a device with limits.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_apart(&mut self, run: DmaSg) -> Result<()> {
        let (end, total) = checked(run, self.total).ok_or_else(|| refused(run, self.total))?;
        self.total = total;
        let done = std::mem::replace(&mut self.last, Last { addr: run.addr, end });
        self.close(done, total - run.len);
        Ok(())
    }

    /// Appends many runs, as [`push`](Self::push) does one.
    ///
    /// # Errors
    /// As [`push`](Self::push); the runs before the one refused stay.
    #[inline]
    pub fn extend(&mut self, runs: impl IntoIterator<Item = DmaSg>) -> Result<()> {
        let runs = runs.into_iter();
        // Room for the list that nothing merges in; what is not used is given back untouched.
        let most = runs.size_hint().0.min(RESERVE);
        self.runs.reserve(most);
        self.index.reserve(most / STRIDE);
        // In locals, so that a page that continues the last costs a few instructions and no store.
        let (mut last, mut total) = (self.last, self.total);
        let mut wrong = None;
        for run in runs {
            let Some((end, sum)) = checked(run, total) else {
                wrong = Some(run);
                break;
            };
            total = sum;
            if last.end == run.addr {
                last.end = end;
                continue;
            }
            let done = std::mem::replace(&mut last, Last { addr: run.addr, end });
            self.close(done, sum - run.len);
        }
        (self.last, self.total) = (last, total);
        wrong.map_or(Ok(()), |run| Err(refused(run, total)))
    }

    /// The list of what was pushed.
    ///
    /// # Errors
    /// [`Error::ZeroLength`]: nothing was.
    pub fn finish(mut self) -> Result<DmaSgList> {
        if self.total == 0 {
            return Err(Error::ZeroLength { offset: 0 });
        }
        self.close(self.last, self.total);
        Ok(DmaSgList::from_checked(self.runs.into(), self.index.into(), self.total))
    }

    /// Keeps a run that will not grow any more and ends at `offset` of the list.
    #[inline]
    fn close(&mut self, done: Last, offset: u64) {
        // Ends are equal only where there is none.
        if done.end == done.addr {
            return;
        }
        let run = done.run();
        if self.runs.len().is_multiple_of(STRIDE) && !self.runs.is_empty() {
            self.index.push(offset - run.len);
        }
        self.runs.push(run);
    }
}

/// The end of a run and the total with it; none for a run that [`refused`] explains.
#[inline]
fn checked(run: DmaSg, total: u64) -> Option<(u64, u64)> {
    let (end, sum) = (run.addr.checked_add(run.len)?, total.checked_add(run.len)?);
    (run.len != 0).then_some((end, sum))
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
