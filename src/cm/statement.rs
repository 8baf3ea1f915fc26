//! What each side of a connection by IP address states in the last bytes of its private data: the MTU of its port and,
//! if it receives notifications, its second queue pair.
//!
//! The connection manager takes the MTU of the active side's network interface for the whole route, and asks neither
//! port. If the passive side's port carries less, every message above that MTU is lost. So both sides take the smallest.
//! Private data arrives padded with zeros to a fixed length, so a program of another library finds its own data where
//! it expects it.

/// The statement: `dM`, version 1 or 2, the MTU as libibverbs numbers it, and in version 2 the number of the second
/// queue pair, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Statement {
    /// MTU of the port in bytes.
    pub mtu: u32,
    /// Number of the queue pair for messages; 0 if there is none.
    pub message_qp_num: u32,
}

const MAGIC: [u8; 2] = *b"dM";
/// Bytes without and with the second queue pair.
const SHORT: usize = 4;
const LONG: usize = 8;

impl Statement {
    /// Bytes that it takes.
    pub(super) fn size(self) -> usize {
        if self.message_qp_num == 0 { SHORT } else { LONG }
    }

    /// Private data of `length` bytes: the user's, zeros, and the statement.
    pub(super) fn append(self, data: &[u8], length: usize) -> Vec<u8> {
        let mut bytes = data.to_vec();
        bytes.resize(length - self.size(), 0);
        bytes.extend(MAGIC);
        bytes.extend([if self.message_qp_num == 0 { 1 } else { 2 }, number(self.mtu)]);
        if self.message_qp_num != 0 {
            bytes.extend(self.message_qp_num.to_le_bytes());
        }
        bytes
    }

    /// Takes the peer's statement from its private data of `length` bytes. `None`, and the data stays whole, if there is
    /// none: the peer uses another library.
    pub(super) fn take(data: &mut Vec<u8>, length: usize) -> Option<Self> {
        let end = |size: usize| data.get(length - size..length);
        let (statement, size) = match (end(SHORT)?, end(LONG)?) {
            ([b'd', b'M', 1, number @ 1..=5], _) => {
                (Self { mtu: bytes((*number).into()), message_qp_num: 0 }, SHORT)
            }
            (_, [b'd', b'M', 2, number @ 1..=5, a, b, c, 0]) => {
                let message_qp_num = u32::from_le_bytes([*a, *b, *c, 0]);
                (Self { mtu: bytes((*number).into()), message_qp_num }, LONG)
            }
            _ => return None,
        };
        data.truncate(length - size);
        Some(statement)
    }
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
    use super::*;

    #[test]
    fn a_statement_takes_no_room_that_the_peer_reads_and_is_found_again() {
        for message_qp_num in [0, 17, 0xff_ffff] {
            for mtu in [256, 512, 1024, 2048, 4096] {
                let statement = Statement { mtu, message_qp_num };
                let user = vec![7; 56 - statement.size()];
                let mut data = statement.append(&user, 56);
                assert_eq!((data.len(), &data[..user.len()]), (56, &user[..]));
                assert_eq!(Statement::take(&mut data, 56), Some(statement));
                assert_eq!(data, user);
                let mut data = statement.append(b"short", 196);
                assert_eq!((&data[..6], data.len()), (&b"short\0"[..], 196));
                assert_eq!(Statement::take(&mut data, 196), Some(statement));
            }
        }
    }

    #[test]
    fn data_of_another_library_stays_whole() {
        let short = Statement { mtu: 1024, message_qp_num: 0 };
        let long = Statement { mtu: 1024, message_qp_num: 0x12_3456 };
        let mut other_version = short.append(&[], 56);
        other_version[54] = 3;
        let mut no_mtu = short.append(&[], 56);
        no_mtu[55] = 6;
        let mut no_number = long.append(&[], 56);
        no_number[55] = 1;
        for mut data in [
            vec![],
            vec![0; 56],
            vec![b'd'; 55],
            other_version,
            no_mtu,
            no_number,
            short.append(&[], 60),
            long.append(&[], 60),
        ] {
            let before = data.clone();
            assert_eq!(Statement::take(&mut data, 56), None);
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
