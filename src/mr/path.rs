//! The registration paths, with one private function for each C call.
//!
//! `unsafe` is here for the calls. The builder checks their arguments first: the range lies in the buffer, and
//! the flags are permitted.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;

use ibverbs_sys as ffi;
use rdma_sys_ext::symbols::{self, Mlx5dvRegDmabufMrFn, RegDmabufMrFn, RegMrExFn};
use rdma_sys_ext::uverbs::mr as uverbs;

use dma_sg::Iova;

use super::Access;
use crate::exporter::Backing;
use crate::host::HostBuffer;
use crate::observe::{self, RegionCounter};
use crate::verbs::{Lkey, ProtectionDomain, Rkey};

/// A way to register a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Path {
    /// `ibv_reg_dmabuf_mr` of the user-space provider.
    Verbs,
    /// The kernel's REG_DMABUF_MR command, for devices whose provider lacks the operation.
    Uverbs,
    /// `ibv_reg_mr_iova2` on this process's mapping of the host pages behind the dma-buf. The kernel charges the
    /// pages to RLIMIT_MEMLOCK. Only with [`host_mapping`](super::MemoryRegionBuilder::host_mapping).
    HostMapping,
    /// `ibv_reg_mr_ex` of rdma-core 59, with or without a DMA handle. Only if the caller chooses it.
    VerbsEx,
    /// `mlx5dv_reg_dmabuf_mr` for the device's data-direct function. Only if the caller chooses it.
    DataDirect,
    /// `ibv_reg_mr_iova2` on a [`HostBuffer`], the only path for one. The kernel charges the pages to RLIMIT_MEMLOCK.
    HostMemory,
    /// None: another library registered the region, see [`MemoryRegion::from_raw`](super::MemoryRegion::from_raw).
    Foreign,
}

/// The paths that are allowed by default.
pub(super) const DEFAULT: &[Path] = &[Path::Verbs, Path::Uverbs, Path::HostMemory];

/// The import paths that are tried by default, in order.
pub(super) const IMPORT: &[Path] = &[Path::Verbs, Path::Uverbs];

/// The import paths that are tried only if the caller chooses them, after the others.
pub(super) const NEWER: &[Path] = &[Path::VerbsEx, Path::DataDirect];

impl Path {
    /// The gauge of the path's regions; `None` for those that this library does not hold.
    pub(super) fn counter(self) -> Option<&'static RegionCounter> {
        Some(match self {
            Self::Verbs => &observe::VERBS,
            Self::Uverbs => &observe::UVERBS,
            Self::HostMapping => &observe::HOST_MAPPING,
            Self::VerbsEx => &observe::VERBS_EX,
            Self::DataDirect => &observe::DATA_DIRECT,
            Self::HostMemory => &observe::HOST_MEMORY,
            Self::Foreign => return None,
        })
    }

    /// The C function and what it needs, for a path that few systems have.
    pub(super) fn needs(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::VerbsEx => Some((
                "ibv_reg_mr_ex",
                "rdma-core 59 or later, Linux 6.17 or later, and a provider with the operation (mlx5)",
            )),
            Self::DataDirect => Some((
                "mlx5dv_reg_dmabuf_mr",
                "rdma-core 54 or later, Linux 6.12 or later, and an mlx5 device with a data-direct function, on GB300 at offset 0 of the dma-buf",
            )),
            _ => None,
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Verbs => "Verbs",
            Self::Uverbs => "Uverbs",
            Self::HostMapping => "HostMapping",
            Self::VerbsEx => "VerbsEx",
            Self::DataDirect => "DataDirect",
            Self::HostMemory => "HostMemory",
            Self::Foreign => "Foreign",
        })
    }
}

/// A checked range with its iova and access flags.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub offset: u64,
    pub length: u64,
    pub iova: Iova,
    pub access: Access,
}

/// A registration. Dropping it does not deregister.
#[derive(Debug)]
pub(super) struct Registered {
    pub lkey: Lkey,
    pub rkey: Rkey,
    handle: Handle,
}

#[derive(Debug)]
enum Handle {
    /// libibverbs' object, for every path except Uverbs.
    Library(NonNull<ffi::ibv_mr>),
    /// The kernel's handle, for Uverbs.
    Kernel(u32),
    /// Another library's registration, which it deregisters.
    Foreign,
    /// A unit test's registration: whether it is still registered.
    #[cfg(test)]
    Fake(std::sync::Arc<std::sync::atomic::AtomicBool>),
}

impl Registered {
    /// A registration of a unit test.
    #[cfg(test)]
    pub(super) fn fake(lkey: Lkey, rkey: Rkey) -> Self {
        Self { lkey, rkey, handle: Handle::Fake(std::sync::Arc::new(true.into())) }
    }

    /// Whether a unit test's region is still registered.
    #[cfg(test)]
    pub(super) fn is_registered(&self) -> bool {
        let Handle::Fake(registered) = &self.handle else { panic!("not a unit test's region") };
        registered.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// A registration of another library, which has these keys.
    pub(super) fn foreign(lkey: Lkey, rkey: Rkey) -> Self {
        Self { lkey, rkey, handle: Handle::Foreign }
    }

    fn library(mr: *mut ffi::ibv_mr) -> io::Result<Self> {
        let mr = NonNull::new(mr).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: libibverbs returned a live region.
        let (lkey, rkey) = unsafe { ((*mr.as_ptr()).lkey, (*mr.as_ptr()).rkey) };
        Ok(Self { lkey: Lkey(lkey), rkey: Rkey(rkey), handle: Handle::Library(mr) })
    }

    /// Deregisters. On failure the region stays registered.
    pub(super) fn deregister(&self, domain: &ProtectionDomain) -> io::Result<()> {
        match &self.handle {
            // SAFETY: the region is live: its owner deregisters it successfully at most once.
            Handle::Library(mr) => match unsafe { ffi::ibv_dereg_mr(mr.as_ptr()) } {
                // EIO: the device was removed, and the region with it.
                0 | libc::EIO => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            },
            Handle::Foreign => Ok(()),
            #[cfg(test)]
            Handle::Fake(registered) => {
                assert!(registered.swap(false, std::sync::atomic::Ordering::SeqCst), "deregistered twice");
                Ok(())
            }
            Handle::Kernel(handle) => {
                // SAFETY: the handle belongs to this context, is live as above, and has no other owner.
                match unsafe { uverbs::destroy(domain.context().cmd_fd(), *handle) } {
                    // The device was removed, and the region with it.
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(()),
                    answer => answer,
                }
            }
        }
    }
}

// SAFETY: libibverbs and the kernel accept a region's handle from any thread.
unsafe impl Send for Registered {}
// SAFETY: as above; the keys are plain numbers.
unsafe impl Sync for Registered {}

/// Registers through the provider. Callers compute addresses from the request's iova: libibverbs sets
/// `mr->addr` to the offset.
pub(super) fn register_verbs(
    call: RegDmabufMrFn,
    domain: &ProtectionDomain,
    fd: RawFd,
    request: &Request,
) -> io::Result<Registered> {
    let Request { offset, length, iova, access } = *request;
    // SAFETY: the domain is live, and the kernel checks the descriptor.
    let mr =
        unsafe { call(domain.as_raw().as_ptr(), offset, length as usize, iova.0, fd, access.bits() as i32) };
    Registered::library(mr)
}

/// Registers with the kernel's command.
pub(super) fn register_uverbs(
    domain: &ProtectionDomain,
    fd: RawFd,
    request: &Request,
) -> io::Result<Registered> {
    let Request { offset, length, iova, access } = *request;
    let request = uverbs::RegDmabufMr {
        pd_handle: domain.handle(),
        fd,
        offset,
        length,
        iova: iova.0,
        access: access.bits(),
    };
    let uverbs::RegisteredMr { handle, lkey, rkey } =
        // SAFETY: the handle belongs to a live domain of this context. No reference into the buffer exists:
        // `dmabuf::mapping` forms none.
        unsafe { uverbs::reg_dmabuf_mr(domain.context().cmd_fd(), &request)? };
    Ok(Registered { lkey: Lkey(lkey), rkey: Rkey(rkey), handle: Handle::Kernel(handle) })
}

/// Registers with `ibv_reg_mr_ex`, with or without a DMA handle.
pub(super) fn register_extended(
    call: RegMrExFn,
    domain: &ProtectionDomain,
    fd: RawFd,
    request: &Request,
    handle: Option<NonNull<symbols::ibv_dmah>>,
) -> io::Result<Registered> {
    let Request { offset, length, iova, access } = *request;
    let mut attr = symbols::ibv_mr_init_attr {
        length: length as usize,
        access: access.bits() as i32,
        comp_mask: symbols::IBV_REG_MR_MASK_IOVA
            | symbols::IBV_REG_MR_MASK_FD
            | symbols::IBV_REG_MR_MASK_FD_OFFSET,
        iova: iova.0,
        addr: std::ptr::null_mut(),
        fd,
        fd_offset: offset,
        dmah: std::ptr::null_mut(),
        buf: std::ptr::null_mut(),
    };
    if let Some(handle) = handle {
        attr.comp_mask |= symbols::IBV_REG_MR_MASK_DMAH;
        attr.dmah = handle.as_ptr();
    }
    // SAFETY: the domain is live, and so is the handle, which belongs to the same context. The call reads the
    // attributes and does not keep them, and the kernel checks the descriptor.
    Registered::library(unsafe { call(domain.as_raw().as_ptr(), &mut attr) })
}

/// Registers with libmlx5, for the device's data-direct function.
pub(super) fn register_data_direct(
    call: Mlx5dvRegDmabufMrFn,
    domain: &ProtectionDomain,
    fd: RawFd,
    request: &Request,
) -> io::Result<Registered> {
    let Request { offset, length, iova, access } = *request;
    let (length, access) = (length as usize, access.bits() as i32);
    let flags = symbols::MLX5DV_REG_DMABUF_ACCESS_DATA_DIRECT;
    // SAFETY: the domain is live. libmlx5 compares the device's operations with its own before it treats it as an
    // mlx5 device, and returns EOPNOTSUPP for any other.
    Registered::library(unsafe { call(domain.as_raw().as_ptr(), offset, length, iova.0, fd, access, flags) })
}

/// Registers the host pages behind a buffer.
pub(super) fn register_host_pages(
    domain: &ProtectionDomain,
    backing: &Backing,
    request: &Request,
) -> io::Result<Registered> {
    // SAFETY: the range lies in the buffer, all of which is mapped, and no reference to these bytes exists: see
    // `Backing`.
    unsafe { register_memory(domain, backing.as_ptr(), request) }
}

/// Registers host memory.
pub(super) fn register_host(
    domain: &ProtectionDomain,
    host: &HostBuffer,
    request: &Request,
) -> io::Result<Registered> {
    // SAFETY: the range lies in the buffer, which is mapped in this process, and no reference to these bytes exists:
    // see `HostBuffer`.
    unsafe { register_memory(domain, host.as_ptr(), request) }
}

/// # Safety
/// The request's range of the memory from `start` on is mapped, and no reference to it is used while a device may write
/// it.
unsafe fn register_memory(
    domain: &ProtectionDomain,
    start: *mut u8,
    request: &Request,
) -> io::Result<Registered> {
    let Request { offset, length, iova, access } = *request;
    let start = start.wrapping_add(offset as usize).cast();
    // SAFETY: the domain is live; the caller vouches for the memory.
    let mr = unsafe {
        ffi::ibv_reg_mr_iova2(domain.as_raw().as_ptr(), start, length as usize, iova.0, access.bits())
    };
    Registered::library(mr)
}
