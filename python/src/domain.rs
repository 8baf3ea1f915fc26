//! Devices and protection domains, and the registration of what Python has.

use std::sync::{Arc, Mutex, PoisonError};

use dmabuf_rdma::exporter::{MemoryKind, PointerError, Runtimes};
use dmabuf_rdma::mr::{Access, Buffer, RegisterError};
use dmabuf_rdma::{HostBuffer, MemoryRegion, ProtectionDomain, RegionCache, RegionSet, RegionSlice, verbs};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::access;
use crate::buffer;
use crate::connection::{Connection, Worker};
use crate::detached::Detached;
use crate::error::{Failed, Result};
use crate::options;
use crate::region::Region;
use crate::source::Source;

/// A longer buffer may need several memory regions, which act as one.
const ONE_REGION: u64 = 1 << 30;

/// The names of this machine's RDMA devices, in the kernel's order.
#[pyfunction]
pub fn devices() -> Result<Vec<String>> {
    Ok(verbs::devices()?.iter().map(|device| device.name().to_owned()).collect())
}

/// What the process holds: a dict with "regions" and "bytes" for each path by which something is registered, "fds" (open
/// dma-bufs), and "cache" (hits, misses, evictions, entries, bytes).
#[pyfunction]
pub fn gauges(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let gauges = dmabuf_rdma::observe::gauges();
    let paths = PyDict::new(py);
    for (path, held) in gauges.by_path().filter(|(_, held)| held.regions > 0) {
        paths.set_item(path, (held.regions, held.bytes))?;
    }
    let cache = PyDict::new(py);
    for (name, value) in [
        ("hits", gauges.cache.hits),
        ("misses", gauges.cache.misses),
        ("evictions", gauges.cache.evictions),
        ("entries", gauges.cache.entries),
        ("bytes", gauges.cache.bytes),
    ] {
        cache.set_item(name, value)?;
    }
    let all = PyDict::new(py);
    let sum = gauges.regions();
    all.set_item("regions", sum.regions)?;
    all.set_item("bytes", sum.bytes)?;
    all.set_item("paths", paths)?;
    all.set_item("fds", gauges.fds)?;
    all.set_item("cache", cache)?;
    Ok(all)
}

/// The GPU runtimes that this process has loaded, as of the last look.
static RUNTIMES: Mutex<Option<Arc<Runtimes>>> = Mutex::new(None);

fn runtimes(anew: bool) -> Result<Arc<Runtimes>> {
    let mut known = RUNTIMES.lock().unwrap_or_else(PoisonError::into_inner);
    match &*known {
        Some(known) if !anew => Ok(known.clone()),
        _ => Ok(known.insert(Arc::new(Runtimes::loaded()?)).clone()),
    }
}

/// A protection domain on an open device: memory is registered in it, and connections belong to it.
///
/// `Domain()` opens the machine's only device, `Domain("mlx5_0")` one by its name; `devices()` lists them.
#[pyclass(frozen, module = "dmabuf_rdma")]
pub struct Domain {
    pub domain: Detached<ProtectionDomain>,
    cache: Detached<RegionCache>,
}

impl Domain {
    pub fn open(device: Option<&str>) -> Result<Self> {
        let device = match device {
            Some(name) => verbs::Device::by_name(name)?,
            None => only_device()?,
        };
        let domain = ProtectionDomain::new(&device.open()?)?.into();
        Ok(Self { domain, cache: RegionCache::default().into() })
    }

    fn register_host(&self, source: Source, (start, length): (u64, u64), access: Access) -> Result<Region> {
        if source.read_only
            && access.intersects(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
        {
            return Err(Failed::permission(format!(
                "{} is read-only, so no device may write it: register it without LOCAL_WRITE, or a writable copy",
                source.what
            )));
        }
        let pointer = std::ptr::with_exposed_provenance_mut::<u8>(start as usize);
        let (keeper, read_only) = (source.keeper, source.read_only);
        // SAFETY: the producer lends the memory as long as the keeper lives. Python's own accesses are plain ones, as to
        // any memory that is shared with C; this process's Rust code forms no reference to it.
        let buffer = unsafe {
            match read_only {
                true => HostBuffer::from_raw_read_only(pointer, length, keeper),
                false => HostBuffer::from_raw(pointer, length, keeper),
            }
        }?;
        Ok(Region::new(self.register_buffer((&buffer).into(), access, None)?, Some(start)))
    }

    fn register_buffer(
        &self,
        buffer: Buffer<'_>,
        access: Access,
        backing: Option<&dmabuf_rdma::exporter::Backing>,
    ) -> Result<RegionSlice> {
        if buffer.size() > ONE_REGION {
            let builder = match buffer {
                Buffer::Host(host) => RegionSet::builder(host),
                Buffer::DmaBuf(dmabuf) => RegionSet::builder(dmabuf),
                _ => return Err(Failed::unsupported("a buffer of a kind that this package does not know")),
            };
            let backings = backing.map(std::slice::from_ref).unwrap_or_default();
            return Ok(builder.access(access).host_mapping(backings).register(&self.domain)?.into());
        }
        let mut builder = match buffer {
            Buffer::Host(host) => MemoryRegion::builder(&self.domain, host),
            Buffer::DmaBuf(dmabuf) => MemoryRegion::builder(&self.domain, dmabuf),
            _ => return Err(Failed::unsupported("a buffer of a kind that this package does not know")),
        };
        if let Some(backing) = backing {
            builder = builder.host_mapping(backing);
        }
        Ok(builder.access(access).register()?.into())
    }

    /// Registers memory of a GPU runtime: the allocation under the pointer once, whatever is asked of it.
    fn register_device(&self, (address, length): (u64, u64), access: Access) -> Result<RegionSlice> {
        let get = |anew| -> Result<Result<RegionSlice, RegisterError>> {
            let runtimes = runtimes(anew)?;
            Ok(self.cache.get_pointer(&self.domain, &*runtimes, address, length, access))
        };
        match get(false)? {
            // The runtime may have been loaded since.
            Err(RegisterError::Pointer(PointerError::WrongKind {
                runtime: None,
                kind: MemoryKind::Host,
                ..
            })) => Ok(get(true)??),
            answer => Ok(answer?),
        }
    }
}

fn only_device() -> Result<verbs::Device> {
    let all = verbs::devices()?;
    match <[verbs::Device; 1]>::try_from(all) {
        Ok([device]) => Ok(device),
        Err(all) if all.is_empty() => Err(Failed::Here(
            "NotFound",
            "this machine has no RDMA device".into(),
            dmabuf_rdma::ErrorKind::NotFound.hint(),
        )),
        Err(all) => {
            let names: Vec<_> = all.iter().map(verbs::Device::name).collect();
            Err(Failed::misuse(format!(
                "this machine has {} RDMA devices: name one of {}",
                names.len(),
                names.join(", ")
            )))
        }
    }
}

#[pymethods]
impl Domain {
    #[new]
    #[pyo3(signature = (device = None))]
    fn new(py: Python<'_>, device: Option<&str>) -> Result<Self> {
        py.detach(|| Self::open(device))
    }

    /// The name of the device.
    #[getter]
    fn device(&self) -> &str {
        self.domain.context().device_name()
    }

    /// Registers memory with the device, in place, and returns its `Region`.
    ///
    /// `obj` is one of these:
    ///
    /// - an array or tensor with `__dlpack__` (CPU, CUDA, ROCm, oneAPI), `__cuda_array_interface__` or
    ///   `__array_interface__`: numpy, PyTorch, JAX, CuPy, …; or an object with the buffer protocol. It must be
    ///   contiguous, in any order of its dimensions. Of a view with gaps, register the array that it is a view of, and
    ///   transfer `Region.blocks_of(view)`;
    /// - a `HostBuffer` or a `DmaBuf`;
    /// - `(pointer, nbytes)` with `unsafe=True`: host memory, or memory of a GPU runtime. Nobody may free it while the
    ///   region, its slices or its transfers live, nor while a receive into it is posted.
    ///
    /// `access` says what the device and peers may do, as `Access` flags. Without flags the device only reads: enough for
    /// the source of writes and sends. `Access.REMOTE` is all that a peer can do.
    ///
    /// The region holds `obj`, so the memory cannot be freed under it. Memory of a GPU is registered by its allocation,
    /// which is cached. Synchronize with the GPU before you send what it writes.
    ///
    /// `host_mapping=True` permits to register the host pages of a `udmabuf` if the device imports no dma-bufs.
    #[pyo3(signature = (obj, access = None, *, r#unsafe = false, host_mapping = false))]
    fn register(
        &self,
        obj: &Bound<'_, PyAny>,
        access: Option<&Bound<'_, PyAny>>,
        r#unsafe: bool,
        host_mapping: bool,
    ) -> Result<Region> {
        let (py, access) = (obj.py(), access::of(access)?);
        if let Ok(host) = obj.cast::<buffer::HostBuffer>() {
            let host = &host.get().0;
            let slice = py.detach(|| self.register_buffer(Buffer::Host(host), access, None))?;
            return Ok(Region::new(slice, Some(host.as_ptr().addr() as u64)));
        }
        if let Ok(dmabuf) = obj.cast::<buffer::DmaBuf>() {
            let this = dmabuf.get();
            let backing = match (host_mapping, &this.backing) {
                (true, None) => {
                    return Err(Failed::misuse(
                        "host_mapping needs a udmabuf that this process has made: leave it out",
                    ));
                }
                (true, backing) => backing.as_ref(),
                (false, _) => None,
            };
            let slice = py.detach(|| self.register_buffer(Buffer::DmaBuf(&this.dmabuf), access, backing))?;
            return Ok(Region::of_dmabuf(slice, dmabuf.clone().unbind()));
        }
        if let Ok(tuple) = obj.cast::<PyTuple>() {
            return self.register_pointer(tuple, access, r#unsafe);
        }
        let source = Source::of(obj)?;
        let whole = source.whole()?;
        if whole.0 == 0 {
            return Err(Failed::misuse(format!("{} is at a null pointer", source.what)));
        }
        if !source.on_device {
            return py.detach(|| self.register_host(source, whole, access));
        }
        if source.read_only && access.intersects(Access::LOCAL_WRITE) {
            return Err(Failed::permission(format!(
                "{} is read-only, so no device may write it: register it without LOCAL_WRITE",
                source.what
            )));
        }
        let slice = py.detach(|| self.register_device(whole, access))?;
        // The region of the allocation does not hold the tensor.
        Ok(Region::new(slice.keeping(source.keeper), Some(whole.0)))
    }

    /// Removes what is cached of GPU memory, and returns how many registrations. Those in use go with their last user.
    /// Call it when the framework has returned memory to the GPU, such as after `torch.cuda.empty_cache()`.
    fn clear_cache(&self, py: Python<'_>) -> usize {
        py.detach(|| self.cache.clear())
    }

    /// A connection to be connected to a peer's `Endpoint`, with any of the options that `Connection` describes.
    #[pyo3(signature = (**options))]
    fn connection(slf: &Bound<'_, Self>, options: Option<&Bound<'_, PyDict>>) -> Result<Connection> {
        let options = options::connection(options)?;
        let domain = &slf.get().domain;
        let connection = slf.py().detach(|| dmabuf_rdma::Connection::new(domain, options))?;
        Ok(Connection::new(connection, slf.clone().unbind(), Vec::new()))
    }

    /// A worker for many connections, which share a completion queue and the notifications that they receive.
    ///
    /// `completions` is the room of the queue, of which a connection takes twice its `window`; `notifications` the number
    /// of receives that are posted ahead, 0 for none.
    #[pyo3(signature = (completions = 16384, notifications = 0))]
    fn worker(slf: &Bound<'_, Self>, completions: u32, notifications: u32) -> Result<Worker> {
        let options =
            dmabuf_rdma::WorkerOptions::default().completions(completions).notifications(notifications);
        let domain = &slf.get().domain;
        let worker = slf.py().detach(|| dmabuf_rdma::Worker::new(domain, options))?;
        Ok(Worker::new(worker, slf.clone().unbind()))
    }

    fn __repr__(&self) -> String {
        format!("<dmabuf_rdma.Domain on {}>", self.device())
    }
}

impl Domain {
    fn register_pointer(
        &self,
        tuple: &Bound<'_, PyTuple>,
        access: Access,
        is_unsafe: bool,
    ) -> Result<Region> {
        let py = tuple.py();
        let (address, length): (u64, u64) = tuple.extract().map_err(|_| {
            Failed::wrong_type("a tuple is (pointer, nbytes), both integers that are not negative")
        })?;
        if !is_unsafe {
            return Err(Failed::misuse(
                "nothing keeps the memory at a pointer alive: register the object that it belongs to, or pass unsafe=True \
                 and keep it yourself",
            ));
        }
        if length == 0 {
            return Err(dma_sg::RangeError::Empty { offset: 0 }.into());
        }
        if address == 0 {
            return Err(PointerError::NullPointer.into());
        }
        let found = py.detach(|| -> Result<_> {
            use dmabuf_rdma::exporter::Runtime;
            Ok(runtimes(true)?.find(address)?)
        })?;
        if found.is_some_and(|info| info.kind != MemoryKind::Host) {
            let slice = py.detach(|| self.register_device((address, length), access))?;
            return Ok(Region::new(slice, Some(address)));
        }
        let source = Source {
            address,
            item_size: 1,
            shape: vec![length],
            strides: None,
            read_only: false,
            on_device: false,
            keeper: py.None(),
            what: format!("the memory at {address:#x}"),
        };
        py.detach(|| self.register_host(source, (address, length), access))
    }
}
