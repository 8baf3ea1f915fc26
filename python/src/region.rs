//! Registered memory and tables of its blocks.

use std::ops::Range;

use dmabuf_rdma::mr::{self, MemoryRegion, RegionSlice};
use pyo3::prelude::*;
use pyo3::types::PySlice;

use crate::access;
use crate::buffer::DmaBuf;
use crate::detached::Detached;
use crate::error::{Failed, Result};
use crate::integers::Integers;
use crate::remote::RemoteRegion;
use crate::source::Source;

/// A byte range of registered memory, from `Domain.register`.
///
/// A region is a handle: slices, tables and transfers of it hold the memory, and so does the region the object that was
/// registered. The device may use the memory until the last of them is gone; then it is deregistered.
///
/// `region[a:b]` is a slice in bytes. `len(region)` and `nbytes` are its length.
///
///     region = domain.register(array, rdma.Access.REMOTE)
///     connection.write(region[:4096], remote[4096:8192]).wait()
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Region {
    pub slice: Detached<RegionSlice>,
    /// Address of its first byte in this process, or for the GPU.
    address: Option<u64>,
    /// A dma-buf that may have an address here once it is mapped, and the slice's offset in it.
    source: Option<(Py<DmaBuf>, u64)>,
}

impl Region {
    pub fn new(slice: RegionSlice, address: Option<u64>) -> Self {
        Self { slice: slice.into(), address, source: None }
    }

    pub fn of_dmabuf(slice: RegionSlice, source: Py<DmaBuf>) -> Self {
        Self { slice: slice.into(), address: None, source: Some((source, 0)) }
    }

    fn address(&self) -> Option<u64> {
        let mapped =
            || self.source.as_ref().and_then(|(source, offset)| Some(source.get().address()? + offset));
        self.address.or_else(mapped)
    }
}

/// Start and end of `object[range]`, for an object of `length` bytes.
pub fn byte_range(range: &Bound<'_, PyAny>, length: u64) -> Result<(u64, u64)> {
    let slice = range.cast::<PySlice>().map_err(|_| {
        Failed::wrong_type(
            "a region has byte ranges and no elements: write region[a:b], with bytes, not region[i]",
        )
    })?;
    let indices = slice.indices(isize::try_from(length).unwrap_or(isize::MAX))?;
    if indices.step != 1 {
        return Err(Failed::misuse(format!(
            "a slice with step {} has gaps: use strided(length, stride, count) for blocks at equal distances",
            indices.step
        )));
    }
    // Python cuts a range at both ends. Here it would transfer fewer bytes than were asked for.
    let place = |at: &Bound<'_, PyAny>, otherwise: u64| {
        if at.is_none() {
            return Some(otherwise);
        }
        let at = at.extract::<i64>().ok()?;
        let at = if at < 0 { length.checked_add_signed(at)? } else { at as u64 };
        (at <= length).then_some(at)
    };
    let (start, end) = (slice.getattr("start")?, slice.getattr("stop")?);
    match (place(&start, 0), place(&end, length)) {
        (Some(start), Some(end)) if start < end => Ok((start, end)),
        _ => Err(Failed::misuse(format!(
            "the range [{}:{}] is empty or not inside the {length} bytes",
            start.str()?,
            end.str()?
        ))),
    }
}

#[pymethods]
impl Region {
    /// Length in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.slice.len()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.slice.len())?)
    }

    /// The access flags, as `Access`.
    #[getter]
    fn access<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        access::to_python(py, self.slice.access())
    }

    /// The path into the kernel that the registration took: "Verbs", "Uverbs", "HostMemory", …
    #[getter]
    fn path(&self) -> String {
        self.slice.region().path().to_string()
    }

    /// A byte range of the region.
    fn __getitem__(&self, py: Python<'_>, range: &Bound<'_, PyAny>) -> Result<Self> {
        let (start, end) = byte_range(range, self.slice.len())?;
        let source = self.source.as_ref().map(|(source, offset)| (source.clone_ref(py), offset + start));
        let slice = self.slice.slice(start..end)?;
        Ok(Self { slice: slice.into(), address: self.address.map(|address| address + start), source })
    }

    /// The description that a peer needs to access the region.
    fn remote(&self) -> RemoteRegion {
        RemoteRegion::whole(self.slice.remote())
    }

    /// A table of `count` blocks of `length` bytes, each `stride` bytes after the one before.
    #[pyo3(signature = (length, stride, count))]
    fn strided(&self, length: u64, stride: u64, count: usize) -> Result<Blocks> {
        Ok(Blocks(self.slice.strided(length, stride, count)?.into()))
    }

    /// A table of blocks of `length` bytes at these offsets in bytes: an array of integers, or an iterable of them.
    #[pyo3(signature = (length, offsets))]
    fn blocks(&self, length: u64, offsets: &Bound<'_, PyAny>) -> Result<Blocks> {
        let offsets = Integers::of(offsets, "offsets")?;
        Ok(Blocks(offsets.with("offsets", |numbers| self.slice.blocks(length, numbers))?.into()))
    }

    /// A table of blocks of different lengths: block `i` is `region[starts[i]:stops[i]]`.
    #[pyo3(signature = (starts, stops))]
    fn ranges(&self, starts: &Bound<'_, PyAny>, stops: &Bound<'_, PyAny>) -> Result<Blocks> {
        ranges(starts, stops, |ranges| self.slice.ranges(ranges)).map(|table| Blocks(table.into()))
    }

    /// The elements of a view of the registered array as blocks, in C order: `region.blocks_of(array[:, 16:32])`.
    ///
    /// Neighbours in the last dimensions are one block.
    fn blocks_of(&self, view: &Bound<'_, PyAny>) -> Result<Blocks> {
        let base = self.address().ok_or_else(|| {
            Failed::misuse(
                "this region's memory has no address here: register the array, or map the dma-buf first",
            )
        })?;
        let source = Source::of(view)?;
        let (length, offsets) = source.blocks(base, self.slice.len())?;
        Ok(Blocks(self.slice.blocks(length, offsets)?.into()))
    }

    /// Puts regions one after the other, as one region. All are of one `Domain`.
    #[staticmethod]
    fn concat(regions: Vec<Bound<'_, Self>>) -> Result<Self> {
        let slice = RegionSlice::concat(regions.iter().map(|region| &*region.get().slice))?;
        Ok(Self::new(slice, None))
    }

    /// Sends bytes through the memory, at the first and last byte of each of its registrations: some memory registers and
    /// does not transfer. Nothing else may use these bytes meanwhile.
    fn self_check(&self, py: Python<'_>) -> Result<()> {
        py.detach(|| self.slice.regions().try_for_each(MemoryRegion::self_check))?;
        Ok(())
    }

    fn __repr__(&self) -> String {
        let (path, access) = (self.slice.region().path(), self.slice.access());
        format!("<dmabuf_rdma.Region of {} bytes, {access:?}, by {path}>", self.slice.len())
    }
}

/// A table of ranges from two arrays, each read in place.
pub fn ranges<M>(
    starts: &Bound<'_, PyAny>,
    stops: &Bound<'_, PyAny>,
    make: impl FnOnce(&mut dyn Iterator<Item = Range<u64>>) -> Result<mr::Blocks<M>, mr::SliceError>,
) -> Result<mr::Blocks<M>> {
    let (starts, stops) = (Integers::of(starts, "starts")?, Integers::of(stops, "stops")?);
    if starts.len() != stops.len() {
        return Err(Failed::misuse(format!(
            "{} starts and {} stops are no ranges",
            starts.len(),
            stops.len()
        )));
    }
    starts.with("starts", |from| {
        stops.with("stops", |to| make(&mut from.zip(to).map(|(start, stop)| start..stop)))
    })
}

/// Blocks of registered memory: pages of a cache, rows of an image, shards of a tensor.
///
/// Make a table once with `Region.strided`, `blocks`, `ranges` or `blocks_of`, and `select` the blocks of each transfer.
/// A transfer of two tables moves block `i` of one to block `i` of the other. `len(table)` counts the blocks.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Blocks(pub Detached<mr::Blocks<RegionSlice>>);

#[pymethods]
impl Blocks {
    /// The blocks with these indices, in this order: an array of integers, or an iterable. An index may repeat.
    fn select(&self, indices: &Bound<'_, PyAny>) -> Result<Self> {
        select(&self.0, indices).map(|table| Self(table.into()))
    }

    /// Total length of the blocks in bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.0.len()
    }

    fn __len__(&self) -> usize {
        self.0.count()
    }

    /// Offset and length in bytes of a block.
    fn __getitem__(&self, index: isize) -> PyResult<(u64, u64)> {
        block(&self.0, index)
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.Blocks: {} blocks, {} bytes>", self.0.count(), self.0.len())
    }
}

pub fn select<M: Clone>(table: &mr::Blocks<M>, indices: &Bound<'_, PyAny>) -> Result<mr::Blocks<M>> {
    let indices = Integers::of(indices, "indices")?;
    let index = |index: u64| usize::try_from(index).unwrap_or(usize::MAX);
    indices.with("indices", |numbers| table.select(numbers.map(index)))
}

pub fn block<M>(table: &mr::Blocks<M>, index: isize) -> PyResult<(u64, u64)> {
    let at = if index < 0 { table.count().checked_add_signed(index) } else { Some(index as usize) };
    let outside =
        || pyo3::exceptions::PyIndexError::new_err(format!("no block {index} of {}", table.count()));
    at.and_then(|at| table.get(at)).ok_or_else(outside)
}
