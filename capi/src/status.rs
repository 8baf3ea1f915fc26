//! Status codes by the kind of an error, and the last error of a thread.
//!
//! `unsafe` is here for the buffers of the caller.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use dmabuf_rdma::{ErrorKind, cm, dmabuf, exporter, host, mr, transfer, verbs};

use crate::arguments::copy_text;

/// How a call ended: DRDMA_OK, or the kind of its error, which says what a program can do about it.
#[repr(C)]
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum drdma_status {
    /// Success.
    DRDMA_OK = 0,
    /// The arguments cannot work, or not together: correct the program.
    DRDMA_MISUSE = 1,
    /// Data from outside, such as a peer's description, is damaged or inconsistent.
    DRDMA_INVALID_DATA = 2,
    /// The device, its driver, the kernel or a library lacks the operation: choose another way.
    DRDMA_UNSUPPORTED = 3,
    /// A device, heap, library, address or pointer does not exist.
    DRDMA_NOT_FOUND = 4,
    /// This user, or this descriptor, lacks the permission.
    DRDMA_PERMISSION = 5,
    /// A limit that an administrator or the caller can raise: descriptors, locked memory.
    DRDMA_LIMIT = 6,
    /// The system or the device is out of memory.
    DRDMA_OUT_OF_MEMORY = 7,
    /// The object is in use.
    DRDMA_BUSY = 8,
    /// The timeout expired.
    DRDMA_TIMEOUT = 9,
    /// The caller cancelled the operation.
    DRDMA_CANCELLED = 10,
    /// The peer disconnected, rejected the connection, or does not answer.
    DRDMA_PEER_GONE = 11,
    /// The device failed, was removed, or was reset.
    DRDMA_DEVICE_GONE = 12,
    /// A transfer failed on the wire or at the peer, or the connection failed before.
    DRDMA_TRANSPORT = 13,
    /// Any other error of the system: see drdma_last_errno().
    DRDMA_SYSTEM = 14,
    /// Not ended yet, or nothing there yet. This is no error, and leaves the last error as it is.
    DRDMA_PENDING = 15,
}

use drdma_status as Status;

/// Why a call failed.
pub struct Failed {
    status: Status,
    message: String,
    errno: c_int,
    hint: String,
}

pub type Result<T, E = Failed> = std::result::Result<T, E>;

impl Failed {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { status: status(kind), message: message.into(), errno: 0, hint: kind.hint().into() }
    }

    pub fn misuse(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Misuse, message)
    }

    /// Not ended yet.
    pub fn pending() -> Self {
        Self { status: Status::DRDMA_PENDING, message: String::new(), errno: 0, hint: String::new() }
    }
}

fn status(kind: ErrorKind) -> Status {
    match kind {
        ErrorKind::Misuse => Status::DRDMA_MISUSE,
        ErrorKind::InvalidData => Status::DRDMA_INVALID_DATA,
        ErrorKind::Unsupported => Status::DRDMA_UNSUPPORTED,
        ErrorKind::NotFound => Status::DRDMA_NOT_FOUND,
        ErrorKind::Permission => Status::DRDMA_PERMISSION,
        ErrorKind::Limit => Status::DRDMA_LIMIT,
        ErrorKind::OutOfMemory => Status::DRDMA_OUT_OF_MEMORY,
        ErrorKind::Busy => Status::DRDMA_BUSY,
        ErrorKind::Timeout => Status::DRDMA_TIMEOUT,
        ErrorKind::Cancelled => Status::DRDMA_CANCELLED,
        ErrorKind::PeerGone => Status::DRDMA_PEER_GONE,
        ErrorKind::DeviceGone => Status::DRDMA_DEVICE_GONE,
        ErrorKind::Transport => Status::DRDMA_TRANSPORT,
        // `System`, and a kind that this header does not have yet.
        _ => Status::DRDMA_SYSTEM,
    }
}

macro_rules! from_library {
    ($($error:ty),*) => {
        $(impl From<$error> for Failed {
            fn from(error: $error) -> Self {
                let error = dmabuf_rdma::Error::from(error);
                Self {
                    status: status(error.kind()),
                    // Debug prints the message with its causes.
                    message: format!("{error:?}"),
                    errno: error.errno().unwrap_or(0),
                    hint: error.hint().into(),
                }
            }
        })*
    };
}

from_library!(
    dma_sg::RangeError,
    dmabuf::Error,
    exporter::Error,
    exporter::PointerError,
    host::Error,
    verbs::Error,
    mr::RegisterError,
    mr::SetError,
    mr::SliceError,
    transfer::Error,
    cm::Error
);

thread_local! {
    static LAST: RefCell<Option<Failed>> = const { RefCell::new(None) };
}

/// Runs a call: its failure becomes the thread's last error, and a panic one of the kind DRDMA_SYSTEM.
pub fn call(body: impl FnOnce() -> Result<()>) -> Status {
    let failed = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Status::DRDMA_OK,
        Ok(Err(failed)) => failed,
        Err(panic) => panicked(panic),
    };
    keep(failed)
}

/// Runs a call that returns a value, which is `otherwise` if it fails.
pub fn query<T>(otherwise: T, body: impl FnOnce() -> Result<T>) -> T {
    let mut value = otherwise;
    call(|| {
        value = body()?;
        Ok(())
    });
    value
}

#[cold]
fn keep(failed: Failed) -> Status {
    let status = failed.status;
    if status != Status::DRDMA_PENDING {
        // The thread may be at its end.
        let _ = LAST.try_with(|last| last.replace(Some(failed)));
    }
    status
}

#[cold]
fn panicked(panic: Box<dyn Any + Send>) -> Failed {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    let failed =
        Failed::new(ErrorKind::System, format!("the library has a bug: {}", text.unwrap_or("it panicked")));
    // Its destructor may panic as well.
    std::mem::forget(panic);
    failed
}

/// What `get` says about the thread's last error; `None` if there is none.
fn last<T>(get: impl FnOnce(&Failed) -> T) -> Option<T> {
    LAST.try_with(|last| last.borrow().as_ref().map(get)).ok().flatten()
}

/// By their numbers.
const NAMES: [&CStr; 16] = [
    c"DRDMA_OK",
    c"DRDMA_MISUSE",
    c"DRDMA_INVALID_DATA",
    c"DRDMA_UNSUPPORTED",
    c"DRDMA_NOT_FOUND",
    c"DRDMA_PERMISSION",
    c"DRDMA_LIMIT",
    c"DRDMA_OUT_OF_MEMORY",
    c"DRDMA_BUSY",
    c"DRDMA_TIMEOUT",
    c"DRDMA_CANCELLED",
    c"DRDMA_PEER_GONE",
    c"DRDMA_DEVICE_GONE",
    c"DRDMA_TRANSPORT",
    c"DRDMA_SYSTEM",
    c"DRDMA_PENDING",
];

/// The name of a status, such as "DRDMA_MISUSE", for a log. It is static; "unknown" for any other number.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_status_name(status: c_int) -> *const c_char {
    query(c"unknown".as_ptr(), || {
        let known = usize::try_from(status).ok().and_then(|status| NAMES.get(status));
        Ok(known.unwrap_or(&c"unknown").as_ptr())
    })
}

/// The status of the last call of this thread that failed; DRDMA_OK if none has.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_last_status() -> drdma_status {
    query(Status::DRDMA_SYSTEM, || Ok(last(|failed| failed.status).unwrap_or(Status::DRDMA_OK)))
}

/// The message of this thread's last error with its causes: what failed, why if known, and what to do next. Copies it to
/// `buffer`, cut to `size` bytes with the NUL, and returns its whole length without the NUL: 0 if no call has failed.
/// `buffer` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_last_message(buffer: *mut c_char, size: usize) -> usize {
    query(0, || {
        let text = last(|failed| failed.message.clone()).unwrap_or_default();
        // SAFETY: the header's rules for buffers.
        Ok(unsafe { copy_text(&text, buffer, size) })
    })
}

/// What to do about this thread's last error, in a sentence; otherwise like drdma_last_message().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_last_hint(buffer: *mut c_char, size: usize) -> usize {
    query(0, || {
        let text = last(|failed| failed.hint.clone()).unwrap_or_default();
        // SAFETY: the header's rules for buffers.
        Ok(unsafe { copy_text(&text, buffer, size) })
    })
}

/// The errno behind this thread's last error; 0 if it has none.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_last_errno() -> c_int {
    query(0, || Ok(last(|failed| failed.errno).unwrap_or(0)))
}
