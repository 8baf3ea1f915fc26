//! Options of connections, by keyword.

use std::net::IpAddr;

use dmabuf_rdma::ConnectionOptions;
use dmabuf_rdma::verbs::QueuePairOptions;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{Failed, Result};
use crate::time::duration;

/// The options that a call passed.
pub fn connection(passed: Option<&Bound<'_, PyDict>>) -> Result<ConnectionOptions> {
    let (mut options, mut pair) = (ConnectionOptions::default(), QueuePairOptions::default());
    let Some(passed) = passed else { return Ok(options) };
    for (name, value) in passed {
        let name: String = name.extract()?;
        match name.as_str() {
            "message_size" => options.message_size = extract(&name, &value)?,
            "window" => options.window = extract(&name, &value)?,
            "chain" => options.chain = extract(&name, &value)?,
            "busy_poll" => options.busy_poll = extract(&name, &value)?,
            "notifications" => options.notifications = extract(&name, &value)?,
            "stall_timeout" => options.stall_timeout = duration(extract(&name, &value)?)?,
            "port" => pair.port = extract(&name, &value)?,
            "gid_index" => pair.gid_index = extract(&name, &value)?,
            "gid_address" => {
                let address: Option<String> = extract(&name, &value)?;
                let parse = |text: String| {
                    text.parse::<IpAddr>()
                        .map_err(|_| Failed::misuse(format!("gid_address is an IP address, not {text:?}")))
                };
                pair.gid_address = address.map(parse).transpose()?;
            }
            "pkey" => pair.pkey = extract(&name, &value)?,
            "traffic_class" => pair.traffic_class = extract(&name, &value)?,
            "service_level" => pair.service_level = extract(&name, &value)?,
            "ack_timeout" => pair.timeout = extract(&name, &value)?,
            "retry_count" => pair.retry_count = extract(&name, &value)?,
            "rnr_retry" => pair.rnr_retry = extract(&name, &value)?,
            "rd_atomic" => pair.rd_atomic = extract(&name, &value)?,
            "max_sge" => pair.max_sge = extract(&name, &value)?,
            "max_inline" => pair.max_inline = extract(&name, &value)?,
            _ => {
                return Err(Failed::wrong_type(format!(
                    "a connection has no option {name:?}; it has message_size, window, chain, busy_poll, notifications, \
                     stall_timeout, port, gid_index, gid_address, pkey, traffic_class, service_level, ack_timeout, \
                     retry_count, rnr_retry, rd_atomic, max_sge and max_inline"
                )));
            }
        }
    }
    options.queue_pair = pair;
    Ok(options)
}

fn extract<'a, 'py, T: FromPyObject<'a, 'py>>(name: &str, value: &'a Bound<'py, PyAny>) -> Result<T> {
    value.extract::<T>().map_err(|error| {
        let error: PyErr = error.into();
        Failed::wrong_type(format!("the option {name}: {error}"))
    })
}
