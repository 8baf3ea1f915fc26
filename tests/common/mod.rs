//! Fixtures of the integration tests.

pub mod buffers;
pub mod bytes;
pub mod capture;
pub mod census;
pub mod cgroup;
pub mod cuda;
pub mod doctor;
pub mod drm;
pub mod faults;
pub mod gpu;
pub mod host;
pub mod kcore;
pub mod leaks;
pub mod link;
pub mod peers;
pub mod profile;
pub mod raw;
pub mod report;
pub mod system;
pub mod wire;

/// A pattern in which all words of 8 bytes differ, so that misplaced bytes are found.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    for at in 0..length.div_ceil(8) as u64 {
        let word = (seed ^ (at << 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes.extend_from_slice(&(word ^ (word >> 29)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Compares bytes and, on failure, prints the first difference instead of megabytes of data.
#[track_caller]
pub fn assert_same(seen: &[u8], expected: &[u8], what: &str) {
    assert_eq!(seen.len(), expected.len(), "{what}: length");
    // Compare whole slices first: a byte loop takes seconds for a few MiB, unoptimized and emulated.
    if seen != expected
        && let Some(at) = seen.iter().zip(expected).position(|(seen, expected)| seen != expected)
    {
        let end = (at + 16).min(seen.len());
        panic!("{what}: byte {at:#x} differs: {:02x?}, expected {:02x?}", &seen[at..end], &expected[at..end]);
    }
}

/// The contents of a buffer as the CPU sees them.
pub fn contents(buffer: &dmabuf_rdma::DmaBuf) -> Vec<u8> {
    let mut bytes = vec![0; buffer.size() as usize];
    buffer.map().expect("map").read(0, &mut bytes).expect("read");
    bytes
}

/// Asserts that a result is the given error, and returns its message.
#[macro_export]
macro_rules! assert_refused {
    ($result:expr, $error:pat $(if $condition:expr)?) => {
        match &$result {
            Err(error) => {
                let refused = matches!(error, $error $(if $condition)?);
                assert!(refused, "expected {}, got {error:?}", stringify!($error));
                error.to_string()
            }
            Ok(_) => panic!("expected {}, but the call succeeded", stringify!($error)),
        }
    };
}
