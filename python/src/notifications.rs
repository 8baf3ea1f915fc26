//! What tells that a peer's bytes have come.

use std::future::Future;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use dmabuf_rdma::transfer::{self, Error};
use dmabuf_rdma::{Connection, Worker};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::detached::Detached;
use crate::error::{Failed, Result};
use crate::time::{end_of, until};
use crate::wake::{Polled, Wakes, seconds_until};

/// A notification of a peer: its `id`, its `payload` (bytes, empty after a `write_notify`), and the `qp_num` of the
/// queue pair that received it.
#[pyclass(frozen, get_all, module = "dmabuf_rdma")]
pub struct Notification {
    id: u32,
    payload: Py<PyBytes>,
    qp_num: u32,
}

#[pymethods]
impl Notification {
    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.Notification {} of queue pair {}>", self.id, self.qp_num)
    }
}

fn to_python(py: Python<'_>, taken: transfer::Notification) -> PyResult<Py<Notification>> {
    let payload = PyBytes::new(py, &taken.payload).unbind();
    Py::new(py, Notification { id: taken.id, payload, qp_num: taken.qp_num })
}

/// What makes progress for them.
#[derive(Clone)]
pub enum Of {
    Connection(Arc<Connection>),
    Worker(Worker),
}

impl Of {
    pub fn process(&self) -> Option<Instant> {
        // An error fails the connections, and the next call tells it.
        match self {
            Self::Connection(connection) => connection.process_events(),
            Self::Worker(worker) => worker.process_events(),
        }
        .ok()
        .flatten()
    }

    pub fn fileno(&self) -> i32 {
        match self {
            Self::Connection(connection) => connection.as_fd().as_raw_fd(),
            Self::Worker(worker) => worker.as_fd().as_raw_fd(),
        }
    }
}

/// The notifications that a connection, or any connection of a worker, receives: `connection.notifications`.
///
/// Each comes after all bytes that its sender wrote before, and is taken once. Blocking: `wait`, `take`. In asyncio:
/// `await arrived(id, count)`, `await recv()`, or `async for notification in notifications`. A task that is cancelled takes
/// none.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Notifications {
    inner: Detached<transfer::Notifications>,
    of: Detached<Of>,
}

impl Notifications {
    pub fn of_connection(connection: Arc<Connection>) -> Self {
        Self { inner: connection.notifications().into(), of: Of::Connection(connection).into() }
    }

    pub fn of_worker(worker: Worker) -> Self {
        Self { inner: worker.notifications().into(), of: Of::Worker(worker).into() }
    }

    /// Waits in slices. The error of the last one names the whole time.
    fn sliced<T: Send>(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        wait: impl Fn(&transfer::Notifications, Duration) -> Result<T, Error> + Sync,
    ) -> Result<T> {
        let (end, inner) = (end_of(timeout)?, &*self.inner);
        let mut last = None;
        let taken = until(py, end, |limit| match wait(inner, limit) {
            Ok(taken) => Ok(Some(taken)),
            Err(error @ Error::NotificationTimeout { .. }) => {
                last = Some(error);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        })?;
        match (taken, last) {
            (Some(taken), _) => Ok(taken),
            (None, Some(mut error)) => {
                if let Error::NotificationTimeout { timeout: named, .. } = &mut error {
                    *named = crate::time::duration(timeout.unwrap_or_default())?;
                }
                Err(error.into())
            }
            (None, _) => Err(Failed::timeout("no notification came")),
        }
    }
}

#[pymethods]
impl Notifications {
    /// Waits until `count` notifications of `id` have come, and takes them. After `TimeoutError` none is taken.
    #[pyo3(signature = (id, count = 1, timeout = None))]
    fn wait(&self, py: Python<'_>, id: u32, count: u64, timeout: Option<f64>) -> Result<()> {
        self.sliced(py, timeout, |inner, limit| inner.wait(id, count, limit))
    }

    /// Waits for the next notification, whatever its id, and takes it.
    #[pyo3(signature = (timeout = None))]
    fn take(&self, py: Python<'_>, timeout: Option<f64>) -> Result<Py<Notification>> {
        let taken = self.sliced(py, timeout, |inner, limit| inner.take_timeout(limit))?;
        Ok(to_python(py, taken)?)
    }

    /// The next notification if it has come; else `None`.
    fn try_take(&self, py: Python<'_>) -> Result<Option<Py<Notification>>> {
        Ok(self.inner.try_take()?.map(|taken| to_python(py, taken)).transpose()?)
    }

    /// For asyncio: resolves when `count` notifications of `id` have come, and takes them.
    #[pyo3(signature = (id, count = 1))]
    fn arrived(&self, id: u32, count: u64) -> Arrival {
        let inner = (*self.inner).clone();
        Arrival::new(&self.of, async move {
            inner.arrived(id, count).await?;
            Ok(None)
        })
    }

    /// For asyncio: resolves with the next notification, whatever its id.
    fn recv(&self) -> Arrival {
        let inner = (*self.inner).clone();
        Arrival::new(&self.of, async move { inner.recv().await.map(Some) })
    }

    fn __aiter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// The next notification. The iteration ends when the peer disconnects, and raises any other error.
    fn __anext__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("dmabuf_rdma._aio")?.getattr("next_of")?.call1((slf.get().recv(),))
    }

    /// The descriptor of its connection or worker.
    fn fileno(&self) -> i32 {
        self.of.fileno()
    }
}

type Future_ = Pin<Box<dyn Future<Output = Result<Option<transfer::Notification>, Error>> + Send>>;

/// What an event loop watches for those that wait: it holds a connection or a worker, and no transfer.
#[pyclass(frozen, module = "dmabuf_rdma._native")]
pub struct Driver(pub Detached<Of>);

#[pymethods]
impl Driver {
    fn fileno(&self) -> i32 {
        self.0.fileno()
    }

    /// Makes progress. Returns in how many seconds the next timeout expires, or `None`.
    fn process(&self) -> Option<f64> {
        seconds_until(self.0.process())
    }
}

/// Notifications to come, to be awaited once.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Arrival {
    /// `None` after it has resolved.
    future: Mutex<Option<Future_>>,
    of: Detached<Of>,
}

impl Arrival {
    fn new(
        of: &Of,
        future: impl Future<Output = Result<Option<transfer::Notification>, Error>> + Send + 'static,
    ) -> Self {
        Self { future: Mutex::new(Some(Box::pin(future))), of: of.clone().into() }
    }

    fn slot(&self) -> MutexGuard<'_, Option<Future_>> {
        self.future.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Arrival {
    fn __await__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("dmabuf_rdma._aio")?.getattr("wait")?.call1((slf,))?.call_method0("__await__")
    }

    fn _poll(
        &self,
        py: Python<'_>,
        wakes: &Bound<'_, Wakes>,
        token: u64,
    ) -> Polled<Option<Py<Notification>>> {
        let waker = wakes.get().waker(token);
        // Polled outside the lock, since memory of Python may be released meanwhile.
        let Some(mut future) = self.slot().take() else {
            return Err(Failed::misuse(
                "these notifications were awaited already: call arrived or recv again",
            ));
        };
        let Poll::Ready(ended) = future.as_mut().poll(&mut Context::from_waker(&waker)) else {
            *self.slot() = Some(future);
            return Ok(None);
        };
        let taken = ended?.map(|taken| to_python(py, taken)).transpose()?;
        Ok(Some((taken,)))
    }

    /// Leaves those that wait.
    fn _cancelled(&self) {
        let left = self.slot().take();
        drop(left);
    }

    fn _driver(&self) -> Driver {
        Driver((*self.of).clone().into())
    }
}
