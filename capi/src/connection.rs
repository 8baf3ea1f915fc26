//! Connections.
//!
//! `unsafe` is here for what C passes; see the crate.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use dmabuf_rdma::{Connection as Inner, ConnectionOptions, Endpoint};

use crate::arguments::{array, copy_bytes, need, put, store};
use crate::domain::drdma_domain;
use crate::handle::{self, get};
use crate::region::drdma_region;
use crate::status::{Failed, Result, call, drdma_status, query};

/// A reliable connection for any number of transfers in flight. After a transfer has failed it is unusable, but for the
/// statuses DRDMA_CANCELLED and DRDMA_TIMEOUT as docs/transfer.md says: make a new one.
#[allow(non_camel_case_types)]
pub struct drdma_connection(());

pub struct Connection {
    pub inner: Inner,
    /// What the peer sent when it was connected by address.
    pub data: Vec<u8>,
}

/// Options of a connection. Fill it with zeros first: a field of 0 means its default.
#[repr(C)]
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
pub struct drdma_options {
    /// Bytes of a message, 1 to 1 GiB; default 1 MiB. Both sides of a send and its receive need the same.
    pub message_size: u64,
    /// Messages in flight in each direction, 1 to 65536; default 128.
    pub window: u32,
    /// Messages that are posted with one call, 1 to half the window; default 16.
    pub chain: u32,
    /// Receives posted ahead for the peer's notifications; default 0: none are received.
    pub notifications: u32,
    /// Milliseconds without a completed message after which a transfer fails; default 30000.
    pub stall_timeout_ms: u32,
    /// Not 0: poll for completions instead of sleeping.
    pub busy_poll: u8,
    /// Port of the device, from 1; default 1.
    pub port: u8,
    /// Traffic class of RoCE: DSCP << 2 | ECN; default 0.
    pub traffic_class: u8,
    /// Service level of InfiniBand, 0 to 15; default 0.
    pub service_level: u8,
    /// Bytes that an inline work request may have; default 0.
    pub max_inline: u32,
    /// For later fields: 0.
    pub reserved: [u64; 4],
}

/// The options that C passed; the defaults for NULL.
///
/// # Safety
/// `options` is NULL or valid.
pub unsafe fn options(options: *const drdma_options) -> Result<ConnectionOptions> {
    let mut all = ConnectionOptions::default();
    if options.is_null() {
        return Ok(all);
    }
    // SAFETY: the caller's promise.
    let given = unsafe { options.read() };
    if given.reserved != [0; 4] {
        return Err(Failed::misuse(
            "reserved fields of the options are not 0: fill the struct with zeros first",
        ));
    }
    fn set<T: Default + PartialEq>(option: &mut T, given: T) {
        if given != T::default() {
            *option = given;
        }
    }
    set(&mut all.message_size, given.message_size);
    set(&mut all.window, given.window);
    set(&mut all.chain, given.chain);
    set(&mut all.notifications, given.notifications);
    set(&mut all.stall_timeout, Duration::from_millis(given.stall_timeout_ms.into()));
    set(&mut all.busy_poll, given.busy_poll != 0);
    set(&mut all.queue_pair.port, given.port);
    set(&mut all.queue_pair.traffic_class, (given.traffic_class != 0).then_some(given.traffic_class));
    set(&mut all.queue_pair.service_level, (given.service_level != 0).then_some(given.service_level));
    set(&mut all.queue_pair.max_inline, given.max_inline);
    Ok(all)
}

/// Length in bytes of an endpoint's description.
pub const DRDMA_ENDPOINT_BYTES: usize = 44;

const _: () = assert!(DRDMA_ENDPOINT_BYTES == Endpoint::BYTES);

/// Makes a connection that is connected by exchanged endpoints. `options` may be NULL. It takes 5 descriptors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connection_new(
    domain: *mut drdma_domain,
    options: *const drdma_options,
    connection: *mut *mut drdma_connection,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let (domain, options) = (get(domain)?, self::options(options)?);
            store(connection, || {
                Ok(Connection { inner: Inner::new(&domain.domain, options)?, data: Vec::new() })
            })
        }
    })
}

/// Writes the description that the peer needs to connect: DRDMA_ENDPOINT_BYTES bytes of plain data.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connection_endpoint(
    connection: *mut drdma_connection,
    buffer: *mut c_void,
) -> drdma_status {
    call(|| {
        need(buffer, "endpoint")?;
        // SAFETY: the header's rules for handles and buffers.
        unsafe {
            let bytes = get(connection)?.inner.endpoint().to_bytes();
            buffer.cast::<[u8; DRDMA_ENDPOINT_BYTES]>().write(bytes);
        }
        Ok(())
    })
}

/// Connects to the peer's endpoint, of DRDMA_ENDPOINT_BYTES bytes. It does not wait. The peer must connect to this one too
/// before either side transfers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connection_connect(
    connection: *mut drdma_connection,
    endpoint: *const c_void,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and arrays.
        unsafe {
            let endpoint = array(endpoint.cast::<u8>(), DRDMA_ENDPOINT_BYTES, "bytes of an endpoint")?;
            Ok(get(connection)?.inner.connect(&Endpoint::from_bytes(endpoint)?)?)
        }
    })
}

/// Ends the connection: transfers in flight end with DRDMA_TRANSPORT, and a peer that is connected by address is told.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connection_disconnect(connection: *mut drdma_connection) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles.
        unsafe { get(connection)? }.inner.disconnect();
        Ok(())
    })
}

/// Makes what the peer has written into the region visible to work that a GPU starts afterwards. Memory of the host needs no
/// flush. It waits for a read of the device's own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connection_flush(
    connection: *mut drdma_connection,
    region: *mut drdma_region,
) -> drdma_status {
    // SAFETY: the header's rules for handles.
    call(|| unsafe { Ok(get(connection)?.inner.flush(get(region)?)?) })
}

/// Writes the private data that the peer sent when it was connected by address, padded with zeros. `size` holds the size of the
/// buffer, and gets the number of bytes, also if the buffer is too small (DRDMA_MISUSE) or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connection_private_data(
    connection: *mut drdma_connection,
    buffer: *mut c_void,
    size: *mut usize,
) -> drdma_status {
    // SAFETY: the header's rules for handles and buffers.
    call(|| unsafe { copy_bytes(&get(connection)?.data, buffer, size) })
}

/// The descriptor for an event loop of the caller's (poll, epoll level- or edge-triggered): when it is readable, call
/// drdma_connection_process(). -1 if the handle is refused. It stays the connection's, and must not be read or closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connection_fd(connection: *mut drdma_connection) -> c_int {
    // SAFETY: the header's rules for handles.
    query(-1, || Ok(unsafe { get(connection) }?.inner.as_fd().as_raw_fd()))
}

/// Makes progress for all transfers of the connection, and arms its descriptor. It never waits. An event loop calls it once
/// before it watches the descriptor, whenever that is readable, and after `next_ms` milliseconds, when the next timeout
/// expires; -1 if there is none. `next_ms` may be NULL. Then ask drdma_transfer_try() and drdma_notifications_take().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connection_process(
    connection: *mut drdma_connection,
    next_ms: *mut i64,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let next = get(connection)?.inner.process_events()?;
            // Rounded up, or the caller would call again too early.
            let left =
                |next: Instant| next.saturating_duration_since(Instant::now()).as_nanos().div_ceil(1_000_000);
            put(next_ms, next.map_or(-1, |next| i64::try_from(left(next)).unwrap_or(i64::MAX)));
        }
        Ok(())
    })
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_connection_ref(connection: *mut drdma_connection) -> drdma_status {
    call(|| handle::reference(connection))
}

/// Releases a reference; NULL does nothing. The queue pair is destroyed once no handle of the connection or of a transfer of it
/// is left, and before that nothing that a transfer in flight uses is released.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_connection_unref(connection: *mut drdma_connection) -> drdma_status {
    call(|| handle::release(connection))
}
