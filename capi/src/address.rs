//! Connections by IP address, through librdmacm.
//!
//! `unsafe` is here for what C passes; see the crate.

use std::ffi::{c_char, c_int, c_void};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};

use dmabuf_rdma::{Connection as Inner, Device, ErrorKind, ProtectionDomain, cm};

use crate::arguments::{array, copy_text, duration, put, store, text};
use crate::connection::{self, Connection, drdma_connection, drdma_options};
use crate::domain::drdma_domain;
use crate::handle::{self, get};
use crate::status::{Failed, Result, call, drdma_status, query};

/// A listener for connection requests on an IP address.
#[allow(non_camel_case_types)]
pub struct drdma_listener(());

/// A connection request.
#[allow(non_camel_case_types)]
pub struct drdma_incoming(());

pub struct Incoming {
    /// `None` after it was accepted.
    request: Mutex<Option<cm::Incoming>>,
    device: String,
    data: Vec<u8>,
}

/// # Safety
/// `address` is NULL or ends with a NUL.
unsafe fn address(address: *const c_char) -> Result<SocketAddr> {
    // SAFETY: the caller's promise.
    let text =
        unsafe { self::text(address, "address") }?.ok_or_else(|| Failed::misuse("the address is NULL"))?;
    match text.to_socket_addrs() {
        Ok(mut all) => {
            all.next().ok_or_else(|| Failed::new(ErrorKind::NotFound, format!("{text:?} has no address")))
        }
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
            Err(Failed::misuse(format!("{text:?} is no \"host:port\": {error}")))
        }
        Err(error) => Err(Failed::new(ErrorKind::NotFound, format!("{text:?} has no address: {error}"))),
    }
}

/// Connects to a listener at `peer`, "host:port", and sends it up to 52 bytes of private data (48 with notifications).
/// `domain` must be on the device of the route; NULL opens that device. `options` may be NULL. It waits for the peer, at most
/// `timeout_ms` milliseconds (negative: no limit).
///
/// Errors: DRDMA_NOT_FOUND: the host has no address, no RDMA device has a route to it, or librdmacm is missing. DRDMA_PEER_GONE:
/// nobody listens, or the peer rejected the request. DRDMA_TIMEOUT. DRDMA_MISUSE: too much private data, another device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_connect(
    peer: *const c_char,
    domain: *mut drdma_domain,
    options: *const drdma_options,
    data: *const c_void,
    size: usize,
    timeout_ms: i64,
    connection: *mut *mut drdma_connection,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles, strings, arrays and places.
        unsafe {
            let domain = if domain.is_null() { None } else { Some(&get(domain)?.domain) };
            let (options, data) = (connection::options(options)?, array(data.cast::<u8>(), size, "bytes")?);
            let peer = address(peer)?;
            store(connection, || {
                let timeout = duration(timeout_ms);
                let outgoing = cm::Outgoing::resolve(peer, None, timeout)?;
                let own = match domain {
                    Some(domain) => domain.clone(),
                    None => ProtectionDomain::new(&Device::by_name(&outgoing.device_name())?.open()?)?,
                };
                let mut inner = Inner::new(&own, options)?;
                let data = outgoing.connect(&mut inner, data, timeout)?;
                Ok(Connection { inner, data })
            })
        }
    })
}

/// Listens on `local`, "host:port"; port 0 chooses a free one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_listen(
    local: *const c_char,
    listener: *mut *mut drdma_listener,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for strings and places.
        unsafe {
            let local = address(local)?;
            store(listener, || Ok(cm::Listener::bind(local)?))
        }
    })
}

/// The listener's port; 0 if the handle is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_listener_port(listener: *mut drdma_listener) -> u16 {
    // SAFETY: the header's rules for handles.
    query(0, || Ok(unsafe { get(listener) }?.local_addr().port()))
}

/// The listener's descriptor, which is readable when a request may have come; -1 if the handle is refused. It stays the
/// listener's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_listener_fd(listener: *mut drdma_listener) -> c_int {
    // SAFETY: the header's rules for handles.
    query(-1, || Ok(unsafe { get(listener) }?.as_fd().as_raw_fd()))
}

/// Takes the next connection request. With a `timeout_ms` of 0 it does not wait, and returns DRDMA_PENDING if none has come.
/// Otherwise it waits so many milliseconds (negative: no limit), and then returns DRDMA_TIMEOUT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_listener_accept(
    listener: *mut drdma_listener,
    timeout_ms: i64,
    incoming: *mut *mut drdma_incoming,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let listener = get(listener)?;
            store(incoming, || {
                let request = match timeout_ms {
                    0 => listener.try_accept_request()?.ok_or_else(Failed::pending)?,
                    _ => listener.accept_request(duration(timeout_ms))?,
                };
                let (device, data) = (request.device_name(), request.private_data().to_vec());
                Ok(Incoming { request: Mutex::new(Some(request)), device, data })
            })
        }
    })
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_listener_ref(listener: *mut drdma_listener) -> drdma_status {
    call(|| handle::reference(listener))
}

/// Releases a reference; NULL does nothing. Requests that were taken live on.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_listener_unref(listener: *mut drdma_listener) -> drdma_status {
    call(|| handle::release(listener))
}

/// The name of the device that received the request. Copies it to `buffer`, cut to `size` bytes with the NUL, and stores the
/// whole length without the NUL in `length`, which may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_incoming_device(
    incoming: *mut drdma_incoming,
    buffer: *mut c_char,
    size: usize,
    length: *mut usize,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles, buffers and places.
        unsafe { put(length, copy_text(&get(incoming)?.device, buffer, size)) };
        Ok(())
    })
}

/// Accepts the request with a connection in `domain`, on the device that received it, and replies with up to 192 bytes of
/// private data (188 with notifications). It waits for the peer, at most `timeout_ms` milliseconds (negative: no limit). The
/// request's private data are then the connection's. `options` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_incoming_accept(
    incoming: *mut drdma_incoming,
    domain: *mut drdma_domain,
    options: *const drdma_options,
    data: *const c_void,
    size: usize,
    timeout_ms: i64,
    connection: *mut *mut drdma_connection,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles, arrays and places.
        unsafe {
            let (incoming, domain) = (get(incoming)?, get(domain)?);
            let (options, data) = (connection::options(options)?, array(data.cast::<u8>(), size, "bytes")?);
            store(connection, || {
                let mut inner = Inner::new(&domain.domain, options)?;
                let request = incoming.request.lock().unwrap_or_else(PoisonError::into_inner).take();
                let request = request.ok_or_else(|| Failed::misuse("this request was accepted already"))?;
                request.accept(&mut inner, data, duration(timeout_ms))?;
                Ok(Connection { inner, data: incoming.data.clone() })
            })
        }
    })
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_incoming_ref(incoming: *mut drdma_incoming) -> drdma_status {
    call(|| handle::reference(incoming))
}

/// Releases a reference; NULL does nothing. A request that was not accepted is rejected with the last one.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_incoming_unref(incoming: *mut drdma_incoming) -> drdma_status {
    call(|| handle::release(incoming))
}
