//! A range of a list, without a copy of it.

use std::fmt;
use std::slice;

use super::blocks::PageSizes;
use super::{DmaSg, DmaSgBuilder, DmaSgList, Size};
use crate::Result;
use crate::umem::{Iova, check_range};

/// A range of a [`DmaSgList`] that answers what the list does. Plain value, two words and a reference.
#[derive(Clone, Copy)]
pub struct DmaSgView<'a> {
    list: &'a DmaSgList,
    /// Where the range begins in the list, in bytes.
    offset: u64,
    len: u64,
    /// The run it begins in, and how far into that.
    first: usize,
    skip: u64,
}

impl<'a> DmaSgView<'a> {
    pub(super) fn whole(list: &'a DmaSgList) -> Self {
        Self { list, offset: 0, len: list.total_len(), first: 0, skip: 0 }
    }

    /// Length in bytes, never 0.
    pub fn total_len(&self) -> u64 {
        self.len
    }

    /// Where the range begins in its list, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The runs, in order, the first and the last cut to the range.
    pub fn runs(&self) -> Runs<'a> {
        Runs { runs: self.list.runs()[self.first..].iter(), skip: self.skip, left: self.len }
    }

    /// The run that holds the byte at `offset` of the range, cut so that it begins with that byte and
    /// ends with the range; `None` past the end.
    pub fn run_at(&self, offset: u64) -> Option<DmaSg> {
        let left = self.len.checked_sub(offset).filter(|&left| left > 0)?;
        let run = self.list.run_at(self.offset + offset)?;
        Some(DmaSg { addr: run.addr, len: run.len.min(left) })
    }

    /// Address of the first byte.
    pub fn start(&self) -> u64 {
        self.list.runs()[self.first].addr + self.skip
    }

    /// A range of this range.
    ///
    /// # Errors
    /// [`Error::ZeroLength`](crate::Error::ZeroLength),
    /// [`Error::OutOfRange`](crate::Error::OutOfRange): it is empty or not inside this one.
    pub fn view(&self, offset: u64, length: u64) -> Result<DmaSgView<'a>> {
        check_range(offset, length, self.len)?;
        let offset = self.offset + offset;
        // The range was checked, so the byte is there.
        let (first, skip) = self.list.find(offset).unwrap_or_default();
        Ok(Self { list: self.list, offset, len: length, first, skip })
    }

    /// The range as a list of its own, merged.
    pub fn to_list(&self) -> DmaSgList {
        let mut builder = DmaSgBuilder::new();
        // Every run was checked, and there is one.
        builder.extend(self.runs()).and_then(|()| builder.finish()).expect("a range of a list is a list")
    }

    /// The runs that the range touches, not cut, and how far into the first it begins.
    pub(super) fn touched(&self) -> (&'a [DmaSg], u64) {
        // A range ends inside its list.
        let (last, _) = self.list.find(self.offset + (self.len - 1)).unwrap_or_default();
        (&self.list.runs()[self.first..=last], self.skip)
    }
}

impl<'a> From<&'a DmaSgList> for DmaSgView<'a> {
    fn from(list: &'a DmaSgList) -> Self {
        list.as_view()
    }
}

/// By coverage: the same addresses in the same order, wherever the runs are cut.
impl PartialEq for DmaSgView<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && Spans::new(*self).eq(Spans::new(*other))
    }
}

impl Eq for DmaSgView<'_> {}

impl fmt::Debug for DmaSgView<'_> {
    /// At most eight runs, since a list can have a million; `{:#?}` shows all.
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
    /// "4 GiB in 37 segments, best page size 2 MiB": the page size for addresses from the first on, of
    /// all sizes that hardware could have.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.runs().count();
        let plural = if count == 1 { "" } else { "s" };
        write!(f, "{} in {count} segment{plural}", Size(self.len))?;
        // From an iova that agrees with the list as far as anything in it does.
        match self.best_page_size(PageSizes::ALL, Iova(self.start())) {
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

/// The runs with neighbours merged, which a list with segments of a device need not have.
#[derive(Debug, Clone)]
pub(super) struct Spans<'a> {
    runs: Runs<'a>,
    next: Option<DmaSg>,
}

impl<'a> Spans<'a> {
    pub(super) fn new(view: DmaSgView<'a>) -> Self {
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
    use super::super::model;
    use super::*;
    use crate::Error;
    use proptest::prelude::*;

    #[test]
    fn a_long_list_is_shown_short() {
        let shown = format!("{:?}", model::scattered(100));
        assert!(shown.ends_with("and 92 more]") && shown.len() < 500, "{shown}");
        assert_eq!(format!("{:#?}", model::scattered(100)).matches("DmaSg").count(), 100);
    }

    #[test]
    fn a_list_says_what_it_is() {
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
            let view = list.view(offset, length).unwrap();
            prop_assert_eq!(&model::bytes(view)[..], expected);
            prop_assert_eq!(view.start(), expected[0]);
            prop_assert_eq!(&model::bytes(view.to_list().as_view())[..], expected);
            for (at, &addr) in expected.iter().enumerate() {
                let run = view.run_at(at as u64).unwrap();
                prop_assert_eq!(run.addr, addr);
                prop_assert!(run.len > 0 && at as u64 + run.len <= length);
            }
            prop_assert_eq!(view.run_at(length), None);
            prop_assert_eq!(view.run_at(u64::MAX), None);
            // A view of the view.
            let (inner, rest) = (cut % length, length - cut % length);
            prop_assert_eq!(&model::bytes(view.view(inner, rest).unwrap())[..], &expected[inner as usize..]);
            prop_assert_eq!(view.view(inner, rest).unwrap(), list.view(offset + inner, rest).unwrap());
        }

        #[test]
        fn any_range_is_taken_or_refused(list in model::list(), offset in model::edge(), length in model::edge()) {
            let inside = length > 0
                && u128::from(offset) + u128::from(length) <= u128::from(list.total_len());
            match list.view(offset, length) {
                Ok(view) => prop_assert!(inside && view.total_len() == length),
                Err(Error::ZeroLength { .. }) => prop_assert_eq!(length, 0),
                Err(Error::OutOfRange { .. }) => prop_assert!(!inside && length > 0),
                Err(other) => panic!("{other}"),
            }
        }
    }
}
