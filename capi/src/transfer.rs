//! Transfers.
//!
//! `unsafe` is here for what C passes; see the crate.

use std::time::{Duration, Instant};

use dmabuf_rdma::{Connection as Inner, Transfer, transfer};

use crate::arguments::{duration, put, store};
use crate::blocks::drdma_blocks;
use crate::connection::drdma_connection;
use crate::handle::{self, get};
use crate::region::drdma_region;
use crate::remote::drdma_remote;
use crate::status::{Failed, Result, call, drdma_status, query};

/// A transfer in flight. It holds its memory until the device is done, whatever else is released.
#[allow(non_camel_case_types)]
pub struct drdma_transfer(());

/// Starts a transfer with a timeout for all of it.
///
/// # Safety
/// The header's rules for the handle and for the place.
pub unsafe fn start(
    connection: *mut drdma_connection,
    timeout_ms: i64,
    place: *mut *mut drdma_transfer,
    start: impl FnOnce(&Inner) -> Result<Transfer, transfer::Error>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        let connection = &get(connection)?.inner;
        store(place, || {
            let transfer = start(connection)?;
            Ok(if timeout_ms >= 0 { transfer.timeout(duration(timeout_ms)) } else { transfer })
        })
    }
}

/// Writes a region into the peer's memory, which has the same length. `timeout_ms` limits the whole transfer, in milliseconds;
/// negative means no limit but the stall timeout. It starts the transfer and does not wait, as all functions here with a
/// `transfer` do.
///
/// Errors of all that start a transfer: DRDMA_MISUSE: different lengths, a region of another domain or without the right that
/// the operation needs, a peer's memory that does not permit it, a connection that is not connected yet. DRDMA_TRANSPORT: the
/// connection failed before.
///
/// A transfer whose time is up after some of its messages were posted leaves the connection unusable: make a new one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_write(
    connection: *mut drdma_connection,
    local: *mut drdma_region,
    remote: *mut drdma_remote,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (local, remote) = (get(local)?, get(remote)?);
            start(connection, timeout_ms, transfer, |connection| connection.write(local, remote))
        }
    })
}

/// Like drdma_write(), and notifies the peer with `id` once all bytes are in its memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_write_notify(
    connection: *mut drdma_connection,
    local: *mut drdma_region,
    remote: *mut drdma_remote,
    id: u32,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (local, remote) = (get(local)?, get(remote)?);
            start(connection, timeout_ms, transfer, |connection| connection.write_notify(local, remote, id))
        }
    })
}

/// Reads the peer's memory into a region of the same length, which needs DRDMA_LOCAL_WRITE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_read(
    connection: *mut drdma_connection,
    local: *mut drdma_region,
    remote: *mut drdma_remote,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (local, remote) = (get(local)?, get(remote)?);
            start(connection, timeout_ms, transfer, |connection| connection.read(local, remote))
        }
    })
}

/// Writes each block of a table in a region into the block of a table in the peer's memory with the same index and length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_write_blocks(
    connection: *mut drdma_connection,
    local: *mut drdma_blocks,
    remote: *mut drdma_blocks,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (local, remote) = (get(local)?.local()?, get(remote)?.remote()?);
            start(connection, timeout_ms, transfer, |connection| connection.write(local, remote))
        }
    })
}

/// Like drdma_write_blocks(), and notifies the peer with `id` once all bytes are in its memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_write_blocks_notify(
    connection: *mut drdma_connection,
    local: *mut drdma_blocks,
    remote: *mut drdma_blocks,
    id: u32,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (local, remote) = (get(local)?.local()?, get(remote)?.remote()?);
            start(connection, timeout_ms, transfer, |connection| connection.write_notify(local, remote, id))
        }
    })
}

/// Reads each of the peer's blocks into the block of a table in a region with the same index and length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_read_blocks(
    connection: *mut drdma_connection,
    local: *mut drdma_blocks,
    remote: *mut drdma_blocks,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (local, remote) = (get(local)?.local()?, get(remote)?.remote()?);
            start(connection, timeout_ms, transfer, |connection| connection.read(local, remote))
        }
    })
}

/// Sends a region's bytes to a peer that receives as many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_send(
    connection: *mut drdma_connection,
    local: *mut drdma_region,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let local = get(local)?;
            start(connection, timeout_ms, transfer, |connection| connection.send(local))
        }
    })
}

/// Receives as many bytes as the region has, which needs DRDMA_LOCAL_WRITE. Start it before the peer sends. After
/// DRDMA_TIMEOUT or DRDMA_CANCELLED before its first message it stays posted, so that the peer may still write the memory;
/// receive into the same memory again, or release the connection. Only one thread may wait for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_recv(
    connection: *mut drdma_connection,
    local: *mut drdma_region,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let local = get(local)?;
            start(connection, timeout_ms, transfer, |connection| connection.recv(local))
        }
    })
}

/// Adds to a 64-bit integer of the peer at a multiple of 8, and returns its previous value in the 8 bytes of `local`, in this
/// machine's byte order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_fetch_add(
    connection: *mut drdma_connection,
    local: *mut drdma_region,
    remote: *mut drdma_remote,
    add: u64,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (local, remote) = (get(local)?, get(remote)?);
            start(connection, timeout_ms, transfer, |connection| connection.fetch_add(local, remote, add))
        }
    })
}

/// Replaces a 64-bit integer of the peer at a multiple of 8 with `swap` if it equals `compare`, and returns its previous value in
/// the 8 bytes of `local`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_compare_swap(
    connection: *mut drdma_connection,
    local: *mut drdma_region,
    remote: *mut drdma_remote,
    compare: u64,
    swap: u64,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (local, remote) = (get(local)?, get(remote)?);
            start(connection, timeout_ms, transfer, |connection| {
                connection.compare_swap(local, remote, compare, swap)
            })
        }
    })
}

/// Waits until the transfer ends, for at most `timeout_ms` milliseconds; negative means no limit. DRDMA_OK if it has completed,
/// DRDMA_PENDING if it is in flight then and goes on, else how it failed. `bytes`, which may be NULL, gets its length. Any
/// thread may wait for any transfer, also several for one.
///
/// Errors: DRDMA_TIMEOUT: its own timeout or the stall timeout expired. DRDMA_CANCELLED. DRDMA_TRANSPORT: a message failed, and
/// the message says why. DRDMA_PEER_GONE: the peer disconnected. DRDMA_DEVICE_GONE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_transfer_wait(
    transfer: *mut drdma_transfer,
    timeout_ms: i64,
    bytes: *mut u64,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles.
        let transfer = unsafe { get(transfer) }?;
        let ended = match timeout_ms {
            ..0 => transfer.wait()?,
            0 => transfer.try_wait()?.ok_or_else(Failed::pending)?,
            _ => wait_for(transfer, duration(timeout_ms))?,
        };
        // SAFETY: the header's rules for places.
        unsafe { put(bytes, ended.bytes) };
        Ok(())
    })
}

/// A wait ends early when a signal handler has run.
fn wait_for(transfer: &Transfer, limit: Duration) -> Result<transfer::Transferred> {
    let end = Instant::now().checked_add(limit);
    loop {
        let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
        match transfer.wait_for(left)? {
            Some(ended) => return Ok(ended),
            None if left.is_zero() => return Err(Failed::pending()),
            None => {}
        }
    }
}

/// Whether the transfer has ended: DRDMA_OK, DRDMA_PENDING, or how it failed. It never waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_transfer_try(transfer: *mut drdma_transfer) -> drdma_status {
    // SAFETY: the header's rules for handles.
    call(|| match unsafe { get(transfer) }?.try_wait()? {
        Some(_) => Ok(()),
        None => Err(Failed::pending()),
    })
}

/// Cancels the transfer: no further message is posted, and those in flight complete. Then it ends with DRDMA_CANCELLED, or with
/// DRDMA_OK if these were all, and the connection stays usable. For a receive see drdma_recv(); after its first message the
/// connection becomes unusable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_transfer_cancel(transfer: *mut drdma_transfer) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles.
        unsafe { get(transfer)? }.cancel();
        Ok(())
    })
}

/// Bytes in messages that have completed; 0 if the handle is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_transfer_progress(transfer: *mut drdma_transfer) -> u64 {
    // SAFETY: the header's rules for handles.
    query(0, || Ok(unsafe { get(transfer) }?.progress()))
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_transfer_ref(transfer: *mut drdma_transfer) -> drdma_status {
    call(|| handle::reference(transfer))
}

/// Releases a reference; NULL does nothing. A transfer whose last reference is released goes on, and its error is lost.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_transfer_unref(transfer: *mut drdma_transfer) -> drdma_status {
    call(|| handle::release(transfer))
}
