//! Exceptions, one class for each kind of error, in Python's words.

use dmabuf_rdma::{cm, dmabuf, exporter, host, mr, transfer, verbs};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyType;

pub type Result<T, E = Failed> = std::result::Result<T, E>;

/// What becomes an exception.
pub enum Failed {
    Library(Box<dmabuf_rdma::Error>),
    /// Of a kind, found here.
    Here(&'static str, String, &'static str),
    Python(PyErr),
}

impl Failed {
    /// Arguments that cannot work.
    pub fn misuse(message: impl Into<String>) -> Self {
        let kind = dmabuf_rdma::ErrorKind::Misuse;
        Self::Here("Misuse", message.into(), kind.hint())
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::Here("Unsupported", message.into(), dmabuf_rdma::ErrorKind::Unsupported.hint())
    }

    pub fn permission(message: impl Into<String>) -> Self {
        Self::Here("Permission", message.into(), dmabuf_rdma::ErrorKind::Permission.hint())
    }

    pub fn timeout(message: impl Into<String>) -> Self {
        Self::Here("Timeout", message.into(), dmabuf_rdma::ErrorKind::Timeout.hint())
    }

    pub fn wrong_type(message: impl Into<String>) -> Self {
        Self::Python(PyTypeError::new_err(message.into()))
    }
}

impl From<PyErr> for Failed {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

macro_rules! from_library {
    ($($error:ty),*) => {
        $(impl From<$error> for Failed {
            fn from(error: $error) -> Self {
                Self::Library(Box::new(error.into()))
            }
        })*
    };
}

from_library!(
    dmabuf_rdma::Error,
    dma_sg::RangeError,
    dmabuf::Error,
    exporter::Error,
    exporter::PointerError,
    host::Error,
    verbs::Error,
    mr::RegisterError,
    mr::SetError,
    mr::SelfCheckError,
    mr::SliceError,
    transfer::Error,
    cm::Error
);

impl From<Failed> for PyErr {
    fn from(failed: Failed) -> Self {
        let (kind, message, errno, hint) = match &failed {
            // Debug prints the message with its causes.
            Failed::Library(error) => {
                (format!("{:?}", error.kind()), format!("{error:?}"), error.errno(), error.hint())
            }
            Failed::Here(kind, message, hint) => (kind.to_string(), message.clone(), None, *hint),
            Failed::Python(_) => {
                let Failed::Python(error) = failed else { unreachable!("matched above") };
                return error;
            }
        };
        Python::attach(|py| {
            let made = py.import("dmabuf_rdma._errors").and_then(|errors| {
                let class = errors.getattr("of_kind")?.call1((kind,))?.cast_into::<PyType>()?;
                class.call1((message, errno, hint))
            });
            made.map_or_else(|error| error, PyErr::from_value)
        })
    }
}
