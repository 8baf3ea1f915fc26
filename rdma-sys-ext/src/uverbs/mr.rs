//! Memory regions: registers a range of a dma-buf without a provider, and destroys it.
//!
//! A provider is the user-space half of a driver. Where it lacks `reg_dmabuf_mr`, as soft-RoCE's does,
//! the kernel may still have the operation. The memory region exists only in the kernel: libibverbs has
//! no `ibv_mr` for it. Its keys work in work requests like any others. It ends with [`destroy`] or when
//! the context is closed.

use super::{Attr, Command, abi};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};

/// Arguments of [`reg_dmabuf_mr`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegDmabufMr {
    /// The protection domain's handle on the same `cmd_fd`: `ibv_pd::handle`.
    pub pd_handle: u32,
    /// The dma-buf; -1 probes whether the device can import one.
    pub fd: RawFd,
    /// Offset of the range in the dma-buf, in bytes.
    pub offset: u64,
    /// Length of the range in bytes.
    pub length: u64,
    /// Address of the first byte in work requests and on the wire, equal to `offset` modulo the page
    /// size. The process has nothing mapped there.
    pub iova: u64,
    /// `ibv_access_flags`: any of LOCAL_WRITE, REMOTE_READ, REMOTE_WRITE, REMOTE_ATOMIC and
    /// RELAXED_ORDERING. The kernel does not compare them with the access mode of the descriptor: a
    /// read-only descriptor gets write access.
    pub access: u32,
}

/// The handle and keys of a new memory region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegisteredMr {
    /// The kernel's handle, for [`destroy`].
    pub handle: u32,
    /// Local key, for scatter-gather elements.
    pub lkey: u32,
    /// Remote key, for the peer.
    pub rkey: u32,
}

/// Registers a range of a dma-buf.
///
/// The kernel maps the whole buffer for the device, keeps the range and holds a reference to the
/// buffer, so you may close the descriptor afterwards. Nothing is charged to `RLIMIT_MEMLOCK`.
///
/// With `fd` = -1 the call is a probe that registers nothing. EBADF means that the kernel and the driver
/// support the import and accept the other arguments. EOPNOTSUPP or EPROTONOSUPPORT means that they do
/// not support it.
///
/// # Errors
/// - EPROTONOSUPPORT: a kernel before 5.12.
/// - EOPNOTSUPP: the driver cannot import a dma-buf, or not this one (memory without struct pages).
/// - EINVAL: `offset` and `iova` differ modulo the page size; a flag is not permitted; REMOTE_WRITE or
///   REMOTE_ATOMIC is set without LOCAL_WRITE; the range is empty, overflows or passes the end; or `fd`
///   is not a dma-buf.
/// - ENOENT: no such protection domain on this `cmd_fd`.
/// - EBADF: `fd` is not open.
/// - ENOMEM.
/// - Any errno of the exporter's attach or map.
/// - 524 (ENOTSUPP, internal to the kernel): some drivers leak it; it means EOPNOTSUPP.
///
/// # Safety
/// `request.fd` must be -1 or a descriptor that the caller borrows until this returns. The registration
/// gives the device access to the buffer's memory, and with a REMOTE flag also every peer that has
/// `rkey`, so `fd` must not be a descriptor of another owner. The kernel checks all other arguments.
///
/// Kernel: `UVERBS_METHOD_REG_DMABUF_MR` in `drivers/infiniband/core/uverbs_std_types_mr.c`;
/// rdma-core: `ibv_cmd_reg_dmabuf_mr` in `libibverbs/cmd_mr.c`.
#[doc(alias = "UVERBS_METHOD_REG_DMABUF_MR")]
#[doc(alias = "ibv_cmd_reg_dmabuf_mr")]
#[inline]
pub unsafe fn reg_dmabuf_mr(cmd_fd: BorrowedFd<'_>, request: &RegDmabufMr) -> io::Result<RegisteredMr> {
    let (mut lkey, mut rkey) = (0, 0);
    let mut command = Command::new(
        abi::OBJECT_MR,
        abi::MR_REG_DMABUF,
        [
            Attr::object(abi::REG_DMABUF_MR_HANDLE, 0),
            Attr::object(abi::REG_DMABUF_MR_PD_HANDLE, request.pd_handle),
            Attr::u64(abi::REG_DMABUF_MR_OFFSET, request.offset),
            Attr::u64(abi::REG_DMABUF_MR_LENGTH, request.length),
            Attr::u64(abi::REG_DMABUF_MR_IOVA, request.iova),
            Attr::u32(abi::REG_DMABUF_MR_FD, request.fd as u32),
            Attr::u32(abi::REG_DMABUF_MR_ACCESS_FLAGS, request.access),
            Attr::out_u32(abi::REG_DMABUF_MR_RESP_LKEY, &mut lkey),
            Attr::out_u32(abi::REG_DMABUF_MR_RESP_RKEY, &mut rkey),
        ],
    );
    command.run(cmd_fd)?;
    let handle = command.attributes[0].handle();
    Ok(RegisteredMr { handle, lkey, rkey })
}

/// Deregisters a memory region. When this returns, its keys are invalid and its memory is released.
///
/// # Errors
/// - ENOENT: this `cmd_fd` has no such memory region (any more).
/// - EINVAL: the handle belongs to another type of object.
/// - EBUSY: a memory window is bound to the region, which stays registered.
/// - EIO: the device is gone, and the memory region with it.
///
/// # Safety
/// `handle` must come from [`reg_dmabuf_mr`] on the same `cmd_fd`, must not be in use elsewhere and must
/// not have been destroyed. The kernel reuses handles, and would also destroy a memory region of
/// libibverbs on the same descriptor while its `ibv_mr` is in use.
///
/// Kernel: `UVERBS_METHOD_MR_DESTROY` in `drivers/infiniband/core/uverbs_std_types_mr.c`;
/// rdma-core: `ibv_cmd_dereg_mr` in `libibverbs/cmd_mr.c`.
#[doc(alias = "UVERBS_METHOD_MR_DESTROY")]
#[doc(alias = "ibv_cmd_dereg_mr")]
#[inline]
pub unsafe fn destroy(cmd_fd: BorrowedFd<'_>, handle: u32) -> io::Result<()> {
    let attributes = [Attr::object(abi::DESTROY_MR_HANDLE, handle)];
    Command::new(abi::OBJECT_MR, abi::MR_DESTROY, attributes).run(cmd_fd)
}
