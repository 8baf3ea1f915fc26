//! A range of a list, without a copy.

use std::fmt;
use std::ops::RangeBounds;
use std::slice;

use crate::{DmaSg, DmaSgBuilder, DmaSgList, Iova, PageSizes, Result, Size, resolve_range};

/// A range of a [`DmaSgList`], with the methods of the list. It borrows the list and copies nothing.
#[derive(Clone, Copy)]
pub struct DmaSgView<'a> {
    list: &'a DmaSgList,
    /// Where the range begins in the list, in bytes.
    offset: u64,
    len: u64,
    /// Index of the first run, and how many of its bytes lie before the range.
    first: usize,
    skip: u64,
}

impl<'a> DmaSgView<'a> {
    pub(crate) fn whole(list: &'a DmaSgList) -> Self {
        Self { list, offset: 0, len: list.total_len(), first: 0, skip: 0 }
    }

    /// Length in bytes; never 0.
    pub fn total_len(&self) -> u64 {
        self.len
    }

    /// Offset of the range in its list, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Address of the first byte.
    pub fn start_addr(&self) -> u64 {
        self.list.runs()[self.first].addr + self.skip
    }

    /// The runs, in order. The first and the last one are cut to the range.
    pub fn runs(&self) -> Runs<'a> {
        Runs { runs: self.list.runs()[self.first..].iter(), skip: self.skip, left: self.len }
    }

    /// The rest of the run that holds the byte at `offset` of the range, from that byte to the end of the run
    /// or of the range; `None` past the end.
    pub fn run_at(&self, offset: u64) -> Option<DmaSg> {
        let left = self.len.checked_sub(offset).filter(|&left| left > 0)?;
        let run = self.list.run_at(self.offset + offset)?;
        Some(DmaSg { addr: run.addr, len: run.len.min(left) })
    }

    /// Selects a range of this range.
    ///
    /// # Errors
    /// [`RangeError`](crate::RangeError): the range is empty, inverted, or ends past this one.
    pub fn view(&self, range: impl RangeBounds<u64>) -> Result<DmaSgView<'a>> {
        let range = resolve_range(range, self.len)?;
        let offset = self.offset + range.start;
        // The range lies in the list, so there is a run.
        let (first, skip) = self.list.find(offset).unwrap_or_default();
        Ok(Self { list: self.list, offset, len: range.end - range.start, first, skip })
    }

    /// Copies the range into a list, and merges contiguous runs.
    pub fn to_list(&self) -> DmaSgList {
        let mut builder = DmaSgBuilder::new();
        // The list's own builder has checked every run, and a view has at least one.
        builder.extend(self.runs()).and_then(|()| builder.finish()).expect("a view is a valid list")
    }

    /// The runs that the range touches, uncut, and how many bytes of the first lie before the range.
    pub(crate) fn touched(&self) -> (&'a [DmaSg], u64) {
        // The range lies in the list, so there is a run.
        let (last, _) = self.list.find(self.offset + (self.len - 1)).unwrap_or_default();
        (&self.list.runs()[self.first..=last], self.skip)
    }
}

impl<'a> From<&'a DmaSgList> for DmaSgView<'a> {
    fn from(list: &'a DmaSgList) -> Self {
        list.as_view()
    }
}

/// Equal if both cover the same addresses in the same order, wherever these are cut into runs.
impl PartialEq for DmaSgView<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && Spans::new(*self).eq(Spans::new(*other))
    }
}

impl Eq for DmaSgView<'_> {}

impl fmt::Debug for DmaSgView<'_> {
    /// At most eight runs, because a list may have a million; `{:#?}` shows all.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = if f.alternate() { usize::MAX } else { 8 };
        let mut list = f.debug_list();
        let mut runs = self.runs();
        list.entries(runs.by_ref().take(shown));
        match runs.count() {
            0 => list.finish(),
            more => list.entry(&format_args!("and {more} more")).finish(),
        }
    }
}

impl fmt::Display for DmaSgView<'_> {
    /// "4 GiB in 37 segments, best page size 2 MiB". The page size is the best of all sizes from 4 KiB, for
    /// an iova equal to the first address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.runs().count();
        let plural = if count == 1 { "" } else { "s" };
        write!(f, "{} in {count} segment{plural}", Size(self.len))?;
        match self.best_page_size(PageSizes::ALL, Iova(self.start_addr())) {
            Ok(size) => write!(f, ", best page size {}", Size(size)),
            Err(_) => write!(f, ", no page size fits"),
        }
    }
}

/// The runs of a [`DmaSgView`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    runs: slice::Iter<'a, DmaSg>,
    skip: u64,
    left: u64,
}

impl Iterator for Runs<'_> {
    type Item = DmaSg;

    #[inline]
    fn next(&mut self) -> Option<DmaSg> {
        if self.left == 0 {
            return None;
        }
        let run = self.runs.next()?;
        let len = (run.len - self.skip).min(self.left);
        let addr = run.addr + self.skip;
        self.skip = 0;
        self.left -= len;
        Some(DmaSg { addr, len })
    }
}

/// The runs with contiguous ones merged; segment limits may have cut them.
#[derive(Debug, Clone)]
pub(crate) struct Spans<'a> {
    runs: Runs<'a>,
    next: Option<DmaSg>,
}

impl<'a> Spans<'a> {
    pub(crate) fn new(view: DmaSgView<'a>) -> Self {
        let mut runs = view.runs();
        let next = runs.next();
        Self { runs, next }
    }
}

impl Iterator for Spans<'_> {
    type Item = DmaSg;

    #[inline]
    fn next(&mut self) -> Option<DmaSg> {
        let mut span = self.next?;
        loop {
            self.next = self.runs.next();
            match self.next {
                Some(run) if run.addr == span.addr + span.len => span.len += run.len,
                _ => return Some(span),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, RangeError, model};
    use proptest::prelude::*;

    #[test]
    fn debug_abbreviates_a_long_list() {
        let shown = format!("{:?}", model::scattered(100));
        assert!(shown.ends_with("and 92 more]") && shown.len() < 500, "{shown}");
        assert_eq!(format!("{:#?}", model::scattered(100)).matches("DmaSg").count(), 100);
    }

    #[test]
    fn a_list_is_displayed_in_one_line() {
        let run = |addr, len| DmaSg { addr, len };
        let show = |runs: &[DmaSg]| DmaSgList::from_runs(runs.iter().copied()).unwrap().to_string();
        assert_eq!(show(&[run(0, 4 << 30)]), "4 GiB in 1 segment, best page size 4 GiB");
        let huge: Vec<_> = (0..37).map(|i| run(i << 30, 2 << 20)).collect();
        assert_eq!(show(&huge), "74 MiB in 37 segments, best page size 2 MiB");
        assert_eq!(show(&[run(0x10, 0x10), run(0x30, 0x10)]), "32 bytes in 2 segments, no page size fits");
    }

    proptest! {
        #[test]
        fn a_view_has_the_bytes_of_its_range((list, offset, length) in model::range(), cut in 0..1000_u64) {
            let bytes = model::bytes(list.as_view());
            let expected = &bytes[offset as usize..][..length as usize];
            let view = list.view(offset..offset + length).unwrap();
            prop_assert_eq!(&model::bytes(view)[..], expected);
            prop_assert_eq!(view.start_addr(), expected[0]);
            prop_assert_eq!(&model::bytes(view.to_list().as_view())[..], expected);
            for (at, &addr) in expected.iter().enumerate() {
                let run = view.run_at(at as u64).unwrap();
                prop_assert_eq!(run.addr, addr);
                prop_assert!(run.len > 0 && at as u64 + run.len <= length);
            }
            prop_assert_eq!(view.run_at(length), None);
            prop_assert_eq!(view.run_at(u64::MAX), None);
            // A view of the view.
            let inner = cut % length;
            prop_assert_eq!(&model::bytes(view.view(inner..).unwrap())[..], &expected[inner as usize..]);
            prop_assert_eq!(view.view(inner..).unwrap(), list.view(offset + inner..offset + length).unwrap());
        }

        #[test]
        fn any_range_is_accepted_or_refused(list in model::list(), start in model::edge(), end in model::edge()) {
            match list.view(start..end) {
                Ok(view) => {
                    prop_assert!(start < end && end <= list.total_len());
                    prop_assert_eq!((view.offset(), view.total_len()), (start, end - start));
                }
                Err(Error::Range(RangeError::Empty { .. })) => prop_assert_eq!(start, end),
                Err(Error::Range(RangeError::Inverted { .. })) => prop_assert!(start > end),
                Err(Error::Range(RangeError::OutOfRange { .. })) => {
                    prop_assert!(start < end && end > list.total_len());
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}
