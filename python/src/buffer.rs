//! Buffers to register: host memory and dma-bufs, as memory of Python.
//!
//! `unsafe` is here to lend their memory through the buffer protocol. Devices and threads write it at any time, as with
//! any shared memory of Python; nothing in Rust forms a reference to it.

use std::ffi::c_int;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use dmabuf_rdma::dmabuf::{self, Mapping};
use dmabuf_rdma::exporter::{Allocation, Backing, DmaHeap, DumbBuffers, Exporter, PageKind, Udmabuf};
use dmabuf_rdma::host;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rdma_sys_ext::dma_buf as sys;

use crate::detached::Detached;
use crate::error::{Failed, Result};

/// Lends `length` bytes through the buffer protocol. The view holds `owner`.
///
/// # Safety
/// `view` is the argument of `__getbuffer__`, and the memory lives as long as `owner`.
unsafe fn lend(
    owner: &Bound<'_, PyAny>,
    (start, length, writable): (*mut u8, u64, bool),
    view: *mut ffi::Py_buffer,
    flags: c_int,
) -> PyResult<()> {
    let length = ffi::Py_ssize_t::try_from(length)?;
    // SAFETY: the caller's promise.
    let code = unsafe {
        ffi::PyBuffer_FillInfo(view, owner.as_ptr(), start.cast(), length, (!writable).into(), flags)
    };
    if code == 0 { Ok(()) } else { Err(PyErr::fetch(owner.py())) }
}

/// A numpy array of an object's memory.
fn numpy<'py>(
    object: &Bound<'py, PyAny>,
    dtype: Option<Bound<'py, PyAny>>,
    shape: Option<Bound<'py, PyAny>>,
    offset: u64,
) -> Result<Bound<'py, PyAny>> {
    let py = object.py();
    let numpy = py.import("numpy")?;
    let options = PyDict::new(py);
    options.set_item(
        "dtype",
        dtype.unwrap_or_else(|| "uint8".into_pyobject(py).map_or_else(|e| match e {}, Bound::into_any)),
    )?;
    options.set_item("offset", offset)?;
    if let Some(shape) = &shape {
        let count: i64 = numpy.call_method1("prod", (shape,))?.extract()?;
        options.set_item("count", count)?;
    }
    let array = numpy.call_method("frombuffer", (object,), Some(&options))?;
    match shape {
        Some(shape) => Ok(array.call_method1("reshape", (shape,))?),
        None => Ok(array),
    }
}

/// The kind of pages of an argument.
fn pages(name: &str) -> Result<PageKind> {
    match name {
        "base" => Ok(PageKind::Base),
        "transparent" => Ok(PageKind::Transparent),
        "2M" => Ok(PageKind::HUGE_2M),
        "1G" => Ok(PageKind::HUGE_1G),
        _ => Err(Failed::misuse(format!(
            "pages are \"base\", \"transparent\", \"2M\" or \"1G\", not {name:?}"
        ))),
    }
}

/// Host memory to register: `HostBuffer(nbytes)` is zeroed memory at a page boundary.
///
/// It has the buffer protocol: `buffer.numpy("float32", (rows, columns))`, `memoryview(buffer)`. A view holds the buffer,
/// and so does a region.
///
/// **Who may write when**: the CPU and devices see the same bytes, and nothing orders them but completions. Write bytes
/// before you start the transfer that reads them, and leave them alone until it has ended. Read bytes that a peer writes
/// after a notification or a receive says that they have come. A child of `fork` does not have the memory: an access
/// there ends the process.
///
/// `pages` are "base", "transparent" (huge pages as far as there are free ones), "2M" or "1G" (of the reserved pool).
/// The kernel charges registered host memory to RLIMIT_MEMLOCK.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct HostBuffer(pub Detached<host::HostBuffer>);

#[pymethods]
impl HostBuffer {
    #[new]
    #[pyo3(signature = (nbytes, pages = "base"))]
    fn new(py: Python<'_>, nbytes: u64, pages: &str) -> Result<Self> {
        let pages = self::pages(pages)?;
        Ok(Self(py.detach(|| host::HostBuffer::allocate(nbytes, pages))?.into()))
    }

    /// Maps a file, shared: what a device writes is in the file. `start` and `stop` are a byte range of it. A file is
    /// opened for reading and writing, or with `writable=False` for reading only.
    #[staticmethod]
    #[pyo3(signature = (path, start = 0, stop = None, *, writable = true))]
    fn map_file(
        py: Python<'_>,
        path: PathBuf,
        start: u64,
        stop: Option<u64>,
        writable: bool,
    ) -> Result<Self> {
        let map = || -> Result<_> {
            let file = OpenOptions::new().read(true).write(writable).open(path).map_err(PyErr::from)?;
            Ok(match stop {
                Some(stop) => host::HostBuffer::map_file(file, start..stop)?,
                None => host::HostBuffer::map_file(file, start..)?,
            })
        };
        Ok(Self(py.detach(map)?.into()))
    }

    /// Length in bytes: whole pages.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.0.size()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.0.size())?)
    }

    /// A numpy array of the memory, with `dtype` (default uint8), `shape` (default one dimension) and `offset` in bytes.
    #[pyo3(signature = (dtype = None, shape = None, offset = 0))]
    fn numpy<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        shape: Option<Bound<'py, PyAny>>,
        offset: u64,
    ) -> Result<Bound<'py, PyAny>> {
        numpy(slf.as_any(), dtype, shape, offset)
    }

    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let buffer = &slf.get().0;
        // A child of `fork` does not have it.
        buffer.read(0, &mut [0]).map_err(|error| PyErr::from(Failed::from(error)))?;
        // SAFETY: the memory lives as long as the buffer, and Python passed `view`.
        unsafe { lend(slf.as_any(), (buffer.as_ptr(), buffer.size(), buffer.is_writable()), view, flags) }
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.HostBuffer of {} bytes>", self.0.size())
    }
}

/// A dma-buf: memory of a driver, a kernel heap or a GPU, by its file descriptor.
///
/// `DmaBuf(fd)` duplicates the descriptor. `udmabuf`, `heap` and `dumb_buffer` allocate new ones. It has the buffer
/// protocol: `dmabuf.numpy("float32", (rows, columns))`, `memoryview(dmabuf)`; the first view maps all of it.
///
/// **Who may write when**: as for `HostBuffer`, and in addition read and write only in a bracket of CPU access, which
/// makes the CPU's caches coherent on machines where they are not:
///
///     with dmabuf.cpu_access("rw"):
///         array[:] = 0
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct DmaBuf {
    pub dmabuf: dmabuf::DmaBuf,
    pub backing: Option<Backing>,
    mapping: OnceLock<Mapping>,
}

impl DmaBuf {
    fn of(Allocation { dmabuf, backing }: Allocation) -> Self {
        Self { dmabuf, backing, mapping: OnceLock::new() }
    }

    fn mapped(&self) -> Result<&Mapping> {
        if self.mapping.get().is_none() {
            let mapping = self.dmabuf.map()?;
            // Of two threads, one wins.
            let _ = self.mapping.set(mapping);
        }
        Ok(self.mapping.get().expect("set above"))
    }

    /// Address of the first byte, if it is mapped.
    pub fn address(&self) -> Option<u64> {
        Some(self.mapping.get()?.as_ptr().addr() as u64)
    }
}

#[pymethods]
impl DmaBuf {
    #[new]
    fn new(fd: i32) -> Result<Self> {
        if fd < 0 {
            return Err(dmabuf::Error::BadFd { fd }.into());
        }
        // SAFETY: fcntl takes any number, and refuses one that is not open.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            let error = std::io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EBADF) => dmabuf::Error::BadFd { fd }.into(),
                _ => Failed::Python(error.into()),
            });
        }
        // SAFETY: the descriptor is new, and nobody else has it.
        let owned = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(copy) };
        Ok(Self::of_fd(owned)?)
    }

    /// Length in bytes, a multiple of the page size.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.dmabuf.size()
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.dmabuf.size())?)
    }

    /// The exporter's name as the kernel reports it: "udmabuf", "system", "drm", …
    #[getter]
    fn exporter(&self) -> Result<String> {
        Ok(self.dmabuf.exporter_name()?)
    }

    /// The number of its descriptor, which stays this object's.
    fn fileno(&self) -> i32 {
        self.dmabuf.as_fd().as_raw_fd()
    }

    /// A numpy array of the memory, with `dtype` (default uint8), `shape` (default one dimension) and `offset` in bytes.
    #[pyo3(signature = (dtype = None, shape = None, offset = 0))]
    fn numpy<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        shape: Option<Bound<'py, PyAny>>,
        offset: u64,
    ) -> Result<Bound<'py, PyAny>> {
        numpy(slf.as_any(), dtype, shape, offset)
    }

    /// A bracket of CPU access, for `with`: `mode` is "r", "w" or "rw".
    #[pyo3(signature = (mode = "rw"))]
    fn cpu_access(slf: &Bound<'_, Self>, mode: &str) -> Result<CpuAccess> {
        let access = match mode {
            "r" => dmabuf::CpuAccess::Read,
            "w" => dmabuf::CpuAccess::Write,
            "rw" => dmabuf::CpuAccess::ReadWrite,
            _ => {
                return Err(Failed::misuse(format!("the mode is \"r\", \"w\" or \"rw\", not {mode:?}")));
            }
        };
        if access != dmabuf::CpuAccess::Read && !slf.get().dmabuf.is_writable() {
            return Err(dmabuf::Error::ReadOnly { access: "CPU write access" }.into());
        }
        Ok(CpuAccess { dmabuf: slf.clone().unbind(), access, open: Mutex::new(0) })
    }

    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let mapping = slf.get().mapped()?;
        // SAFETY: the mapping lives as long as this object, and Python passed `view`.
        unsafe { lend(slf.as_any(), (mapping.as_ptr(), mapping.len(), mapping.is_writable()), view, flags) }
    }

    fn __repr__(&self) -> String {
        let exporter = self.dmabuf.exporter_name().unwrap_or_default();
        format!("<dmabuf_rdma.DmaBuf of {exporter}, {} bytes>", self.dmabuf.size())
    }
}

impl DmaBuf {
    fn of_fd(fd: OwnedFd) -> Result<Self, dmabuf::Error> {
        Ok(Self { dmabuf: dmabuf::DmaBuf::from_fd(fd)?, backing: None, mapping: OnceLock::new() })
    }
}

/// A bracket of CPU access to a dma-buf, from `DmaBuf.cpu_access`.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct CpuAccess {
    dmabuf: Py<DmaBuf>,
    access: dmabuf::CpuAccess,
    /// How often it was entered and not left.
    open: Mutex<u32>,
}

impl CpuAccess {
    fn sync(&self, py: Python<'_>, edge: &'static str) -> Result<()> {
        let direction = match self.access {
            dmabuf::CpuAccess::Read => sys::SYNC_READ,
            dmabuf::CpuAccess::Write => sys::SYNC_WRITE,
            _ => sys::SYNC_RW,
        };
        let flags = direction | if edge == "end" { sys::SYNC_END } else { sys::SYNC_START };
        let fd: BorrowedFd<'_> = self.dmabuf.get().dmabuf.as_fd();
        // It may wait for other devices.
        let answer = py.detach(|| sys::sync(fd, flags));
        Ok(answer.map_err(|source| dmabuf::Error::Sync { edge, access: self.access, source })?)
    }
}

#[pymethods]
impl CpuAccess {
    fn __enter__(&self, py: Python<'_>) -> Result<()> {
        self.sync(py, "start")?;
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Ok(())
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) -> Result<()> {
        {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            *open = open
                .checked_sub(1)
                .ok_or_else(|| Failed::Python(PyBufferError::new_err("this CPU access was not begun")))?;
        }
        self.sync(py, "end")
    }
}

/// Allocates a udmabuf: a dma-buf of memory of this process. `pages` as for `HostBuffer`. It needs access to /dev/udmabuf.
#[pyfunction]
#[pyo3(signature = (nbytes, pages = "base"))]
pub fn udmabuf(py: Python<'_>, nbytes: u64, pages: &str) -> Result<DmaBuf> {
    let pages = self::pages(pages)?;
    Ok(DmaBuf::of(py.detach(|| Udmabuf::open()?.with_pages(pages).allocate(nbytes))?))
}

/// Allocates a dma-buf from a dma-heap of the kernel. It needs access to /dev/dma_heap.
#[pyfunction]
#[pyo3(signature = (nbytes, name = "system"))]
pub fn heap(py: Python<'_>, nbytes: u64, name: &str) -> Result<DmaBuf> {
    Ok(DmaBuf::of(py.detach(|| DmaHeap::open(name)?.allocate(nbytes))?))
}

/// Allocates a dumb buffer of a DRM card, which is found by its driver: "vgem", "virtio_gpu", …
#[pyfunction]
#[pyo3(signature = (nbytes, driver))]
pub fn dumb_buffer(py: Python<'_>, nbytes: u64, driver: &str) -> Result<DmaBuf> {
    Ok(DmaBuf::of(py.detach(|| DumbBuffers::by_driver(driver)?.allocate(nbytes))?))
}
