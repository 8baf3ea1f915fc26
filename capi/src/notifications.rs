//! Notifications.
//!
//! `unsafe` is here for what C passes; see the crate.

use std::ffi::c_void;

use dmabuf_rdma::Notifications;

use crate::arguments::{array, duration, need};
use crate::connection::drdma_connection;
use crate::handle::get;
use crate::status::{Failed, call, drdma_status};
use crate::transfer::{drdma_transfer, start};

/// Maximum number of bytes in the payload of a notification.
pub const DRDMA_MAX_PAYLOAD: usize = 64;

const _: () = assert!(DRDMA_MAX_PAYLOAD == Notifications::MAX_PAYLOAD);

/// A notification of a peer.
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct drdma_notification {
    /// What the peer chose.
    pub id: u32,
    /// Number of bytes in the payload.
    pub size: u32,
    /// The payload, and zeros.
    pub payload: [u8; DRDMA_MAX_PAYLOAD],
}

/// Notifies the peer, after everything that was written before, with a payload of up to DRDMA_MAX_PAYLOAD bytes, which is
/// copied. `payload` may be NULL with a `size` of 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_notify(
    connection: *mut drdma_connection,
    id: u32,
    payload: *const c_void,
    size: usize,
    timeout_ms: i64,
    transfer: *mut *mut drdma_transfer,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles, arrays and places.
        unsafe {
            let payload = array(payload.cast::<u8>(), size, "bytes")?;
            start(connection, timeout_ms, transfer, |connection| connection.notify(id, payload))
        }
    })
}

/// Waits until `count` notifications of `id` have come since the last were taken, and takes them. DRDMA_TIMEOUT if they have not
/// come within `timeout_ms` milliseconds (negative: no limit); then none is taken, and the connection stays usable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_notifications_wait(
    connection: *mut drdma_connection,
    id: u32,
    count: u64,
    timeout_ms: i64,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles.
        let connection = unsafe { get(connection) }?;
        Ok(connection.inner.notifications().wait(id, count, duration(timeout_ms))?)
    })
}

/// Takes the next notification, whatever its id. With a `timeout_ms` of 0 it does not wait, and returns DRDMA_PENDING if none
/// has come. Otherwise it waits so many milliseconds (negative: no limit), and then returns DRDMA_TIMEOUT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_notifications_take(
    connection: *mut drdma_connection,
    timeout_ms: i64,
    notification: *mut drdma_notification,
) -> drdma_status {
    call(|| {
        need(notification, "notification")?;
        // SAFETY: the header's rules for handles.
        let all = unsafe { get(connection) }?.inner.notifications();
        let taken = match timeout_ms {
            0 => all.try_take()?.ok_or_else(Failed::pending)?,
            _ => all.take_timeout(duration(timeout_ms))?,
        };
        let mut payload = [0; DRDMA_MAX_PAYLOAD];
        payload[..taken.payload.len()].copy_from_slice(&taken.payload);
        let size = taken.payload.len() as u32;
        // SAFETY: the header's rules for places.
        unsafe { notification.write(drdma_notification { id: taken.id, size, payload }) };
        Ok(())
    })
}
