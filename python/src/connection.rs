//! Connections to peers.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use dmabuf_rdma::mr::{self, RegionSlice, RemoteSlice};
use dmabuf_rdma::{Connection as Inner, Worker as InnerWorker, transfer};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::access::name;
use crate::detached::Detached;
use crate::domain::Domain;
use crate::error::{Failed, Result};
use crate::notifications::Notifications;
use crate::options;
use crate::region::{Blocks, Region};
use crate::remote::{Endpoint, RemoteBlocks, RemoteRegion};
use crate::time::duration;
use crate::transfer::Transfer;
use crate::wake::seconds_until;

/// A payload or private data that is left out.
pub const NOTHING: &[u8] = b"";

/// A reliable connection for any number of transfers in flight.
///
/// Connect it by address (`connect`, `Listener`), or make one with `Domain.connection()`, exchange `bytes(endpoint)` with
/// the peer by any means, and call `connect` on both sides.
///
/// Each operation starts a `Transfer` and returns it: `transfer.wait()` blocks, `await transfer` does not. Transfers are
/// posted and complete in the order in which they were started. Threads and tasks may share a connection.
///
/// Options, all by keyword:
///
/// - `message_size`: bytes of a message, 1 to 1 GiB, default 1 MiB. Both sides of `send` and `recv` need the same.
/// - `window`: messages in flight in each direction, 1 to 65536, default 128; `chain`: messages that are posted at once,
///   default 16.
/// - `busy_poll`: poll instead of sleeping, default False.
/// - `notifications`: receives posted ahead for the peer's notifications, default 0.
/// - `stall_timeout`: seconds without a completed message after which a transfer fails, default 30.
/// - of the queue pair: `port`, `gid_index`, `gid_address`, `pkey`, `traffic_class`, `service_level`, `ack_timeout` (an
///   exponent: 4.096 us * 2**n, default 17), `retry_count`, `rnr_retry`, `rd_atomic`, `max_sge`, `max_inline`.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Connection {
    inner: Detached<Arc<Inner>>,
    domain: Py<Domain>,
    private_data: Vec<u8>,
}

impl Connection {
    pub fn new(inner: Inner, domain: Py<Domain>, private_data: Vec<u8>) -> Self {
        Self { inner: Arc::new(inner).into(), domain, private_data }
    }

    fn start(
        &self,
        timeout: Option<f64>,
        start: impl FnOnce(&Inner) -> Result<transfer::Transfer, transfer::Error>,
    ) -> Result<Transfer> {
        let timeout = timeout.map(duration).transpose()?;
        // Posts, and never waits.
        let mut started = start(&self.inner)?;
        if let Some(timeout) = timeout {
            started = started.timeout(timeout);
        }
        Ok(Transfer::new(started, (*self.inner).clone()))
    }
}

/// Local memory of an argument: a region or a table.
fn local(object: &Bound<'_, PyAny>) -> Result<mr::Blocks<RegionSlice>> {
    if let Ok(region) = object.cast::<Region>() {
        return Ok((&*region.get().slice).into());
    }
    if let Ok(table) = object.cast::<Blocks>() {
        return Ok((*table.get().0).clone());
    }
    Err(Failed::wrong_type(format!(
        "the local side is a Region or Blocks, not {}: register it first, with Domain.register",
        name(object)
    )))
}

/// A peer's memory of an argument: a region or a table.
fn remote(object: &Bound<'_, PyAny>) -> Result<mr::Blocks<RemoteSlice>> {
    if let Ok(region) = object.cast::<RemoteRegion>() {
        return Ok((&region.get().slice).into());
    }
    if let Ok(table) = object.cast::<RemoteBlocks>() {
        return Ok(table.get().table.clone());
    }
    Err(Failed::wrong_type(format!(
        "the remote side is a RemoteRegion or RemoteBlocks, not {}: it comes from the peer's Region.remote()",
        name(object)
    )))
}

#[pymethods]
impl Connection {
    /// The description that the peer needs to connect.
    #[getter]
    fn endpoint(&self) -> Endpoint {
        Endpoint(self.inner.endpoint())
    }

    /// The domain, in which local memory must be registered.
    #[getter]
    fn domain(&self, py: Python<'_>) -> Py<Domain> {
        self.domain.clone_ref(py)
    }

    /// The private data that the peer sent with its reply or request, if it was connected by address, padded with zeros.
    #[getter]
    fn private_data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.private_data)
    }

    /// Connects to the peer's endpoint. The peer must connect to this one too, before either side transfers.
    fn connect(&self, py: Python<'_>, peer: &Bound<'_, Endpoint>) -> Result<()> {
        let peer = peer.get().0;
        Ok(py.detach(|| self.inner.connect(&peer))?)
    }

    /// Writes local bytes into the peer's memory: a region, or each block of a table into the peer's block with the same
    /// index. `timeout` limits the whole transfer, in seconds.
    #[pyo3(signature = (local, remote, timeout = None))]
    fn write(
        &self,
        local: &Bound<'_, PyAny>,
        remote: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> Result<Transfer> {
        let (local, remote) = (self::local(local)?, self::remote(remote)?);
        self.start(timeout, |inner| inner.write(local, remote))
    }

    /// Like `write`, and notifies the peer with `id` (0 to 2**32 - 1) once all bytes are in its memory.
    #[pyo3(signature = (local, remote, id, timeout = None))]
    fn write_notify(
        &self,
        local: &Bound<'_, PyAny>,
        remote: &Bound<'_, PyAny>,
        id: u32,
        timeout: Option<f64>,
    ) -> Result<Transfer> {
        let (local, remote) = (self::local(local)?, self::remote(remote)?);
        self.start(timeout, |inner| inner.write_notify(local, remote, id))
    }

    /// Notifies the peer after everything that was written before, with a payload of up to 64 bytes.
    #[pyo3(
        signature = (id, payload = NOTHING, timeout = None),
        text_signature = "($self, id, payload=b'', timeout=None)"
    )]
    fn notify(&self, id: u32, payload: &[u8], timeout: Option<f64>) -> Result<Transfer> {
        self.start(timeout, |inner| inner.notify(id, payload))
    }

    /// Reads the peer's bytes into local memory, which needs `LOCAL_WRITE`.
    #[pyo3(signature = (local, remote, timeout = None))]
    fn read(
        &self,
        local: &Bound<'_, PyAny>,
        remote: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> Result<Transfer> {
        let (local, remote) = (self::local(local)?, self::remote(remote)?);
        self.start(timeout, |inner| inner.read(local, remote))
    }

    /// Sends a region's bytes to a peer that receives as many.
    #[pyo3(signature = (local, timeout = None))]
    fn send(&self, local: &Bound<'_, Region>, timeout: Option<f64>) -> Result<Transfer> {
        self.start(timeout, |inner| inner.send(&*local.get().slice))
    }

    /// Receives as many bytes as the region has, which needs `LOCAL_WRITE`. Start it before the peer sends.
    ///
    /// A receive that times out or is cancelled before its first message stays posted: call `recv` with the same memory
    /// again to go on with it.
    #[pyo3(signature = (local, timeout = None))]
    fn recv(&self, local: &Bound<'_, Region>, timeout: Option<f64>) -> Result<Transfer> {
        self.start(timeout, |inner| inner.recv(&*local.get().slice))
    }

    /// Adds to a u64 of the peer at a multiple of 8 bytes, and returns its previous value in 8 local bytes.
    #[pyo3(signature = (local, remote, add, timeout = None))]
    fn fetch_add(
        &self,
        local: &Bound<'_, Region>,
        remote: &Bound<'_, RemoteRegion>,
        add: u64,
        timeout: Option<f64>,
    ) -> Result<Transfer> {
        self.start(timeout, |inner| inner.fetch_add(&*local.get().slice, &remote.get().slice, add))
    }

    /// Replaces a u64 of the peer at a multiple of 8 bytes if it equals `compare`, and returns its previous value in 8
    /// local bytes.
    #[pyo3(signature = (local, remote, compare, swap, timeout = None))]
    fn compare_swap(
        &self,
        local: &Bound<'_, Region>,
        remote: &Bound<'_, RemoteRegion>,
        compare: u64,
        swap: u64,
        timeout: Option<f64>,
    ) -> Result<Transfer> {
        let remote = &remote.get().slice;
        self.start(timeout, |inner| inner.compare_swap(&*local.get().slice, remote, compare, swap))
    }

    /// The notifications of the peer.
    #[getter]
    fn notifications(&self) -> Notifications {
        Notifications::of_connection((*self.inner).clone())
    }

    /// Makes what the peer has written into a GPU's memory visible to work that the GPU starts afterwards. Call it after
    /// the notification or the receive.
    fn flush(&self, py: Python<'_>, region: &Bound<'_, Region>) -> Result<()> {
        let slice = &*region.get().slice;
        Ok(py.detach(|| self.inner.flush(slice))?)
    }

    /// Ends the connection: transfers in flight end with an error, and a peer connected by address is told.
    fn disconnect(&self, py: Python<'_>) {
        py.detach(|| self.inner.disconnect());
    }

    /// Whether the connection is connected and has not failed.
    #[getter]
    fn is_usable(&self, py: Python<'_>) -> bool {
        py.detach(|| self.inner.is_usable())
    }

    /// Why the connection is unusable: the first reason; `None` while it is usable.
    #[getter]
    fn failure(&self, py: Python<'_>) -> Option<String> {
        py.detach(|| self.inner.failure().map(str::to_owned))
    }

    /// The descriptor for event loops of your own: call `process_events` when it is readable.
    fn fileno(&self) -> i32 {
        self.inner.as_fd().as_raw_fd()
    }

    /// Makes progress for all transfers. Returns in how many seconds the next timeout expires, or `None`.
    fn process_events(&self) -> Result<Option<f64>> {
        Ok(seconds_until(self.inner.process_events()?))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// Disconnects.
    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyAny>) {
        self.disconnect(py);
    }

    fn __repr__(&self) -> String {
        let (device, number) = (self.inner.domain().context().device_name(), self.inner.endpoint().qp_num);
        format!("<dmabuf_rdma.Connection of queue pair {number} on {device}>")
    }
}

/// Connections that share a completion queue, a descriptor and their notifications, from `Domain.worker()`.
///
/// A server with many clients makes all of their connections on one worker: whoever waits for one makes progress for all,
/// and an event loop watches one descriptor. A notification's `qp_num` is that of the connection's `endpoint`.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Worker {
    pub inner: Detached<InnerWorker>,
    pub domain: Py<Domain>,
}

impl Worker {
    pub fn new(inner: InnerWorker, domain: Py<Domain>) -> Self {
        Self { inner: inner.into(), domain }
    }
}

#[pymethods]
impl Worker {
    /// The domain of its connections.
    #[getter]
    fn domain(&self, py: Python<'_>) -> Py<Domain> {
        self.domain.clone_ref(py)
    }

    /// A connection, with the options that `Connection` describes but `notifications`, which are the worker's.
    #[pyo3(signature = (**options))]
    fn connection(&self, py: Python<'_>, options: Option<&Bound<'_, PyDict>>) -> Result<Connection> {
        let options = options::connection(options)?;
        let connection = py.detach(|| self.inner.connection(options))?;
        Ok(Connection::new(connection, self.domain.clone_ref(py), Vec::new()))
    }

    /// The notifications of all its connections. Each is taken once, here or from the connection.
    #[getter]
    fn notifications(&self) -> Notifications {
        Notifications::of_worker((*self.inner).clone())
    }

    /// The descriptor of all its connections: call `process_events` when it is readable.
    fn fileno(&self) -> i32 {
        self.inner.as_fd().as_raw_fd()
    }

    /// Makes progress for all its connections. Returns in how many seconds the next timeout expires, or `None`.
    fn process_events(&self) -> Result<Option<f64>> {
        Ok(seconds_until(self.inner.process_events()?))
    }
}
