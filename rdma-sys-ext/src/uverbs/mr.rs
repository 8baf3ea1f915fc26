//! Memory regions: registering a dma-buf's range without a provider, and destroying.
//!
//! A provider (the user-space half of a driver) is not needed for this: where it lacks
//! `reg_dmabuf_mr`, as soft-RoCE's does, the kernel may still have it. The memory region exists in
//! the kernel only; libibverbs has no `ibv_mr` for it, and its keys are used in work requests like
//! any others. It goes away with [`destroy`] or when the context is closed.

use super::{Attr, Command, abi};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};

/// What [`reg_dmabuf_mr`] registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegDmabufMr {
    /// The protection domain's handle on the same `cmd_fd`: `ibv_pd::handle`.
    pub pd_handle: u32,
    /// The dma-buf; -1 to ask whether the device can import at all.
    pub fd: RawFd,
    /// First byte of the range in the dma-buf.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The address of that byte in work requests and on the wire, equal to `offset` modulo the page
    /// size. Nothing is mapped there.
    pub iova: u64,
    /// `ibv_access_flags`, of which only LOCAL_WRITE, REMOTE_READ, REMOTE_WRITE, REMOTE_ATOMIC and
    /// RELAXED_ORDERING are permitted. The kernel does not compare them with the mode in which the
    /// dma-buf was opened: a read-only descriptor gets write access.
    pub access: u32,
}

/// A memory region as the kernel names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegisteredMr {
    /// For [`destroy`].
    pub handle: u32,
    /// Local key, for scatter-gather entries.
    pub lkey: u32,
    /// Remote key, for the peer.
    pub rkey: u32,
}

/// Registers a range of a dma-buf.
///
/// The kernel maps the whole buffer for the device, takes the range out of it and holds a reference:
/// the descriptor may be closed afterwards. Nothing is charged to `RLIMIT_MEMLOCK`.
///
/// With `fd` = -1 it is a probe that registers nothing: EBADF says that the kernel, the driver and
/// the arguments before the descriptor are all right, EOPNOTSUPP or EPROTONOSUPPORT that there is no
/// dma-buf import here.
///
/// # Errors
/// - EPROTONOSUPPORT: a kernel before 5.12.
/// - EOPNOTSUPP: the driver cannot import a dma-buf, or not this one (memory without struct pages).
/// - EINVAL: `offset` and `iova` differ modulo the page size; a flag that is not permitted, or
///   REMOTE_WRITE or REMOTE_ATOMIC without LOCAL_WRITE; the range is empty, overflows or passes the
///   end; `fd` is not a dma-buf.
/// - ENOENT: no such protection domain on this `cmd_fd`.
/// - EBADF: `fd` is not open.
/// - ENOMEM, and whatever the exporter returns for attaching or mapping.
/// - 524 (ENOTSUPP, a number of the kernel's own): leaked by some drivers, means EOPNOTSUPP.
///
/// # Safety
/// `request.fd` must be -1 or borrowed by the caller: open, and allowed to be used, until this
/// returns. The registration lets the device and, with a REMOTE flag, everyone who holds `rkey` use
/// that buffer's memory, so another owner's descriptor must not be named here by its number. All
/// other arguments are harmless; the kernel refuses what is wrong.
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

/// Deregisters a memory region; its keys are dead and its memory is released when this returns.
///
/// # Errors
/// - ENOENT: no such memory region on this `cmd_fd`, or no longer.
/// - EINVAL: the handle of an object of another type.
/// - EBUSY: a memory window is bound to it; it stays registered.
/// - EIO: the device is gone, and the memory region with it.
///
/// # Safety
/// `handle` must come from [`reg_dmabuf_mr`] on the same `cmd_fd`, be used by nobody else and not
/// have been destroyed yet. The kernel would as well destroy a memory region of libibverbs' on the
/// same descriptor, under an `ibv_mr` that is still in use, and it reuses numbers.
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
