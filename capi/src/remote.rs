//! A peer's memory.
//!
//! `unsafe` is here for what C passes; see the crate.

use std::ffi::c_void;

use dmabuf_rdma::RemoteRegion;

use crate::arguments::{array, store};
use crate::handle::{self, get};
use crate::region::end;
use crate::status::{call, drdma_status, query};

/// A byte range of a peer's memory.
#[allow(non_camel_case_types)]
pub struct drdma_remote(());

/// Parses a peer's description (drdma_region_describe()) at the start of `bytes`. What follows it is ignored, such as the
/// padding of private data. The bytes need not be trusted.
///
/// Errors: DRDMA_INVALID_DATA: they are cut, damaged, of another version, or describe what cannot be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_remote_parse(
    bytes: *const c_void,
    size: usize,
    remote: *mut *mut drdma_remote,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for arrays and places.
        unsafe {
            let bytes = array(bytes.cast::<u8>(), size, "bytes")?;
            store(remote, || Ok(RemoteRegion::split_from(bytes)?.0.into()))
        }
    })
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_remote_ref(remote: *mut drdma_remote) -> drdma_status {
    call(|| handle::reference(remote))
}

/// Releases a reference; NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_remote_unref(remote: *mut drdma_remote) -> drdma_status {
    call(|| handle::release(remote))
}

/// Bytes `offset` to `offset + length` of a peer's memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_remote_slice(
    remote: *mut drdma_remote,
    offset: u64,
    length: u64,
    slice: *mut *mut drdma_remote,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let remote = get(remote)?;
            store(slice, || Ok(remote.slice(offset..end(offset, length)?)?))
        }
    })
}

/// Length of a peer's memory in bytes; 0 if the handle is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_remote_length(remote: *mut drdma_remote) -> u64 {
    // SAFETY: the header's rules for handles.
    query(0, || Ok(unsafe { get(remote) }?.len()))
}
