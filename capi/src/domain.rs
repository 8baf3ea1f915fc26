//! Devices, protection domains, and new dma-bufs.
//!
//! `unsafe` is here for what C passes; see the crate.

use std::ffi::{c_char, c_int};
use std::os::fd::{AsFd, IntoRawFd};
use std::ptr::NonNull;

use dmabuf_rdma::exporter::{DmaHeap, Exporter, Udmabuf};
use dmabuf_rdma::{Device, ErrorKind, ProtectionDomain, RegionCache, verbs};
use ibverbs_sys::ibv_pd;

use crate::arguments::{copy_text, need, put, store, text};
use crate::handle;
use crate::status::{Failed, Result, call, drdma_status, query};

/// A protection domain on an open device: memory is registered in it, and connections belong to it.
#[allow(non_camel_case_types)]
pub struct drdma_domain(());

pub struct Domain {
    pub domain: ProtectionDomain,
    /// Regions of GPU memory, by pointer.
    pub cache: RegionCache,
}

impl From<ProtectionDomain> for Domain {
    fn from(domain: ProtectionDomain) -> Self {
        Self { domain, cache: RegionCache::default() }
    }
}

/// The names of this machine's RDMA devices, each with a newline. Copies them to `buffer`, cut to `size` bytes with the NUL,
/// and stores the whole length without the NUL in `length`, which may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_devices(buffer: *mut c_char, size: usize, length: *mut usize) -> drdma_status {
    call(|| {
        let names: String = verbs::devices()?.iter().map(|device| format!("{}\n", device.name())).collect();
        // SAFETY: the header's rules for buffers and places.
        unsafe { put(length, copy_text(&names, buffer, size)) };
        Ok(())
    })
}

/// Opens a device by its name and allocates a protection domain in it. NULL opens the machine's only device.
///
/// Errors: DRDMA_NOT_FOUND: there is no such device, and the message compares sysfs, nodes and providers. DRDMA_UNSUPPORTED
/// (ENOSYS): the kernel has no RDMA device at all. DRDMA_MISUSE: NULL, and there are several. DRDMA_PERMISSION (EACCES, EPERM): its node may not be opened. DRDMA_LIMIT
/// (EMFILE), DRDMA_OUT_OF_MEMORY (ENOMEM).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_domain_open(
    device: *const c_char,
    domain: *mut *mut drdma_domain,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for strings and places.
        unsafe {
            let name = text(device, "name of the device")?;
            store(domain, || open(name))
        }
    })
}

fn open(name: Option<&str>) -> Result<Domain> {
    let device = match name {
        Some(name) => Device::by_name(name)?,
        None => only_device()?,
    };
    Ok(ProtectionDomain::new(&device.open()?)?.into())
}

fn only_device() -> Result<Device> {
    match <[Device; 1]>::try_from(verbs::devices()?) {
        Ok([device]) => Ok(device),
        Err(all) if all.is_empty() => {
            Err(Failed::new(ErrorKind::NotFound, "this machine has no RDMA device"))
        }
        Err(all) => {
            let names: Vec<_> = all.iter().map(Device::name).collect();
            Err(Failed::misuse(format!(
                "this machine has {} RDMA devices: name one of {}",
                all.len(),
                names.join(", ")
            )))
        }
    }
}

/// Uses a protection domain of the caller's. It is never deallocated here; it and its context must outlive everything made
/// from the new handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_domain_from_pd(
    pd: *mut ibv_pd,
    domain: *mut *mut drdma_domain,
) -> drdma_status {
    call(|| {
        let pd = NonNull::new(pd).ok_or_else(|| Failed::misuse("the ibv_pd is NULL"))?;
        // SAFETY: the header's rules for places, and this function's for the domain.
        unsafe { store(domain, || Ok(ProtectionDomain::from_raw(pd).into())) }
    })
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_domain_ref(domain: *mut drdma_domain) -> drdma_status {
    call(|| handle::reference(domain))
}

/// Releases a reference; NULL does nothing. Regions and connections hold what they need of a domain.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_domain_unref(domain: *mut drdma_domain) -> drdma_status {
    call(|| handle::release(domain))
}

/// Allocates a dma-buf of at least `size` bytes: from the dma-heap called `heap`, from "system" if it is NULL, or a udmabuf if
/// it is "udmabuf". Stores the descriptor, which the caller closes, and the length in bytes, whose place may be NULL.
///
/// Errors: DRDMA_NOT_FOUND (ENOENT): there is no such heap, or no /dev/udmabuf. DRDMA_PERMISSION (EACCES). DRDMA_LIMIT: a
/// udmabuf beyond its limits, or no descriptor is free (EMFILE). DRDMA_OUT_OF_MEMORY: more than the machine has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_dmabuf_allocate(
    heap: *const c_char,
    size: u64,
    fd: *mut c_int,
    length: *mut u64,
) -> drdma_status {
    call(|| {
        need(fd, "descriptor")?;
        // SAFETY: the header's rules for strings.
        let dmabuf = match unsafe { text(heap, "name of the heap") }? {
            Some("udmabuf") => Udmabuf::open()?.allocate(size)?.dmabuf,
            heap => DmaHeap::open(heap.unwrap_or("system"))?.allocate(size)?.dmabuf,
        };
        let copy = dmabuf.as_fd().try_clone_to_owned();
        let copy =
            copy.map_err(|error| Failed::new(ErrorKind::Limit, format!("no descriptor is free: {error}")))?;
        // SAFETY: the header's rules for places.
        unsafe {
            put(length, dmabuf.size());
            put(fd, copy.into_raw_fd());
        }
        Ok(())
    })
}

/// Number of handles of this process that are not released, of all types: for tests that nothing leaks.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_live_handles() -> usize {
    query(0, || Ok(crate::live()))
}
