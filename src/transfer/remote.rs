//! A region as its peer addresses it.

use crate::Result;
use crate::mr::Rkey;
use crate::umem::{Iova, check_range};

/// What a peer must know of a region to read and write it: plain data, to be sent by any means.
/// `serde` makes it serialisable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RemoteRegion {
    /// Address of the region's first byte.
    pub iova: Iova,
    /// Length in bytes.
    pub length: u64,
    /// The key that permits it.
    pub rkey: Rkey,
}

/// A place in a peer's memory, with the key that permits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddr {
    /// Address at the peer.
    pub addr: u64,
    /// The key.
    pub rkey: Rkey,
}

impl RemoteRegion {
    /// The place of `length` bytes from `offset` of the region.
    ///
    /// # Errors
    /// [`Error::ZeroLength`](crate::Error::ZeroLength), [`Error::OutOfRange`](crate::Error::OutOfRange):
    /// the range is empty or not inside the region.
    pub fn at(&self, offset: u64, length: u64) -> Result<RemoteAddr> {
        check_range(offset, length, self.length)?;
        // The description came from outside: its sum may overflow, whatever the length says.
        let addr = self.iova.0.checked_add(offset).filter(|addr| addr.checked_add(length).is_some());
        let addr = addr.ok_or(crate::Error::IovaOverflow { iova: self.iova, length: self.length })?;
        Ok(RemoteAddr { addr, rkey: self.rkey })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn places_lie_inside_the_region() {
        let region = RemoteRegion { iova: Iova(0x1000), length: 5 << 30, rkey: Rkey(9) };
        assert_eq!(region.at(1 << 32, 16).unwrap(), RemoteAddr { addr: 0x1_0000_1000, rkey: Rkey(9) });
        assert!(matches!(region.at(5 << 30, 1), Err(Error::OutOfRange { .. })));
        assert!(matches!(region.at(0, 0), Err(Error::ZeroLength { .. })));
        let hostile = RemoteRegion { iova: Iova(u64::MAX), ..region };
        assert!(matches!(hostile.at(1, 1), Err(Error::IovaOverflow { .. })));
    }
}
