//! Constants and structs of the uverbs ioctl: `rdma/rdma_user_ioctl_cmds.h` and
//! `rdma/ib_user_ioctl_cmds.h`.

/// The opcode of every uverbs command. The size in it is that of the header alone.
#[doc(alias = "RDMA_VERBS_IOCTL")]
pub const IOCTL: libc::Ioctl = libc::_IOWR::<Header>(0x1b, 1);

/// The start of every command; `num_attrs` [`Attribute`]s follow it.
#[doc(alias = "ib_uverbs_ioctl_hdr")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the command including its attributes, at most one page.
    pub length: u16,
    /// Object type: [`OBJECT_MR`].
    pub object_id: u16,
    /// Method of that type: `MR_*`.
    pub method_id: u16,
    /// Number of attributes.
    pub num_attrs: u16,
    /// Zero, else EPROTONOSUPPORT.
    pub reserved1: u64,
    /// Id of the device's driver (`enum rdma_driver_id`), else EINVAL.
    pub driver_id: u32,
    /// Zero, else EPROTONOSUPPORT.
    pub reserved2: u32,
}

/// One attribute of a command.
#[doc(alias = "ib_uverbs_attr")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attribute {
    /// Id of the attribute within the method.
    pub attr_id: u16,
    /// Bytes of the value; 0 for a handle.
    pub len: u16,
    /// [`ATTR_F_MANDATORY`]; the kernel sets [`ATTR_F_VALID_OUTPUT`].
    pub flags: u16,
    /// Element of an enumerated attribute; zero for all others.
    pub attr_data: u16,
    /// Input: the handle, or the value if it has at most 8 bytes, else its address. Output: the address
    /// where the kernel writes the answer.
    pub data: u64,
}

/// A kernel that does not know the attribute refuses the command.
#[doc(alias = "UVERBS_ATTR_F_MANDATORY")]
pub const ATTR_F_MANDATORY: u16 = 1 << 0;
/// Set by the kernel: it has written the answer.
#[doc(alias = "UVERBS_ATTR_F_VALID_OUTPUT")]
pub const ATTR_F_VALID_OUTPUT: u16 = 1 << 1;

/// An object type that exists in no kernel.
pub const OBJECT_NONE: u16 = 0xffff;
/// Memory regions.
#[doc(alias = "UVERBS_OBJECT_MR")]
pub const OBJECT_MR: u16 = 7;

/// Deregisters a memory region.
#[doc(alias = "UVERBS_METHOD_MR_DESTROY")]
pub const MR_DESTROY: u16 = 1;
/// Registers a range of a dma-buf. Linux 5.12.
#[doc(alias = "UVERBS_METHOD_REG_DMABUF_MR")]
pub const MR_REG_DMABUF: u16 = 4;

/// [`MR_DESTROY`], in: the memory region.
#[doc(alias = "UVERBS_ATTR_DESTROY_MR_HANDLE")]
pub const DESTROY_MR_HANDLE: u16 = 0;

/// [`MR_REG_DMABUF`], out: the new memory region.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_HANDLE")]
pub const REG_DMABUF_MR_HANDLE: u16 = 0;
/// [`MR_REG_DMABUF`], in: the protection domain.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_PD_HANDLE")]
pub const REG_DMABUF_MR_PD_HANDLE: u16 = 1;
/// [`MR_REG_DMABUF`], in, 64 bits: offset of the range in the dma-buf, in bytes.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_OFFSET")]
pub const REG_DMABUF_MR_OFFSET: u16 = 2;
/// [`MR_REG_DMABUF`], in, 64 bits: length of the range in bytes.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_LENGTH")]
pub const REG_DMABUF_MR_LENGTH: u16 = 3;
/// [`MR_REG_DMABUF`], in, 64 bits: the iova, which is the address of the first byte on the wire.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_IOVA")]
pub const REG_DMABUF_MR_IOVA: u16 = 4;
/// [`MR_REG_DMABUF`], in, 32 bits (other descriptors in this interface have 64): the dma-buf.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_FD")]
pub const REG_DMABUF_MR_FD: u16 = 5;
/// [`MR_REG_DMABUF`], in, 32 bits: `ibv_access_flags`.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_ACCESS_FLAGS")]
pub const REG_DMABUF_MR_ACCESS_FLAGS: u16 = 6;
/// [`MR_REG_DMABUF`], out, 32 bits: the local key.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_RESP_LKEY")]
pub const REG_DMABUF_MR_RESP_LKEY: u16 = 7;
/// [`MR_REG_DMABUF`], out, 32 bits: the remote key.
#[doc(alias = "UVERBS_ATTR_REG_DMABUF_MR_RESP_RKEY")]
pub const REG_DMABUF_MR_RESP_RKEY: u16 = 8;
