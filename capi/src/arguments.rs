//! What C passes: arrays, strings, and places for results.
//!
//! `unsafe` is here because these are pointers, whose rules the header states.

use std::ffi::{CStr, c_char, c_void};

use crate::handle::{self, Handle};
use crate::status::{Failed, Result};

/// A negative number of milliseconds means no limit.
pub fn duration(milliseconds: i64) -> std::time::Duration {
    u64::try_from(milliseconds).map_or(std::time::Duration::MAX, std::time::Duration::from_millis)
}

/// A text; `None` for NULL.
///
/// # Safety
/// `text` is NULL or ends with a NUL.
pub unsafe fn text<'a>(text: *const c_char, what: &str) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Failed::misuse(format!("the {what} is not UTF-8")))
}

/// An array, which may be NULL if it is empty.
///
/// # Safety
/// `start` has `count` elements that nobody changes meanwhile.
pub unsafe fn array<'a, T>(start: *const T, count: usize, what: &str) -> Result<&'a [T]> {
    match count {
        0 => Ok(&[]),
        _ if start.is_null() => Err(Failed::misuse(format!("the array of {count} {what} is NULL"))),
        _ if !start.is_aligned() => Err(Failed::misuse(format!("the array of {what} is not aligned"))),
        _ if count > isize::MAX as usize / size_of::<T>() => {
            Err(Failed::misuse(format!("no array has {count} {what}")))
        }
        // SAFETY: the caller's promise, and the checks above.
        _ => Ok(unsafe { std::slice::from_raw_parts(start, count) }),
    }
}

/// Refuses a place for a result that is NULL.
pub fn need<T>(place: *mut T, what: &str) -> Result<()> {
    if place.is_null() { Err(Failed::misuse(format!("the place for the {what} is NULL"))) } else { Ok(()) }
}

/// Stores a result where the caller may want it.
///
/// # Safety
/// `place` is NULL or valid.
pub unsafe fn put<T>(place: *mut T, value: T) {
    if !place.is_null() {
        // SAFETY: the caller's promise.
        unsafe { place.write(value) };
    }
}

/// Makes an object, and stores its handle.
///
/// # Safety
/// `place` is NULL or valid.
#[inline]
pub unsafe fn store<H: Handle>(place: *mut *mut H, make: impl FnOnce() -> Result<H::Object>) -> Result<()> {
    if place.is_null() {
        return Err(Failed::misuse(format!("the place for the new {} is NULL", H::NAME)));
    }
    let handle = handle::new(make()?)?;
    // SAFETY: the caller's promise.
    unsafe { place.write(handle) };
    Ok(())
}

/// Copies bytes to the caller's buffer. `size` holds its size, and gets the number of bytes; too small a buffer is refused
/// with that number.
///
/// # Safety
/// `size` is NULL or valid, and `buffer` is NULL or has so many bytes.
pub unsafe fn copy_bytes(bytes: &[u8], buffer: *mut c_void, size: *mut usize) -> Result<()> {
    need(size, "size of the buffer")?;
    // SAFETY: the caller's promise.
    let room = unsafe { size.replace(bytes.len()) };
    if (buffer.is_null() && !bytes.is_empty()) || room < bytes.len() {
        let room = if buffer.is_null() { 0 } else { room };
        return Err(Failed::misuse(format!("a buffer of {room} bytes is too small for {}", bytes.len())));
    }
    if !bytes.is_empty() {
        // SAFETY: the buffer has room, by the caller's promise and the check above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.cast(), bytes.len()) };
    }
    Ok(())
}

/// Copies a text with its NUL, cut to the buffer, and returns the length of the whole text without the NUL.
///
/// # Safety
/// `buffer` is NULL or has `size` bytes.
pub unsafe fn copy_text(text: &str, buffer: *mut c_char, size: usize) -> usize {
    if !buffer.is_null() && size > 0 {
        let mut length = text.len().min(size - 1);
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        // SAFETY: the buffer has room for `length` bytes and the NUL, by the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast(), length);
            *buffer.add(length) = 0;
        }
    }
    text.len()
}
