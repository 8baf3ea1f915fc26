//! The native part of the Python package `dmabuf_rdma`; `python/dmabuf_rdma` has the rest.
//!
//! Each class wraps a type of the library of the same name. Calls that wait, register or deregister release the GIL.
//! Nothing here takes the GIL while it holds a lock of the library: a waker only notes a number ([`wake`]), and a Python
//! object that is dropped elsewhere is released by the next thread that has the GIL.

mod access;
mod buffer;
mod cm;
mod connection;
mod detached;
mod dlpack;
mod domain;
mod error;
mod integers;
mod notifications;
mod options;
mod region;
mod remote;
mod source;
mod time;
mod transfer;
mod wake;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    use super::*;

    #[pymodule_export]
    use super::buffer::{CpuAccess, DmaBuf, HostBuffer, dumb_buffer, heap, udmabuf};
    #[pymodule_export]
    use super::cm::{Incoming, Listener, connect};
    #[pymodule_export]
    use super::connection::{Connection, Worker};
    #[pymodule_export]
    use super::domain::{Domain, devices, gauges};
    #[pymodule_export]
    use super::notifications::{Arrival, Driver, Notification, Notifications};
    #[pymodule_export]
    use super::region::{Blocks, Region};
    #[pymodule_export]
    use super::remote::{Endpoint, RemoteBlocks, RemoteRegion};
    #[pymodule_export]
    use super::transfer::Transfer;
    #[pymodule_export]
    use super::wake::Wakes;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
