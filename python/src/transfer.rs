//! Transfers in flight.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use dmabuf_rdma::{Connection, Transfer as Inner};
use pyo3::prelude::*;

use crate::detached::Detached;
use crate::error::{Failed, Result};
use crate::notifications::{Driver, Of};
use crate::time::{end_of, until};
use crate::wake::{Everyone, Polled, Wakes};

/// A transfer in flight: `wait()` for it, or `await` it in asyncio.
///
/// A transfer holds its memory and its connection. One that is dropped goes on, and its errors are lost. If a task that
/// awaits it is cancelled, so is the transfer: no further message is posted, and the connection stays usable.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Transfer {
    inner: Detached<Inner>,
    connection: Detached<Arc<Connection>>,
    /// The tasks that await it.
    waiting: Arc<Everyone>,
}

impl Transfer {
    pub fn new(inner: Inner, connection: Arc<Connection>) -> Self {
        Self { inner: inner.into(), connection: connection.into(), waiting: Arc::default() }
    }
}

#[pymethods]
impl Transfer {
    /// Waits until the transfer completes, and returns its length in bytes.
    ///
    /// `timeout` in seconds limits only this wait: on `TimeoutError` the transfer goes on, and can be waited for again.
    /// The `timeout` of `write`, `read`, … limits the transfer itself. An exception of a signal handler, such as
    /// KeyboardInterrupt, ends the wait as well.
    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> Result<u64> {
        let end = end_of(timeout)?;
        match until(py, end, |limit| Ok(self.inner.wait_for(limit)?))? {
            Some(transferred) => Ok(transferred.bytes),
            None => Err(Failed::timeout(format!(
                "the transfer of {} bytes has not ended within {} s; it goes on: wait again, or cancel it",
                self.inner.len(),
                timeout.unwrap_or_default()
            ))),
        }
    }

    /// Whether the transfer has ended. Raises its error if it has failed.
    fn done(&self) -> Result<bool> {
        Ok(self.inner.try_wait()?.is_some())
    }

    /// Bytes in messages that have completed.
    #[getter]
    fn progress(&self, py: Python<'_>) -> u64 {
        // Without the GIL, which a thread may need that takes the result.
        py.detach(|| self.inner.progress())
    }

    /// Length in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.inner.len()
    }

    /// Cancels the transfer: no further message is posted, and those in flight complete. Then `wait` raises
    /// `CancelledError`, or returns if these were all.
    fn cancel(&self, py: Python<'_>) {
        py.detach(|| self.inner.cancel());
    }

    fn __await__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("dmabuf_rdma._aio")?.getattr("wait")?.call1((slf,))?.call_method0("__await__")
    }

    fn _poll(&self, wakes: &Bound<'_, Wakes>, token: u64) -> Polled<u64> {
        self.waiting.add(wakes.get().waker(token));
        let waker = Waker::from(self.waiting.clone());
        match Pin::new(&mut &*self.inner).poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(ended) => Ok(Some((ended?.bytes,))),
            Poll::Pending => Ok(None),
        }
    }

    fn _cancelled(&self, py: Python<'_>) {
        self.cancel(py);
    }

    fn _driver(&self) -> Driver {
        Driver(Of::Connection((*self.connection).clone()).into())
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.Transfer of {} bytes>", self.inner.len())
    }
}
