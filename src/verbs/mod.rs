//! RDMA devices, protection domains, completion queues and queue pairs: the objects of libibverbs.
//!
//! [`Device::open`] returns a [`Context`]. A [`ProtectionDomain`], [`CompletionQueue`]s and [`QueuePair`]s are
//! created in it. Contexts, protection domains, completion queues and [`DmaHandle`]s are handles: clones share one
//! object, and dropping the last clone destroys it. An object holds its parents, so values may be dropped in any
//! order. All of them may be used from several threads at once.
//!
//! Most programs need only a context and a protection domain from here, and transfer with a
//! [`Connection`](crate::transfer::Connection). Queue pairs and [`Operation`]s are the layer below, for programs
//! that post their own work requests.
//!
//! # Raw objects
//!
//! `from_raw` wraps an object that another library created and never destroys it. `as_raw` returns the libibverbs
//! pointer of an object, for calls that this crate lacks. [`Sge::from_raw`] wraps a scatter/gather element, and a
//! [`Completion`] converts from `ibv_wc`. These have the types of `ibverbs-sys`, which is re-exported as [`ffi`];
//! nothing else here does.
//!
//! # Providers without locks
//!
//! That any thread may use an object relies on the provider's locks. Providers leave them out for:
//!
//! - a completion queue that was created with `IBV_CREATE_CQ_ATTR_SINGLE_THREADED`;
//! - a queue pair or completion queue in a parent domain with a thread domain (`ibv_alloc_td`);
//! - everything of mlx5, if the environment has `MLX5_SINGLE_THREADED=1`. mlx5 then aborts the process if it notices
//!   a second thread. Do not set the variable for a program that uses this crate from several threads.
//!
//! Who passes such an object to `from_raw` ensures that only one thread at a time uses it, its clones, and the
//! objects created from them.

pub use ibverbs_sys as ffi;

pub(crate) mod absence;
mod batch;
mod completion;
mod context;
mod cq;
mod device;
mod dma_handle;
mod endpoint;
mod error;
mod event;
mod events;
mod fabric;
mod gid;
mod options;
mod pd;
mod post;
mod qp;
mod request;
mod srq;
mod transition;
mod work;

use std::ffi::c_int;
use std::io;

pub(crate) use batch::{RecvBatch, SendBatch};
pub use completion::{Completion, CompletionStatus};
pub use context::{Context, Limits, Port};
pub use cq::CompletionQueue;
pub use device::{Device, devices};
pub use dma_handle::{DmaHandle, DmaHandleOptions};
pub use endpoint::Endpoint;
pub use error::Error;
pub use event::AsyncEvent;
pub use events::AsyncEvents;
pub(crate) use events::{Concerns, Inbox};
pub(crate) use fabric::Fabric;
pub use gid::GidEntry;
pub use options::QueuePairOptions;
pub(crate) use pd::DomainId;
pub use pd::ProtectionDomain;
pub use qp::QueuePair;
pub use request::WorkRequest;
pub(crate) use srq::SharedReceiveQueue;
pub(crate) use transition::Depth;
pub use work::{Lkey, Opcode, Operation, RemoteAddr, Rkey, Sge};

pub(crate) use error::{Result, vendor};

/// Checks the result of a verb that returns 0 or an errno. Some return -1 and set errno instead, and siw's post
/// returns the negative errno.
fn check(code: c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        errno => Err(io::Error::from_raw_os_error(errno.saturating_abs())),
    }
}

#[cfg(test)]
pub(crate) use qp::tests::fake as fake_queue_pair;
