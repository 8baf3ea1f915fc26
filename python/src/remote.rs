//! Memory and queue pairs of a peer: what peers send each other.

use dmabuf_rdma::mr::{self, RemoteRun, RemoteSlice};
use dmabuf_rdma::verbs;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple, PyType};

use crate::access;
use crate::error::Result;
use crate::integers::Integers;
use crate::region::{block, byte_range, ranges, select};

/// The description of registered memory that a peer needs to access it, from `Region.remote()`.
///
/// It is plain data: `bytes(remote)` gives a stable form of 32 bytes and 20 for each run, the same for Rust, C and Python.
/// It is picklable too. `remote[a:b]` is a byte range. The key in it permits its whole registration, and is only as
/// secret as the channel that carries it.
#[pyclass(frozen, eq, module = "dmabuf_rdma")]
#[derive(PartialEq)]
pub struct RemoteRegion {
    region: mr::RemoteRegion,
    /// The range of it.
    pub slice: RemoteSlice,
    start: u64,
}

impl RemoteRegion {
    pub fn whole(region: mr::RemoteRegion) -> Self {
        Self { slice: (&region).into(), region, start: 0 }
    }

    /// The description of the range alone.
    fn described(&self) -> Result<mr::RemoteRegion> {
        if self.start == 0 && self.slice.len() == self.region.len() {
            return Ok(self.region.clone());
        }
        let (mut skip, mut left, mut runs) = (self.start, self.slice.len(), Vec::new());
        for run in self.region.runs() {
            let from = skip.min(run.length);
            let length = (run.length - from).min(left);
            skip -= from;
            left -= length;
            if length > 0 {
                runs.push(RemoteRun { iova: dma_sg::Iova(run.iova.0 + from), length, rkey: run.rkey });
            }
        }
        Ok(mr::RemoteRegion::new(runs, self.region.access(), self.region.buffer())?)
    }
}

#[pymethods]
impl RemoteRegion {
    /// Parses the bytes of one description, which may come from an untrusted peer.
    #[staticmethod]
    fn from_bytes(data: &[u8]) -> Result<Self> {
        Ok(Self::whole(mr::RemoteRegion::from_bytes(data)?))
    }

    /// Parses a description at the start of `data`, and returns it with the bytes after it: private data comes padded.
    #[staticmethod]
    fn split_from<'py>(py: Python<'py>, data: &[u8]) -> Result<(Self, Bound<'py, PyBytes>)> {
        let (region, rest) = mr::RemoteRegion::split_from(data)?;
        Ok((Self::whole(region), PyBytes::new(py, rest)))
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.described()?.to_bytes()))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> Result<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        reduce(slf.get_type(), slf.get().__bytes__(slf.py())?)
    }

    /// Length in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.slice.len()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.slice.len())?)
    }

    /// The access flags, as the peer states them.
    #[getter]
    fn access<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        access::to_python(py, self.slice.access())
    }

    fn __getitem__(&self, range: &Bound<'_, PyAny>) -> Result<Self> {
        let (start, end) = byte_range(range, self.slice.len())?;
        let slice = self.slice.slice(start..end)?;
        Ok(Self { slice, region: self.region.clone(), start: self.start + start })
    }

    /// A table of `count` blocks of `length` bytes, each `stride` bytes after the one before.
    #[pyo3(signature = (length, stride, count))]
    fn strided(&self, length: u64, stride: u64, count: usize) -> Result<RemoteBlocks> {
        self.table(self.slice.strided(length, stride, count)?)
    }

    /// A table of blocks of `length` bytes at these offsets in bytes: an array of integers, or an iterable of them.
    #[pyo3(signature = (length, offsets))]
    fn blocks(&self, length: u64, offsets: &Bound<'_, PyAny>) -> Result<RemoteBlocks> {
        let offsets = Integers::of(offsets, "offsets")?;
        self.table(offsets.with("offsets", |numbers| self.slice.blocks(length, numbers))?)
    }

    /// A table of blocks of different lengths: block `i` is `remote[starts[i]:stops[i]]`.
    #[pyo3(signature = (starts, stops))]
    fn ranges(&self, starts: &Bound<'_, PyAny>, stops: &Bound<'_, PyAny>) -> Result<RemoteBlocks> {
        self.table(ranges(starts, stops, |ranges| self.slice.ranges(ranges))?)
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.RemoteRegion of {} bytes, {:?}>", self.slice.len(), self.slice.access())
    }
}

impl RemoteRegion {
    fn table(&self, table: mr::Blocks<RemoteSlice>) -> Result<RemoteBlocks> {
        Ok(RemoteBlocks { table, region: self.region.clone() })
    }
}

/// Blocks of a peer's memory, from `RemoteRegion.strided`, `blocks` or `ranges`.
///
/// `bytes(table)` is its form without the memory's description: 48 bytes for a strided table, and 8 or 16 more for each
/// block of another. `RemoteBlocks.from_bytes(remote, data)` checks that both belong together. A pickle has both.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct RemoteBlocks {
    pub table: mr::Blocks<RemoteSlice>,
    region: mr::RemoteRegion,
}

#[pymethods]
impl RemoteBlocks {
    /// Parses the bytes of a table in this memory of the peer, which may come from an untrusted peer.
    #[staticmethod]
    fn from_bytes(memory: &Bound<'_, RemoteRegion>, data: &[u8]) -> Result<Self> {
        let region = memory.get().described()?;
        Ok(Self { table: mr::Blocks::from_bytes(&region, data)?, region })
    }

    /// The blocks with these indices, in this order: an array of integers, or an iterable. An index may repeat.
    fn select(&self, indices: &Bound<'_, PyAny>) -> Result<Self> {
        Ok(Self { table: select(&self.table, indices)?, region: self.region.clone() })
    }

    /// Total length of the blocks in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.table.len()
    }

    fn __len__(&self) -> usize {
        self.table.count()
    }

    /// Offset and length in bytes of a block.
    fn __getitem__(&self, index: isize) -> PyResult<(u64, u64)> {
        block(&self.table, index)
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.table.to_bytes())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> Result<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let (py, this) = (slf.py(), slf.get());
        let memory = Bound::new(py, RemoteRegion::whole(this.region.clone()))?;
        let from = slf.get_type().getattr("from_bytes")?;
        Ok((from, PyTuple::new(py, [memory.into_any(), this.__bytes__(py).into_any()])?))
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.RemoteBlocks: {} blocks, {} bytes>", self.table.count(), self.table.len())
    }
}

fn reduce<'py>(
    class: Bound<'py, PyType>,
    bytes: Bound<'py, PyBytes>,
) -> Result<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
    let py = class.py();
    Ok((class.getattr("from_bytes")?, PyTuple::new(py, [bytes])?))
}

/// The description of a connection's queue pair that the peer needs to connect, from `Connection.endpoint`.
///
/// It is plain data of 44 bytes, `bytes(endpoint)`, and picklable: send it by any means.
#[pyclass(frozen, eq, module = "dmabuf_rdma")]
#[derive(PartialEq)]
pub struct Endpoint(pub verbs::Endpoint);

#[pymethods]
impl Endpoint {
    /// Parses the bytes, which may come from an untrusted peer.
    #[staticmethod]
    fn from_bytes(data: &[u8]) -> Result<Self> {
        Ok(Self(verbs::Endpoint::from_bytes(data)?))
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> Result<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        reduce(slf.get_type(), slf.get().__bytes__(slf.py()))
    }

    /// Number of the queue pair, which tells a worker's notifications apart.
    #[getter]
    fn qp_num(&self) -> u32 {
        self.0.qp_num
    }

    /// The IP address in its GID on RoCE, as text; else `None`.
    #[getter]
    fn address(&self) -> Option<String> {
        self.0.address().map(|address| address.to_string())
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.Endpoint of queue pair {}>", self.0.qp_num)
    }
}
