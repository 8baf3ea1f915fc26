//! The ways to register, one private function a C call.
//!
//! `unsafe` is here for the calls themselves. What they are given was checked before: the range lies
//! in the buffer, the flags are permitted.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;

use ibverbs_sys as ffi;
use rdma_sys_ext::symbols::{self, Mlx5dvRegDmabufMrFn, RegDmabufMrFn, RegMrExFn};
use rdma_sys_ext::uverbs::mr as uverbs;

use super::{Access, Lkey, Rkey};
use crate::exporter::Backing;
use crate::umem::Iova;
use crate::verbs::ProtectionDomain;

/// How a region was registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Path {
    /// `ibv_reg_dmabuf_mr` through the user-space provider.
    Verbs,
    /// The kernel's REG_DMABUF_MR command, where the provider lacks the operation.
    Uverbs,
    /// `ibv_reg_mr_iova2` on host pages of ours that back the dma-buf; they are charged to RLIMIT_MEMLOCK.
    HostMapping,
    /// `ibv_reg_mr_ex` of newer libraries, where it was asked for: with a DMA handle, or by name.
    VerbsEx,
    /// `mlx5dv_reg_dmabuf_mr` with the device's data-direct function, where it was asked for.
    DataDirect,
}

/// The paths that import a dma-buf, in the order in which they are tried.
pub(super) const IMPORT: &[Path] = &[Path::Verbs, Path::Uverbs];

/// Those that are taken only where they are asked for, after the others.
pub(super) const NEWER: &[Path] = &[Path::VerbsEx, Path::DataDirect];

impl Path {
    /// The C function, and what has it: for a path that few systems have.
    pub(super) fn needs(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::VerbsEx => Some((
                "ibv_reg_mr_ex",
                "rdma-core 59 or later, Linux 6.17 or later, and a provider with the operation (mlx5)",
            )),
            Self::DataDirect => Some((
                "mlx5dv_reg_dmabuf_mr",
                "rdma-core 54 or later, Linux 6.12 or later, and an mlx5 device with a data-direct function",
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
        })
    }
}

/// What is to be registered, of whichever buffer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub offset: u64,
    pub length: u64,
    pub iova: Iova,
    pub access: Access,
}

/// A registration as the kernel or the provider knows it. Not undone by dropping.
#[derive(Debug)]
pub(super) struct Registered {
    pub lkey: Lkey,
    pub rkey: Rkey,
    handle: Handle,
}

#[derive(Debug)]
enum Handle {
    /// libibverbs' object, of all but Uverbs.
    Library(NonNull<ffi::ibv_mr>),
    /// The kernel's number, of Uverbs.
    Kernel(u32),
}

impl Registered {
    fn library(mr: *mut ffi::ibv_mr) -> io::Result<Self> {
        let mr = NonNull::new(mr).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: libibverbs returned a live region.
        let (lkey, rkey) = unsafe { ((*mr.as_ptr()).lkey, (*mr.as_ptr()).rkey) };
        Ok(Self { lkey: Lkey(lkey), rkey: Rkey(rkey), handle: Handle::Library(mr) })
    }

    /// Undoes the registration; when that fails it stands as before.
    #[inline]
    pub(super) fn deregister(&self, domain: &ProtectionDomain) -> io::Result<()> {
        match self.handle {
            // SAFETY: the region is live: whoever holds this object deregisters once with success.
            Handle::Library(mr) => match unsafe { ffi::ibv_dereg_mr(mr.as_ptr()) } {
                0 => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            },
            Handle::Kernel(handle) => {
                // SAFETY: the handle is of this context, live as above, and known to nobody else.
                match unsafe { uverbs::destroy(domain.context().cmd_fd(), handle) } {
                    // The device is gone, and the region went with it.
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(()),
                    answer => answer,
                }
            }
        }
    }
}

// SAFETY: libibverbs and the kernel take a region's handle from any thread.
unsafe impl Send for Registered {}
// SAFETY: as above; the keys are plain numbers.
unsafe impl Sync for Registered {}

/// Registers through the provider. Addresses are computed from the request's iova, never from
/// `mr->addr`, which libibverbs sets to the offset.
pub(super) fn register_verbs(
    call: RegDmabufMrFn,
    domain: &ProtectionDomain,
    fd: RawFd,
    request: &Request,
) -> io::Result<Registered> {
    let Request { offset, length, iova, access } = *request;
    // SAFETY: the domain is live; the descriptor is the kernel's to judge.
    let mr =
        unsafe { call(domain.as_raw().as_ptr(), offset, length as usize, iova.0, fd, access.bits() as i32) };
    Registered::library(mr)
}

/// Registers through the kernel's own command.
#[inline]
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
        // SAFETY: the handle is that of a live domain of this context, and the buffer behind the
        // descriptor is of nobody's references: this library makes none, see `dmabuf::mapping`.
        unsafe { uverbs::reg_dmabuf_mr(domain.context().cmd_fd(), &request)? };
    Ok(Registered { lkey: Lkey(lkey), rkey: Rkey(rkey), handle: Handle::Kernel(handle) })
}

/// Registers through the provider's newer verb, with a DMA handle or without.
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
    // SAFETY: the domain is live, and so is the handle, which is of its context; the attributes are read
    // during the call only; the descriptor is the kernel's to judge.
    Registered::library(unsafe { call(domain.as_raw().as_ptr(), &mut attr) })
}

/// Registers through libmlx5, for the data-direct function of the device.
pub(super) fn register_data_direct(
    call: Mlx5dvRegDmabufMrFn,
    domain: &ProtectionDomain,
    fd: RawFd,
    request: &Request,
) -> io::Result<Registered> {
    let Request { offset, length, iova, access } = *request;
    let (length, access) = (length as usize, access.bits() as i32);
    let flags = symbols::MLX5DV_REG_DMABUF_ACCESS_DATA_DIRECT;
    // SAFETY: the domain is live; libmlx5 compares the device's operations with its own before it takes
    // it for one of its devices, and answers EOPNOTSUPP to others.
    Registered::library(unsafe { call(domain.as_raw().as_ptr(), offset, length, iova.0, fd, access, flags) })
}

/// Registers the host pages behind a buffer.
pub(super) fn register_host(
    domain: &ProtectionDomain,
    backing: &Backing,
    request: &Request,
) -> io::Result<Registered> {
    let Request { offset, length, iova, access } = *request;
    let start = backing.as_ptr().wrapping_add(offset as usize).cast();
    // SAFETY: the domain is live, and the range was checked to lie in the buffer, all of which is
    // mapped; the device may write it, as the backing's users know.
    let mr = unsafe {
        ffi::ibv_reg_mr_iova2(domain.as_raw().as_ptr(), start, length as usize, iova.0, access.bits())
    };
    Registered::library(mr)
}
