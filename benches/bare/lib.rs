//! The C that the benchmarks measure the library against.
//!
//! A crate of its own because cargo has no build script for a benchmark alone, and the library's users
//! should not get one.
//!
//! `unsafe` is here, in `blocks.rs` and in `sg.rs` for calling it. It keeps nothing of what it is given.

mod blocks;
mod sg;

pub use blocks::{Writes, write_blocks};
pub use sg::Scatterlist;

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

unsafe extern "C" {
    fn bare_register(pd: *mut c_void, fd: RawFd, length: u64, access: u32, times: u64) -> i64;
}

/// Registers and deregisters the first `length` bytes of a dma-buf so many times; returns how long that
/// took. See `benches/register.c`.
///
/// # Errors
/// What the kernel answers.
///
/// # Safety
/// `pd` is a live `ibv_pd` of a soft-RoCE device.
pub unsafe fn register(
    pd: *mut c_void,
    buffer: BorrowedFd<'_>,
    length: u64,
    access: u32,
    times: u64,
) -> io::Result<Duration> {
    // SAFETY: the domain is live, says the caller; the descriptor is open, since it is borrowed; all
    // else is for the kernel to judge. What is registered is gone again before anybody has its keys.
    let answer = unsafe { bare_register(pd, buffer.as_raw_fd(), length, access, times) };
    match u64::try_from(answer) {
        Ok(nanoseconds) => Ok(Duration::from_nanos(nanoseconds)),
        Err(_) => Err(io::Error::from_raw_os_error(answer.unsigned_abs() as i32)),
    }
}
