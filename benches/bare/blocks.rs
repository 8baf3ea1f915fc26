//! The loop of `benches/peers/by_hand.c`.

use std::ffi::c_void;
use std::io;
use std::time::Duration;

unsafe extern "C" {
    fn bare_write_blocks(
        qp: *mut c_void,
        cq: *mut c_void,
        lkey: u32,
        rkey: u32,
        local: *const u64,
        remote: *const u64,
        count: u64,
        size: u32,
        window: u64,
        chain: u64,
        asleep: i32,
    ) -> i64;
}

/// Blocks of one size, and how to write them.
#[derive(Clone, Copy, Debug)]
pub struct Writes<'a> {
    /// Local addresses and the key of their memory.
    pub local: (&'a [u64], u32),
    /// Remote addresses and the key of their memory.
    pub remote: (&'a [u64], u32),
    /// Bytes of a block.
    pub size: u32,
    /// Work requests in flight.
    pub window: u64,
    /// Work requests in a chain, at most `window`.
    pub chain: u64,
    /// Sleep on the completion channel instead of polling without a pause.
    pub asleep: bool,
}

/// Writes block for block and returns the time from the first post to the last completion.
///
/// # Errors
/// What the provider answers to a post, `EIO` for a work request that failed.
///
/// # Panics
/// If the sides have different numbers of blocks, or a chain does not fit into the window.
///
/// # Safety
/// `qp` is a live, connected `ibv_qp` with room for `window` requests, whose completions go to `cq` alone, which has a
/// channel, and nothing else is in flight. The peer lets its memory be written.
pub unsafe fn write_blocks(qp: *mut c_void, cq: *mut c_void, writes: Writes<'_>) -> io::Result<Duration> {
    let Writes { local: (local, lkey), remote: (remote, rkey), size, window, chain, asleep } = writes;
    assert!(local.len() == remote.len() && (1..=window).contains(&chain));
    let count = local.len() as u64;
    let (from, to, asleep) = (local.as_ptr(), remote.as_ptr(), asleep.into());
    // SAFETY: both lists have `count` entries; the caller vouches for the objects.
    let answer =
        unsafe { bare_write_blocks(qp, cq, lkey, rkey, from, to, count, size, window, chain, asleep) };
    match u64::try_from(answer) {
        Ok(nanoseconds) => Ok(Duration::from_nanos(nanoseconds)),
        Err(_) => Err(io::Error::from_raw_os_error(answer.unsigned_abs() as i32)),
    }
}
