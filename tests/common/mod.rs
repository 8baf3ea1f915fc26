//! What the tests share.

pub mod buffers;
pub mod bytes;
pub mod census;
pub mod drm;
pub mod faults;
pub mod gpu;
pub mod kcore;
pub mod link;
pub mod peers;
pub mod system;
pub mod wire;

/// A pattern in which no two words of 8 bytes are alike, so that bytes in a wrong place show.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    for at in 0..length.div_ceil(8) as u64 {
        let word = (seed ^ (at << 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes.extend_from_slice(&(word ^ (word >> 29)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Fails with the place of the first difference, not with megabytes of bytes.
#[track_caller]
pub fn assert_same(seen: &[u8], expected: &[u8], what: &str) {
    assert_eq!(seen.len(), expected.len(), "{what}: length");
    // Whole slices first: byte by byte takes seconds for a few MiB, unoptimised and emulated.
    if seen != expected
        && let Some(at) = seen.iter().zip(expected).position(|(seen, expected)| seen != expected)
    {
        let end = (at + 16).min(seen.len());
        panic!("{what}: differs at byte {at:#x}: {:02x?}, not {:02x?}", &seen[at..end], &expected[at..end]);
    }
}

/// All of a buffer, as the CPU sees it.
pub fn contents(buffer: &dmabuf_rdma::DmaBuf) -> Vec<u8> {
    let mut bytes = vec![0; buffer.size() as usize];
    buffer.map().expect("map").read(0, &mut bytes).expect("read");
    bytes
}

/// Asserts that a result is one exact error, and gives its message.
#[macro_export]
macro_rules! assert_refused {
    ($result:expr, $error:pat $(if $condition:expr)?) => {
        match &$result {
            Err(error) => {
                let refused = matches!(error, $error $(if $condition)?);
                assert!(refused, "expected {}, got {error:?}", stringify!($error));
                error.to_string()
            }
            Ok(_) => panic!("expected {}, but it was accepted", stringify!($error)),
        }
    };
}
