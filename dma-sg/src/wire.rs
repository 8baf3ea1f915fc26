//! A range as work requests carry it: elements of 32-bit length, grouped so that each group fits one request.

use crate::view::Spans;
use crate::{DmaSg, DmaSgView, Error, Result};

/// The longest scatter/gather element that this crate cuts, in bytes: 4 GiB less 4 KiB.
///
/// The length of an `ibv_sge` has 32 bits. This is the largest multiple of 4 KiB that fits, so an element
/// that continues an aligned one is aligned too.
pub const MAX_SGE_LEN: u32 = 0xffff_f000;

/// The limits of one work request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SgeLimits {
    /// Elements per work request, at least 1: the `max_send_sge` or `max_recv_sge` of the queue pair.
    pub max_sge: u32,
    /// Bytes per element, at least 1.
    pub max_sge_len: u32,
    /// Bytes per message, at least 1: the port's `max_msg_sz`, mostly 2 GiB.
    pub max_message_size: u64,
}

impl SgeLimits {
    /// Limits for a queue pair with `max_sge` elements, on a port that sends `max_message_size` bytes at
    /// once. Elements have at most [`MAX_SGE_LEN`] bytes.
    pub fn new(max_sge: u32, max_message_size: u64) -> Self {
        Self { max_sge, max_sge_len: MAX_SGE_LEN, max_message_size }
    }
}

/// One scatter/gather element: an `ibv_sge` without its key, which the caller adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(alias = "ibv_sge")]
pub struct WireSge {
    /// First address.
    pub addr: u64,
    /// Length in bytes; never 0.
    pub length: u32,
}

impl<'a> DmaSgView<'a> {
    /// Cuts the range into scatter/gather elements, in one group per work request.
    ///
    /// Contiguous runs share an element, and each group is as full as the limits allow. Groups are computed
    /// one by one; nothing is allocated.
    ///
    /// # Errors
    /// [`Error::InvalidLimit`]: a limit is 0.
    pub fn sges(&self, limits: SgeLimits) -> Result<SgeGroups<'a>> {
        let all = [
            ("max_sge", limits.max_sge.into()),
            ("max_sge_len", limits.max_sge_len.into()),
            ("max_message_size", limits.max_message_size),
        ];
        if let Some(&(limit, value)) = all.iter().find(|(_, value)| *value == 0) {
            return Err(Error::InvalidLimit { limit, value });
        }
        let cursor = Cursor { spans: Spans::new(*self), rest: DmaSg { addr: 0, len: 0 } };
        Ok(SgeGroups { cursor, offset: 0, limits })
    }
}

/// A position in the range.
#[derive(Debug, Clone)]
struct Cursor<'a> {
    spans: Spans<'a>,
    /// What is left of the current span.
    rest: DmaSg,
}

impl Cursor<'_> {
    /// Takes the next contiguous bytes, at most `most`, which is not 0.
    fn take(&mut self, most: u64) -> Option<DmaSg> {
        if self.rest.len == 0 {
            self.rest = self.spans.next()?;
        }
        let DmaSg { addr, len } = self.rest;
        let taken = len.min(most);
        // Cannot overflow: the builder has checked the end of each run.
        self.rest = DmaSg { addr: addr + taken, len: len - taken };
        Some(DmaSg { addr, len: taken })
    }
}

/// The groups of a range, one per work request; see [`DmaSgView::sges`].
#[derive(Debug, Clone)]
pub struct SgeGroups<'a> {
    cursor: Cursor<'a>,
    offset: u64,
    limits: SgeLimits,
}

impl<'a> Iterator for SgeGroups<'a> {
    type Item = SgeGroup<'a>;

    fn next(&mut self) -> Option<SgeGroup<'a>> {
        let SgeLimits { max_sge, max_sge_len, max_message_size } = self.limits;
        let cursor = self.cursor.clone();
        let (mut count, mut bytes) = (0, 0);
        while count < max_sge && bytes < max_message_size {
            let most = (max_message_size - bytes).min(max_sge_len.into());
            let Some(taken) = self.cursor.take(most) else { break };
            bytes += taken.len;
            count += 1;
        }
        let group = SgeGroup { cursor, offset: self.offset, bytes, count, left: bytes, max_sge_len };
        self.offset += bytes;
        (count > 0).then_some(group)
    }
}

/// The elements of one work request; an iterator over them.
#[derive(Debug, Clone)]
pub struct SgeGroup<'a> {
    cursor: Cursor<'a>,
    offset: u64,
    bytes: u64,
    /// Elements and bytes that the iterator has not returned yet.
    count: u32,
    left: u64,
    max_sge_len: u32,
}

impl SgeGroup<'_> {
    /// Offset of this work request in the range, in bytes: add it to the peer's address.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length of this work request in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Iterator for SgeGroup<'_> {
    type Item = WireSge;

    fn next(&mut self) -> Option<WireSge> {
        self.count = self.count.checked_sub(1)?;
        let DmaSg { addr, len } = self.cursor.take(self.left.min(self.max_sge_len.into()))?;
        self.left -= len;
        // Fits: the limit is a u32.
        Some(WireSge { addr, length: len as u32 })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.count as usize, Some(self.count as usize))
    }
}

impl ExactSizeIterator for SgeGroup<'_> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DmaSgList, model};
    use proptest::prelude::*;

    #[test]
    fn ten_gibibytes_are_cut_at_page_borders() {
        let list = DmaSgList::single(DmaSg { addr: 0x1000, len: 10 << 30 });
        let groups: Vec<_> = list.sges(SgeLimits::new(16, u64::MAX)).unwrap().collect();
        assert_eq!(groups.len(), 1);
        let lengths: Vec<_> = groups[0].clone().map(|sge| u64::from(sge.length)).collect();
        assert_eq!(lengths, [0xffff_f000, 0xffff_f000, 0x8000_2000]);
        let messages: Vec<_> = list
            .sges(SgeLimits::new(16, 2 << 30))
            .unwrap()
            .map(|g| (g.offset(), g.bytes(), g.len()))
            .collect();
        assert_eq!(messages, (0..5).map(|i| (i << 31, 2 << 30, 1)).collect::<Vec<_>>());
    }

    #[test]
    fn limits_of_zero_are_refused() {
        let list = model::scattered(3);
        let refused = |limits: SgeLimits| match list.sges(limits) {
            Err(Error::InvalidLimit { limit, value: 0 }) => limit,
            other => panic!("{other:?}"),
        };
        let fine = SgeLimits::new(1, 1);
        assert_eq!(refused(SgeLimits { max_sge: 0, ..fine }), "max_sge");
        assert_eq!(refused(SgeLimits { max_sge_len: 0, ..fine }), "max_sge_len");
        assert_eq!(refused(SgeLimits { max_message_size: 0, ..fine }), "max_message_size");
    }

    proptest! {
        /// The groups together are the range, and no group could hold one more byte.
        #[test]
        fn groups_meet_the_limits_and_cover_the_range(
            (list, offset, length) in model::range(),
            max_sge in 1..5_u32, max_sge_len in 1..40_u32, max_message_size in 1..90_u64
        ) {
            let view = list.view(offset..offset + length).unwrap();
            let limits = SgeLimits { max_sge, max_sge_len, max_message_size };
            let expected = model::bytes(view);
            let mut seen = Vec::new();
            let groups: Vec<_> = view.sges(limits).unwrap().collect();
            for (at, group) in groups.iter().enumerate() {
                prop_assert_eq!(group.offset(), seen.len() as u64);
                let sges: Vec<_> = group.clone().collect();
                prop_assert_eq!(sges.len(), group.len());
                prop_assert!(!sges.is_empty() && sges.len() <= max_sge as usize);
                for sge in &sges {
                    prop_assert!(sge.length > 0 && sge.length <= max_sge_len);
                    seen.extend(sge.addr..sge.addr + u64::from(sge.length));
                }
                prop_assert_eq!(group.bytes(), seen.len() as u64 - group.offset());
                prop_assert!(group.bytes() <= max_message_size);
                if let Some(&next) = expected.get(seen.len()) {
                    let last = sges[sges.len() - 1];
                    let grows = last.addr + u64::from(last.length) == next && last.length < max_sge_len;
                    let more = sges.len() < max_sge as usize || grows;
                    prop_assert!(group.bytes() == max_message_size || !more, "group {} could hold more", at);
                }
            }
            prop_assert_eq!(seen, expected);
        }
    }
}
