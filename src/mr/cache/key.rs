//! What an entry is found by.

use crate::dmabuf::{BufferId, DmaBuf};
use crate::mr::Access;
use crate::tag::Tag;
use crate::verbs::ProtectionDomain;

/// The buffer, the protection domain and the access. The buffer's device number is left out, since all
/// dma-bufs are of one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub inode: u64,
    pub size: u64,
    /// Access flags, all of them, known or not; bit 32: the descriptor may write, since a read-only one
    /// finds no entry that may; above it the number of the domain, which an entry holds, so that no other
    /// can have it meanwhile.
    pub user: u64,
}

impl Key {
    pub(super) fn of(domain: &ProtectionDomain, buffer: &DmaBuf, access: Access) -> Self {
        let (domain, writable) = (u64::from(domain.number()), u64::from(buffer.is_writable()));
        let user = domain << 33 | writable << 32 | u64::from(access.bits());
        Self { inode: buffer.id().inode(), size: buffer.size(), user }
    }

    pub(super) fn hash(&self) -> u64 {
        // Inode numbers count up, and the others differ in few bits. The upper bits are used.
        (self.inode ^ self.user.rotate_left(24)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    pub(super) fn is_of_buffer(&self, buffer: BufferId) -> bool {
        self.inode == buffer.inode()
    }

    pub(super) fn is_of_domain(&self, domain: &ProtectionDomain) -> bool {
        self.user >> 33 == u64::from(domain.number())
    }
}

/// The same in a word, which tells all unless it does not fit.
#[inline(always)]
pub(super) fn tag(domain: &ProtectionDomain, buffer: &DmaBuf, access: Access) -> Tag {
    buffer.tag().with(domain.tag()).with(Tag::of_access(access.bits()))
}
