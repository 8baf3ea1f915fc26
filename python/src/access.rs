//! Access flags: `dmabuf_rdma.Access`, or none.

use dmabuf_rdma::Access;
use pyo3::prelude::*;

use crate::error::{Failed, Result};

/// The flags of an argument: an `Access`, an `int`, or `None`.
pub fn of(argument: Option<&Bound<'_, PyAny>>) -> Result<Access> {
    let Some(argument) = argument else { return Ok(Access::empty()) };
    let bits: u32 = argument.extract().map_err(|_| {
        Failed::wrong_type(format!("access takes flags of dmabuf_rdma.Access, not {}", name(argument)))
    })?;
    Ok(Access::from_bits_retain(bits))
}

/// The flags as an `Access`.
pub fn to_python(py: Python<'_>, access: Access) -> PyResult<Bound<'_, PyAny>> {
    py.import("dmabuf_rdma._access")?.getattr("Access")?.call1((access.bits(),))
}

/// The name of an object's type, for a message.
pub fn name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().fully_qualified_name().map_or_else(|_| "an object".into(), |name| name.to_string())
}
