//! The verbs objects: one file each, parents held alive by their children.
//!
//! A [`Device`] is opened to a [`Context`]; a [`ProtectionDomain`], [`CompletionQueue`]s and
//! [`QueuePair`]s are made of that. Contexts, protection domains and completion queues are cheap to
//! clone: clones are the same object, destroyed with the last of them. All may be used from several
//! threads, as libibverbs permits.
//!
//! What another library made is wrapped by the `from_raw` of its type and never destroyed here.

mod batch;
mod completion;
mod context;
mod cq;
mod device;
mod endpoint;
mod pd;
mod qp;
mod work;

use std::ffi::c_int;
use std::io;

pub(crate) use batch::{RecvBatch, SendBatch};
pub use completion::{Completion, CompletionStatus};
pub use context::{Context, Limits, Port};
pub use cq::CompletionQueue;
pub use device::{Device, devices};
pub use endpoint::Endpoint;
pub use pd::ProtectionDomain;
pub use qp::{QueuePair, QueuePairOptions};
pub use work::{Opcode, Operation, Sge};

/// The answer of a verb that returns 0 or an errno (some return -1 and set errno).
fn check(code: c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
