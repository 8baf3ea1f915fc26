//! Connections by IP address.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dmabuf_rdma::{Connection as Inner, ConnectionOptions, Worker as InnerWorker, cm};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::access::name;
use crate::connection::{Connection, NOTHING, Worker};
use crate::detached::Detached;
use crate::domain::Domain;
use crate::error::{Failed, Result};
use crate::options;
use crate::time::{duration, end_of, interruptible, until};
use crate::wake::{Polled, Wakes};

/// The address of an interface: any port of it, unless one is named.
fn source_address(argument: &Bound<'_, PyAny>) -> Result<SocketAddr> {
    match argument.extract::<String>().map(|text| text.parse::<IpAddr>()) {
        Ok(Ok(host)) => Ok((host, 0).into()),
        _ => address(argument),
    }
}

/// `host:port`, or a tuple of both.
fn address(argument: &Bound<'_, PyAny>) -> Result<SocketAddr> {
    let found = if let Ok((host, port)) = argument.extract::<(String, u16)>() {
        argument.py().detach(|| (host.as_str(), port).to_socket_addrs().map(|mut all| all.next()))
    } else if let Ok(text) = argument.extract::<String>() {
        argument.py().detach(|| text.to_socket_addrs().map(|mut all| all.next()))
    } else {
        return Err(Failed::wrong_type(format!(
            "an address is \"host:port\" or (host, port), not {}",
            name(argument)
        )));
    };
    let text = argument.str()?;
    match found {
        Ok(Some(address)) => Ok(address),
        Ok(None) => Err(Failed::misuse(format!("{text} has no address"))),
        Err(error) => Err(Failed::misuse(format!("{text} is no address of a host and a port: {error}"))),
    }
}

/// Where a connection is made: a domain or a worker.
enum Place {
    Domain(Py<Domain>),
    Worker(InnerWorker, Py<Domain>),
}

impl Place {
    fn of(argument: &Bound<'_, PyAny>) -> Result<Self> {
        if let Ok(domain) = argument.cast::<Domain>() {
            return Ok(Self::Domain(domain.clone().unbind()));
        }
        if let Ok(worker) = argument.cast::<Worker>() {
            let this = worker.get();
            return Ok(Self::Worker((*this.inner).clone(), this.domain.clone_ref(argument.py())));
        }
        Err(Failed::wrong_type(format!(
            "a connection is made on a Domain or a Worker, not {}",
            name(argument)
        )))
    }

    fn connection(&self, options: ConnectionOptions) -> Result<Inner> {
        Ok(match self {
            Self::Domain(domain) => Inner::new(&domain.get().domain, options)?,
            Self::Worker(worker, _) => worker.connection(options)?,
        })
    }

    fn domain(&self, py: Python<'_>) -> Py<Domain> {
        match self {
            Self::Domain(domain) | Self::Worker(_, domain) => domain.clone_ref(py),
        }
    }
}

/// Connects to a listener by IP address: `connect("192.0.2.1:7471")`.
///
/// `on` is the `Domain` or `Worker` on which to make the connection; by default a new domain on the device of the route,
/// `connection.domain`. `private_data` goes to the listener (52 bytes, 48 with notifications), and its answer is
/// `connection.private_data`. `source` is the IP address of this host to use. `timeout` is in seconds. The options are those
/// that `Connection` describes.
///
/// In asyncio use `connect_async`.
#[pyfunction]
#[pyo3(
    signature = (address, on = None, private_data = NOTHING, *, source = None, timeout = 30.0, **options),
    text_signature = "(address, on=None, private_data=b'', *, source=None, timeout=30.0, **options)"
)]
pub fn connect(
    py: Python<'_>,
    address: &Bound<'_, PyAny>,
    on: Option<&Bound<'_, PyAny>>,
    private_data: &[u8],
    source: Option<&Bound<'_, PyAny>>,
    timeout: f64,
    options: Option<&Bound<'_, PyDict>>,
) -> Result<Connection> {
    let (address, source) = (self::address(address)?, source.map(source_address).transpose()?);
    let (timeout, options) = (duration(timeout)?, options::connection(options)?);
    let place = on.map(Place::of).transpose()?;
    let data = private_data.to_vec();
    let (connection, domain, reply) = interruptible(py, move || {
        let outgoing = cm::Outgoing::resolve(address, source, timeout)?;
        let place = match place {
            Some(place) => place,
            None => {
                let domain = Domain::open(Some(&outgoing.device_name()))?;
                let ended = || Failed::misuse("Python ended while it connected");
                Place::Domain(Python::try_attach(|py| Py::new(py, domain)).ok_or_else(ended)??)
            }
        };
        let mut connection = place.connection(options)?;
        let reply = outgoing.connect(&mut connection, &data, timeout)?;
        Ok((connection, place, reply))
    })?;
    Ok(Connection::new(connection, domain.domain(py), reply))
}

/// Listens for connection requests: `Listener("192.0.2.1:7471")`. An unspecified address such as "0.0.0.0:7471" stands for
/// all devices, and port 0 for a free port.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Listener {
    inner: Detached<cm::Listener>,
}

#[pymethods]
impl Listener {
    #[new]
    fn new(address: &Bound<'_, PyAny>) -> Result<Self> {
        let address = self::address(address)?;
        Ok(Self { inner: address_bound(address)?.into() })
    }

    /// Host and port, with the port that was chosen.
    #[getter]
    fn address(&self) -> (String, u16) {
        let address = self.inner.local_addr();
        (address.ip().to_string(), address.port())
    }

    /// Waits for the next connection request. In asyncio use `accept_async`.
    #[pyo3(signature = (timeout = None))]
    fn accept(&self, py: Python<'_>, timeout: Option<f64>) -> Result<Incoming> {
        let (end, inner) = (end_of(timeout)?, &*self.inner);
        let accepted = until(py, end, |limit| match inner.accept_request(limit) {
            Err(cm::Error::Timeout { .. }) => Ok(None),
            accepted => Ok(Some(accepted?)),
        })?;
        match accepted {
            Some(incoming) => Ok(Incoming::new(incoming)),
            None => Err(cm::Error::Timeout {
                step: "receive a request",
                address: self.inner.local_addr(),
                timeout: duration(timeout.unwrap_or_default())?,
            }
            .into()),
        }
    }

    /// The next connection request if there is one; else `None`. The descriptor is readable while there may be.
    fn try_accept(&self) -> Result<Option<Incoming>> {
        Ok(self.inner.try_accept_request()?.map(Incoming::new))
    }

    /// For asyncio: waits for the next connection request.
    fn accept_async<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("dmabuf_rdma._aio")?.getattr("wait")?.call1((slf,))
    }

    /// Its descriptor, which is readable when a request has come.
    fn fileno(&self) -> i32 {
        self.inner.as_fd().as_raw_fd()
    }

    fn _poll(&self, _wakes: &Bound<'_, Wakes>, _token: u64) -> Polled<Incoming> {
        Ok(self.try_accept()?.map(|incoming| (incoming,)))
    }

    fn _cancelled(&self) {}

    fn _driver(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.Listener on {}>", self.inner.local_addr())
    }
}

fn address_bound(address: SocketAddr) -> Result<cm::Listener> {
    Ok(cm::Listener::bind(address)?)
}

/// A connection request. `accept` it; dropping it rejects it.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Incoming {
    /// `None` after it was accepted or rejected.
    inner: Mutex<Option<cm::Incoming>>,
    device: String,
    peer: SocketAddr,
    private_data: Vec<u8>,
}

impl Incoming {
    fn new(inner: cm::Incoming) -> Self {
        let (device, peer, private_data) =
            (inner.device_name(), inner.peer_addr(), inner.private_data().to_vec());
        Self { inner: Mutex::new(Some(inner)), device, peer, private_data }
    }

    fn take(&self) -> Result<cm::Incoming> {
        let taken = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.ok_or_else(|| Failed::misuse("this request was accepted or rejected already"))
    }
}

#[pymethods]
impl Incoming {
    /// The device that received the request: make the `Domain` on it.
    #[getter]
    fn device(&self) -> &str {
        &self.device
    }

    /// Host and port of the peer.
    #[getter]
    fn peer(&self) -> (String, u16) {
        (self.peer.ip().to_string(), self.peer.port())
    }

    /// The private data of the request, padded with zeros.
    #[getter]
    fn private_data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.private_data)
    }

    /// Accepts the request with a connection on a `Domain` or `Worker` of its device. `private_data` goes to the peer (192
    /// bytes, 188 with notifications). The options are those that `Connection` describes. In asyncio use `accept_async`.
    #[pyo3(
        signature = (on, private_data = NOTHING, *, timeout = 30.0, **options),
        text_signature = "($self, on, private_data=b'', *, timeout=30.0, **options)"
    )]
    fn accept(
        &self,
        on: &Bound<'_, PyAny>,
        private_data: &[u8],
        timeout: f64,
        options: Option<&Bound<'_, PyDict>>,
    ) -> Result<Connection> {
        let (py, place) = (on.py(), Place::of(on)?);
        let (timeout, options): (Duration, _) = (duration(timeout)?, options::connection(options)?);
        let data = private_data.to_vec();
        let incoming = self.take()?;
        let (connection, place) = interruptible(py, move || {
            let mut connection = place.connection(options)?;
            incoming.accept(&mut connection, &data, timeout)?;
            Ok((connection, place))
        })?;
        Ok(Connection::new(connection, place.domain(py), self.private_data.clone()))
    }

    /// Rejects the request with up to 148 bytes of private data.
    #[pyo3(signature = (private_data = NOTHING), text_signature = "($self, private_data=b'')")]
    fn reject(&self, private_data: &[u8]) -> Result<()> {
        Ok(self.take()?.reject(private_data)?)
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.Incoming from {} on {}>", self.peer, self.device)
    }
}
