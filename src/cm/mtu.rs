//! The path MTU of a connection by IP address.
//!
//! The connection manager takes the MTU of the active side's network interface for the whole route, and asks neither
//! port. If the passive side's port carries less, every message above that MTU is lost. So each side states the MTU
//! of its port in the last 4 bytes of the private data, and both take the smallest. Private data arrives padded with
//! zeros to a fixed length, so a program of another library finds its own data where it expects it.

/// Bytes at the end of the private data that state the MTU: `dM`, version 1, and the MTU as libibverbs numbers it.
pub(super) const STATEMENT: usize = 4;

const MAGIC: [u8; 3] = *b"dM\x01";

/// Private data of `length` bytes: the user's, zeros, and the MTU of this side's port in bytes.
pub(super) fn state(data: &[u8], length: usize, mtu: u32) -> Vec<u8> {
    let mut bytes = data.to_vec();
    bytes.resize(length - STATEMENT, 0);
    bytes.extend(MAGIC);
    bytes.push(number(mtu));
    bytes
}

/// Takes the MTU in bytes that the peer states from its private data of `length` bytes. `None`, and the data stays
/// whole, if the peer states none: it uses another library.
pub(super) fn take(data: &mut Vec<u8>, length: usize) -> Option<u32> {
    let [d, m, version, number @ 1..=5] = *data.get(length - STATEMENT..length)? else { return None };
    if [d, m, version] != MAGIC {
        return None;
    }
    data.truncate(length - STATEMENT);
    Some(bytes(number.into()))
}

/// The path MTU in bytes for a route of `route` bytes and a port of `own` bytes. `None` if there is none: a peer that
/// does not state its MTU uses the route's, which this port does not carry.
pub(super) fn agree(route: u32, own: u32, peer: Option<u32>) -> Option<u32> {
    match peer {
        Some(peer) => Some(route.min(own).min(peer)),
        None => Some(route).filter(|route| *route <= own),
    }
}

/// The MTU in bytes of `enum ibv_mtu`: IBV_MTU_256 is 1, IBV_MTU_512 is 2, and so on.
pub(super) fn bytes(number: u32) -> u32 {
    128 << number.clamp(1, 5)
}

/// The inverse of [`bytes`].
pub(super) fn number(bytes: u32) -> u8 {
    bytes.clamp(256, 4096).ilog2() as u8 - 7
}

#[cfg(test)]
mod tests {
    use super::super::{ANSWER_DATA, REQUEST_DATA};
    use super::*;

    #[test]
    fn a_statement_takes_no_room_that_the_peer_reads_and_is_found_again() {
        let user = [7; REQUEST_DATA];
        for mtu in [256, 512, 1024, 2048, 4096] {
            let mut data = state(&user, 56, mtu);
            assert_eq!((data.len(), &data[..REQUEST_DATA]), (56, &user[..]));
            assert_eq!(take(&mut data, 56), Some(mtu));
            assert_eq!(data, user);
        }
        let mut data = state(b"short", 196, 1024);
        assert_eq!((&data[..6], data.len()), (&b"short\0"[..], 196));
        assert_eq!(take(&mut data, 196), Some(1024));
        assert_eq!(data.len(), ANSWER_DATA);
    }

    #[test]
    fn data_of_another_library_stays_whole() {
        let mut other_version = state(&[], 56, 1024);
        other_version[54] = 2;
        let mut no_mtu = state(&[], 56, 1024);
        no_mtu[55] = 6;
        for mut data in [vec![], vec![0; 56], vec![b'd'; 55], other_version, no_mtu, state(&[], 60, 1024)] {
            let before = data.clone();
            assert_eq!(take(&mut data, 56), None);
            assert_eq!(data, before);
        }
    }

    #[test]
    fn both_sides_agree_on_the_smallest() {
        for route in [1024, 2048, 4096] {
            for (near, far) in [(1024, 4096), (4096, 1024), (4096, 4096), (512, 256)] {
                let both = [agree(route, near, Some(far)), agree(route, far, Some(near))];
                assert_eq!(both, [Some(route.min(near).min(far)); 2]);
            }
        }
        // Another library uses the MTU of the route.
        assert_eq!(agree(1024, 4096, None), Some(1024));
        assert_eq!(agree(4096, 4096, None), Some(4096));
        assert_eq!(agree(4096, 1024, None), None);
    }

    #[test]
    fn mtus_have_the_numbers_of_libibverbs() {
        assert_eq!([1, 2, 3, 4, 5].map(bytes), [256, 512, 1024, 2048, 4096]);
        assert_eq!([256, 512, 1024, 2048, 4096].map(number), [1, 2, 3, 4, 5]);
        assert_eq!((bytes(0), bytes(77), number(0), number(9000)), (256, 4096, 1, 5));
    }
}
