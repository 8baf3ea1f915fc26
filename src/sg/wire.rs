//! A range as work requests carry it: elements with 32-bit lengths, so many to a request, and no request
//! longer than a message may be.

use super::view::Spans;
use super::{DmaSg, DmaSgView};
use crate::mr::Lkey;
use crate::{Error, Result};

/// What one work request may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SgeLimits {
    /// Elements, at least 1: what the queue pair was created for.
    pub max_sge: u32,
    /// Bytes of one element, at least 1.
    pub max_length: u32,
    /// Bytes of one message, at least 1: the port's limit, 2 GiB for most.
    pub max_message: u64,
}

impl SgeLimits {
    /// For a queue pair with so many elements on a port with this limit. Elements are cut at 4 GiB less
    /// a page, so that the one after it begins at a page too.
    pub fn new(max_sge: u32, max_message: u64) -> Self {
        Self { max_sge, max_length: !0xfff, max_message }
    }
}

/// One scatter/gather element: what goes into an `ibv_sge`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(alias = "ibv_sge")]
pub struct WireSge {
    /// First address.
    pub addr: u64,
    /// Length in bytes, never 0.
    pub length: u32,
    /// Key of the region that covers it.
    pub lkey: Lkey,
}

impl<'a> DmaSgView<'a> {
    /// The range in groups of elements, one group a work request, each as full as the limits allow.
    ///
    /// Runs that continue one another share an element. Nothing is allocated, and a group is computed
    /// when it is asked for.
    ///
    /// # Errors
    /// [`AddressError::InvalidLimit`](crate::error::AddressError::InvalidLimit): a limit of 0, under which nothing could be sent.
    pub fn sges(&self, lkey: Lkey, limits: SgeLimits) -> Result<SgeGroups<'a>> {
        let all = [
            ("max_sge", limits.max_sge.into()),
            ("max_length", limits.max_length.into()),
            ("max_message", limits.max_message),
        ];
        if let Some(&(limit, value)) = all.iter().find(|(_, value)| *value == 0) {
            return Err(Error::Addresses(crate::error::AddressError::InvalidLimit { limit, value }));
        }
        let cursor = Cursor { spans: Spans::new(*self), rest: DmaSg { addr: 0, len: 0 } };
        Ok(SgeGroups { cursor, offset: 0, lkey, limits })
    }
}

/// A place in the range.
#[derive(Debug, Clone)]
struct Cursor<'a> {
    spans: Spans<'a>,
    rest: DmaSg,
}

impl Cursor<'_> {
    /// The next bytes that lie together, `most` (not 0) of them at most.
    fn take(&mut self, most: u64) -> Option<DmaSg> {
        if self.rest.len == 0 {
            self.rest = self.spans.next()?;
        }
        let DmaSg { addr, len } = self.rest;
        let taken = len.min(most);
        // The end of a run was checked to fit.
        self.rest = DmaSg { addr: addr + taken, len: len - taken };
        Some(DmaSg { addr, len: taken })
    }
}

/// The groups of a range; see [`DmaSgView::sges`].
#[derive(Debug, Clone)]
pub struct SgeGroups<'a> {
    cursor: Cursor<'a>,
    offset: u64,
    lkey: Lkey,
    limits: SgeLimits,
}

impl<'a> Iterator for SgeGroups<'a> {
    type Item = SgeGroup<'a>;

    fn next(&mut self) -> Option<SgeGroup<'a>> {
        let SgeLimits { max_sge, max_length, max_message } = self.limits;
        let cursor = self.cursor.clone();
        let (mut count, mut bytes) = (0, 0);
        while count < max_sge && bytes < max_message {
            let Some(taken) = self.cursor.take((max_message - bytes).min(max_length.into())) else { break };
            bytes += taken.len;
            count += 1;
        }
        let group = SgeGroup {
            cursor,
            offset: self.offset,
            bytes,
            left: count,
            rest: bytes,
            max_length,
            lkey: self.lkey,
        };
        self.offset += bytes;
        (count > 0).then_some(group)
    }
}

/// The elements of one work request, an iterator over them.
#[derive(Debug, Clone)]
pub struct SgeGroup<'a> {
    cursor: Cursor<'a>,
    offset: u64,
    bytes: u64,
    left: u32,
    rest: u64,
    max_length: u32,
    lkey: Lkey,
}

impl SgeGroup<'_> {
    /// Where in the range this request's bytes begin: what to add to the peer's address.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of this request.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Iterator for SgeGroup<'_> {
    type Item = WireSge;

    fn next(&mut self) -> Option<WireSge> {
        self.left = self.left.checked_sub(1)?;
        let DmaSg { addr, len } = self.cursor.take(self.rest.min(self.max_length.into()))?;
        self.rest -= len;
        // At most the limit, which is a u32.
        Some(WireSge { addr, length: len as u32, lkey: self.lkey })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}

impl ExactSizeIterator for SgeGroup<'_> {}

#[cfg(test)]
mod tests {
    use super::super::{DmaSgList, model};
    use super::*;
    use proptest::prelude::*;

    const KEY: Lkey = Lkey(0x17);

    #[test]
    fn ten_gibibytes_are_cut_at_pages() {
        let list = DmaSgList::single(DmaSg { addr: 0x1000, len: 10 << 30 });
        let groups: Vec<_> = list.sges(KEY, SgeLimits::new(16, u64::MAX)).unwrap().collect();
        assert_eq!(groups.len(), 1);
        let lengths: Vec<_> = groups[0].clone().map(|sge| u64::from(sge.length)).collect();
        assert_eq!(lengths, [0xffff_f000, 0xffff_f000, (10 << 30) - 2 * 0xffff_f000]);
        let messages: Vec<_> = list
            .sges(KEY, SgeLimits::new(16, 2 << 30))
            .unwrap()
            .map(|g| (g.offset(), g.bytes(), g.len()))
            .collect();
        assert_eq!(messages, (0..5).map(|i| (i << 31, 2 << 30, 1)).collect::<Vec<_>>());
    }

    #[test]
    fn limits_of_zero_are_refused() {
        let list = model::scattered(3);
        let refused = |limits: SgeLimits| match list.sges(KEY, limits) {
            Err(Error::Addresses(crate::error::AddressError::InvalidLimit { limit, value: 0 })) => limit,
            other => panic!("{other:?}"),
        };
        let fine = SgeLimits::new(1, 1);
        assert_eq!(refused(SgeLimits { max_sge: 0, ..fine }), "max_sge");
        assert_eq!(refused(SgeLimits { max_length: 0, ..fine }), "max_length");
        assert_eq!(refused(SgeLimits { max_message: 0, ..fine }), "max_message");
    }

    proptest! {
        /// Put together again they are the range, and no group could have taken another byte.
        #[test]
        fn groups_keep_the_limits_and_give_the_bytes_back(
            (list, offset, length) in model::range(), max_sge in 1..5_u32, max_length in 1..40_u32, max_message in 1..90_u64
        ) {
            let view = list.view(offset, length).unwrap();
            let limits = SgeLimits { max_sge, max_length, max_message };
            let expected = model::bytes(view);
            let mut seen = Vec::new();
            let groups: Vec<_> = view.sges(KEY, limits).unwrap().collect();
            for (at, group) in groups.iter().enumerate() {
                prop_assert_eq!(group.offset(), seen.len() as u64);
                let sges: Vec<_> = group.clone().collect();
                prop_assert_eq!(sges.len(), group.len());
                prop_assert!(!sges.is_empty() && sges.len() <= max_sge as usize);
                for sge in &sges {
                    prop_assert!(sge.length > 0 && sge.length <= max_length && sge.lkey == KEY);
                    seen.extend(sge.addr..sge.addr + u64::from(sge.length));
                }
                prop_assert_eq!(group.bytes(), seen.len() as u64 - group.offset());
                prop_assert!(group.bytes() <= max_message);
                if let Some(&next) = expected.get(seen.len()) {
                    let last = sges[sges.len() - 1];
                    let grows = last.addr + u64::from(last.length) == next && last.length < max_length;
                    let more = sges.len() < max_sge as usize || grows;
                    prop_assert!(group.bytes() == max_message || !more, "group {} could be longer", at);
                }
            }
            prop_assert_eq!(seen, expected);
        }
    }
}
