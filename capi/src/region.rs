//! Registered memory.
//!
//! `unsafe` is here for what C passes; see the crate.

use std::ffi::{c_int, c_void};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use dmabuf_rdma::dma_sg::Iova;
use dmabuf_rdma::exporter::Runtimes;
use dmabuf_rdma::mr::{Access, Buffer};
use dmabuf_rdma::{DmaBuf, HostBuffer, MemoryRegion, RegionSet, RegionSlice};
use ibverbs_sys::{ibv_mr, ibv_sge};

use crate::arguments::{copy_bytes, need, store};
use crate::domain::{Domain, drdma_domain};
use crate::handle::{self, get};
use crate::status::{Failed, Result, call, drdma_status, query};

/// A byte range of registered memory. The memory stays registered while a handle, a slice, a table or a transfer has it.
#[allow(non_camel_case_types)]
pub struct drdma_region(());

/// A longer buffer may need several memory regions, which act as one.
const ONE_REGION: u64 = 1 << 30;

/// Access flags, of `enum ibv_access_flags`: the device may write, for receives, READs and results of atomics.
pub const DRDMA_LOCAL_WRITE: u32 = 1;
/// A peer may write. Needs DRDMA_LOCAL_WRITE.
pub const DRDMA_REMOTE_WRITE: u32 = 2;
/// A peer may read.
pub const DRDMA_REMOTE_READ: u32 = 4;
/// A peer may execute atomics. Needs DRDMA_LOCAL_WRITE.
pub const DRDMA_REMOTE_ATOMIC: u32 = 8;
/// The device may reorder its PCIe writes.
pub const DRDMA_RELAXED_ORDERING: u32 = 0x100000;
/// All access of a peer, and DRDMA_LOCAL_WRITE.
pub const DRDMA_REMOTE: u32 = 15;

const _: () = assert!(
    DRDMA_LOCAL_WRITE == Access::LOCAL_WRITE.bits()
        && DRDMA_REMOTE_WRITE == Access::REMOTE_WRITE.bits()
        && DRDMA_REMOTE_READ == Access::REMOTE_READ.bits()
        && DRDMA_REMOTE_ATOMIC == Access::REMOTE_ATOMIC.bits()
        && DRDMA_RELAXED_ORDERING == Access::RELAXED_ORDERING.bits()
        && DRDMA_REMOTE == Access::REMOTE.bits()
);

fn register<'a>(
    domain: &'a Domain,
    buffer: impl Into<Buffer<'a>> + Copy,
    (start, end): (u64, u64),
    access: u32,
) -> Result<RegionSlice> {
    let (domain, access) = (&domain.domain, Access::from_bits_retain(access));
    Ok(if end.saturating_sub(start) > ONE_REGION {
        RegionSet::builder(buffer).range(start..end).access(access).register(domain)?.into()
    } else {
        MemoryRegion::builder(domain, buffer).range(start..end).access(access).register()?.into()
    })
}

/// `offset + length`.
pub fn end(offset: u64, length: u64) -> Result<u64> {
    let end = offset.checked_add(length);
    end.ok_or_else(|| Failed::misuse(format!("offset {offset} + length {length} overflows")))
}

/// Registers bytes `offset` to `offset + length` of a dma-buf; a length of 0 means to its end. `access` are DRDMA_LOCAL_WRITE
/// and its like; 0 permits the device only to read. The descriptor stays the caller's, and may be closed afterwards.
///
/// Errors: DRDMA_MISUSE: no dma-buf, a range outside of it, flags that exclude each other. DRDMA_PERMISSION: flags that permit
/// writing, and a read-only descriptor. DRDMA_UNSUPPORTED (EOPNOTSUPP): the device imports no dma-bufs, not this memory, or not
/// with these flags; the message says which. DRDMA_OUT_OF_MEMORY (ENOMEM), DRDMA_SYSTEM: see the errno.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_register_dmabuf(
    domain: *mut drdma_domain,
    fd: c_int,
    offset: u64,
    length: u64,
    access: u32,
    region: *mut *mut drdma_region,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let domain = get(domain)?;
            store(region, || {
                let dmabuf = DmaBuf::from_fd(duplicate(fd)?)?;
                let end = if length == 0 { dmabuf.size() } else { end(offset, length)? };
                register(domain, &dmabuf, (offset, end), access)
            })
        }
    })
}

/// A descriptor of the caller's, of which nothing is known.
fn duplicate(fd: c_int) -> Result<OwnedFd> {
    let bad = || dmabuf_rdma::dmabuf::Error::BadFd { fd };
    if fd < 0 {
        return Err(bad().into());
    }
    // SAFETY: the number is not -1, and the only use is a system call, which refuses one that is not open.
    let copy = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    copy.map_err(|error| match error.raw_os_error() {
        Some(libc::EBADF) => bad().into(),
        _ => Failed::new(dmabuf_rdma::ErrorKind::Limit, format!("no descriptor is free: {error}")),
    })
}

/// Calls a function of C when nobody uses the memory any more.
struct Release {
    call: unsafe extern "C" fn(*mut c_void),
    context: *mut c_void,
}

// SAFETY: the header says that the function may be called on any thread.
unsafe impl Send for Release {}
// SAFETY: nothing but the drop uses it.
unsafe impl Sync for Release {}

impl Drop for Release {
    fn drop(&mut self) {
        // SAFETY: the caller of drdma_register_host passed both.
        unsafe { (self.call)(self.context) };
    }
}

/// Registers `length` bytes of host memory. `release`, if it is not NULL, is called once with `context`, on any thread, when
/// no region and no transfer uses the memory any more; until then nobody may free or unmap it. If the registration fails, it is
/// called before the function returns. It must not throw, nor use or release a handle that the call uses in which it runs.
/// Without it, the memory must stay until the last handle of it is released and every transfer of it has ended; if a receive
/// was cancelled, timed out or released before its first message, until its connection is released too.
///
/// Errors: DRDMA_MISUSE: no bytes, or flags that exclude each other. DRDMA_LIMIT (ENOMEM, EPERM): RLIMIT_MEMLOCK; the message
/// says the limit and the need.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_register_host(
    domain: *mut drdma_domain,
    start: *mut c_void,
    length: u64,
    access: u32,
    release: Option<unsafe extern "C" fn(context: *mut c_void)>,
    context: *mut c_void,
    region: *mut *mut drdma_region,
) -> drdma_status {
    let keeper = release.map(|call| Release { call, context });
    call(|| {
        // SAFETY: the header's rules for handles and places, and this function's for the memory.
        unsafe {
            let domain = get(domain)?;
            let buffer = HostBuffer::from_raw(start.cast(), length, keeper)?;
            store(region, || register(domain, &buffer, (0, length), access))
        }
    })
}

/// Registers memory of a GPU by the pointer of a runtime that this process has loaded: CUDA, ROCm or Level Zero. The domain
/// exports and registers the allocation under the pointer once, and keeps that until it is released. The memory must stay
/// allocated as long as host memory without a `release`.
///
/// Errors: DRDMA_NOT_FOUND: no runtime is loaded, or none knows the pointer. DRDMA_MISUSE: the range leaves the allocation.
/// DRDMA_UNSUPPORTED: this kind of memory is not exported; and as drdma_register_dmabuf().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_register_pointer(
    domain: *mut drdma_domain,
    pointer: u64,
    length: u64,
    access: u32,
    region: *mut *mut drdma_region,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let Domain { domain, cache } = get(domain)?;
            store(region, || {
                let (runtimes, access) = (Runtimes::loaded()?, Access::from_bits_retain(access));
                Ok(cache.get_pointer(domain, &runtimes, pointer, length, access)?)
            })
        }
    })
}

/// Uses a memory region that the caller registered with `access`. It is never deregistered here, and must outlive the new
/// handle and everything made from it. `iova` is the address of its first byte in work requests: what was passed as iova to
/// the registration, or the address of the memory for ibv_reg_mr(). `mr->addr` is another one for a dma-buf.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_region_from_mr(
    mr: *mut ibv_mr,
    iova: u64,
    access: u32,
    region: *mut *mut drdma_region,
) -> drdma_status {
    call(|| {
        let mr = NonNull::new(mr).ok_or_else(|| Failed::misuse("the ibv_mr is NULL"))?;
        let access = Access::from_bits_retain(access);
        // SAFETY: the header's rules for places, and this function's for the region.
        unsafe { store(region, || Ok(MemoryRegion::from_raw(mr, Iova(iova), access)?.into())) }
    })
}

/// Takes another reference.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_region_ref(region: *mut drdma_region) -> drdma_status {
    call(|| handle::reference(region))
}

/// Releases a reference; NULL does nothing. The memory is deregistered once no handle, slice, table or transfer has it.
#[unsafe(no_mangle)]
pub extern "C" fn drdma_region_unref(region: *mut drdma_region) -> drdma_status {
    call(|| handle::release(region))
}

/// Bytes `offset` to `offset + length` of a region, as a region.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_region_slice(
    region: *mut drdma_region,
    offset: u64,
    length: u64,
    slice: *mut *mut drdma_region,
) -> drdma_status {
    call(|| {
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let region = get(region)?;
            store(slice, || Ok(region.slice(offset..end(offset, length)?)?))
        }
    })
}

/// Length of a region in bytes; 0 if the handle is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_region_length(region: *mut drdma_region) -> u64 {
    // SAFETY: the header's rules for handles.
    query(0, || Ok(unsafe { get(region) }?.len()))
}

/// The scatter/gather element of a region, for work requests of the caller's own. A region that has more than 4 GiB less 4 KiB,
/// or memory of several registrations, is refused: slice it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_region_element(
    region: *mut drdma_region,
    element: *mut ibv_sge,
) -> drdma_status {
    call(|| {
        need(element, "element")?;
        // SAFETY: the header's rules for handles and places.
        unsafe {
            let region = get(region)?;
            let length = region.sge()?.len();
            element.write(ibv_sge { addr: region.iova().0, length, lkey: region.region().lkey().0 });
        }
        Ok(())
    })
}

/// Writes the description that a peer needs to access the region: 32 bytes, and 20 for each memory region behind it. `size`
/// holds the size of the buffer, and gets the number of bytes, also if the buffer is too small (DRDMA_MISUSE) or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drdma_region_describe(
    region: *mut drdma_region,
    buffer: *mut c_void,
    size: *mut usize,
) -> drdma_status {
    // SAFETY: the header's rules for handles and buffers.
    call(|| unsafe { copy_bytes(&get(region)?.remote().to_bytes(), buffer, size) })
}
