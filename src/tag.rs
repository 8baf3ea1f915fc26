//! One word for what a registration is of, so that a cache compares one word.
//!
//! | bits | what |
//! |---|---|
//! | 63 | the descriptor is read-only |
//! | 24 to 62 | the buffer's inode |
//! | 8 to 23 | the protection domain's number |
//! | 0 to 7 | access |
//!
//! The buffer, the domain and the access have their part each. One whose part does not fit has all bits, and
//! so has the word of all three: then no word tells, and they have to be looked at by themselves.

const INODE: u32 = 24;
const DOMAIN: u32 = 8;

/// The word, or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tag(u64);

impl Tag {
    /// Of what does not fit.
    const NONE: Self = Self(u64::MAX);

    pub(crate) fn of_buffer(inode: u64, writable: bool) -> Self {
        // Less than all bits, which stand for what does not fit.
        match inode < (1 << (63 - INODE)) - 1 {
            true => Self(inode << INODE | u64::from(!writable) << 63),
            false => Self::NONE,
        }
    }

    pub(crate) fn of_domain(number: u32) -> Self {
        if number < 1 << (INODE - DOMAIN) { Self(u64::from(number) << DOMAIN) } else { Self::NONE }
    }

    /// Of access flags: those that there are for dma-bufs are bits 0 to 3 and 20.
    #[inline(always)]
    pub(crate) fn of_access(flags: u32) -> Self {
        if flags & !0x10_000f == 0 { Self(u64::from(flags & 0xf | flags >> 16)) } else { Self::NONE }
    }

    /// Both parts.
    #[inline(always)]
    pub(crate) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[inline(always)]
    pub(crate) fn word(self) -> u64 {
        self.0
    }

    /// Whether it says all.
    pub(crate) fn fits(self) -> bool {
        self != Self::NONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const FLAGS: [u32; 6] = [0, 1, 3, 7, 15, 0x10_0001];

    #[test]
    fn no_two_are_alike() {
        let inodes = [0, 1, 2, 255, 1 << 24, (1 << 39) - 2];
        let numbers = [0, 1, 0x100, 0xffff];
        let mut seen = HashSet::new();
        for (inode, number) in inodes.into_iter().flat_map(|i| numbers.map(|n| (i, n))) {
            for (flags, writable) in FLAGS.into_iter().flat_map(|f| [(f, false), (f, true)]) {
                let tag = Tag::of_buffer(inode, writable).with(Tag::of_domain(number));
                let tag = tag.with(Tag::of_access(flags));
                assert!(tag.fits() && seen.insert(tag.word()), "{inode} {number} {flags} {writable}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_makes_the_whole_not_fit() {
        let (buffer, domain, access) = (Tag::of_buffer(7, true), Tag::of_domain(7), Tag::of_access(7));
        assert!(buffer.with(domain).with(access).fits());
        for part in [
            Tag::of_buffer((1 << 39) - 1, true),
            Tag::of_buffer(u64::MAX, false),
            Tag::of_domain(1 << 16),
            Tag::of_domain(u32::MAX),
            Tag::of_access(1 << 4),
            Tag::of_access(1 << 31 | 1),
        ] {
            assert!(!buffer.with(domain).with(access).with(part).fits(), "{part:?}");
        }
    }
}
