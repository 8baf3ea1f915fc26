//! Operations that the library does not have, on a dma-buf region: the kernel's interface directly, and work
//! requests written into soft-RoCE's send queue, as its provider would.
//!
//! `unsafe` is here for C calls and for the queue, which this process shares with the kernel.

use std::fs::File;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::verbs::{ProtectionDomain, QueuePair};
use ibverbs_sys as ffi;
use rdma_sys_ext::uverbs::mr::{RegDmabufMr, RegisteredMr, destroy, reg_dmabuf_mr};
use rdma_sys_ext::uverbs::{IOCTL, abi};
use rdma_sys_ext::verbs::post_send;

/// Access flags.
pub const LOCAL_WRITE: u32 = 1;
pub const REMOTE_WRITE: u32 = 1 << 1;
pub const REMOTE_READ: u32 = 1 << 2;
pub const REMOTE_ATOMIC: u32 = 1 << 3;
pub const MW_BIND: u32 = 1 << 4;
pub const ZERO_BASED: u32 = 1 << 5;
pub const ON_DEMAND: u32 = 1 << 6;
pub const HUGETLB: u32 = 1 << 7;
pub const FLUSH_GLOBAL: u32 = 1 << 8;
pub const FLUSH_PERSISTENT: u32 = 1 << 9;
pub const RELAXED_ORDERING: u32 = 1 << 20;
pub const REMOTE: u32 = LOCAL_WRITE | REMOTE_WRITE | REMOTE_READ | REMOTE_ATOMIC;

/// What a re-registration changes.
pub const CHANGE_TRANSLATION: u32 = 1;
pub const CHANGE_PD: u32 = 1 << 1;
pub const CHANGE_ACCESS: u32 = 1 << 2;

fn command_fd(pd: &ProtectionDomain) -> BorrowedFd<'_> {
    // SAFETY: the context lives as long as the domain, and has its descriptor open.
    unsafe { BorrowedFd::borrow_raw((*pd.context().as_raw().as_ptr()).cmd_fd) }
}

fn handle(pd: &ProtectionDomain) -> u32 {
    // SAFETY: the domain is live.
    unsafe { (*pd.as_raw().as_ptr()).handle }
}

/// Sends a command of the older interface, write(2). The fields follow the command's number and lengths.
fn command(fd: BorrowedFd<'_>, number: u32, answer_words: u16, fields: &[u32]) -> io::Result<()> {
    let words = fields.len() as u32 + 2;
    let mut bytes = Vec::new();
    for word in [number, words | u32::from(answer_words) << 16].iter().chain(fields) {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    // SAFETY: the descriptor is borrowed, so the file must not close it.
    let mut file = ManuallyDrop::new(unsafe { File::from_raw_fd(fd.as_raw_fd()) });
    file.write_all(&bytes)
}

/// The two halves of a 64-bit field.
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// A region of a whole buffer, with iova 0.
pub struct RawRegion {
    domain: ProtectionDomain,
    pub keys: RegisteredMr,
    pub length: u64,
    alive: bool,
}

impl RawRegion {
    pub fn new(domain: &ProtectionDomain, buffer: &DmaBuf, access: u32) -> io::Result<Self> {
        let request = RegDmabufMr {
            pd_handle: handle(domain),
            fd: buffer.as_fd().as_raw_fd(),
            offset: 0,
            length: buffer.size(),
            iova: 0,
            access,
        };
        // SAFETY: the buffer is borrowed for the call.
        let keys = unsafe { reg_dmabuf_mr(command_fd(domain), &request) }?;
        Ok(Self { domain: domain.clone(), keys, length: buffer.size(), alive: true })
    }

    /// `ibv_rereg_mr`, without a provider.
    pub fn rereg(&self, changes: u32, pd: &ProtectionDomain, access: u32) -> io::Result<()> {
        let mut answer = [0_u32; 2];
        let address = (&raw mut answer).expose_provenance() as u64;
        let fields = [
            halves(address),
            [self.keys.handle, changes],
            halves(0),
            halves(self.length / 2),
            halves(0),
            [handle(pd), access],
        ];
        command(command_fd(&self.domain), 11, 2, fields.as_flattened())
    }

    pub fn deregister(mut self) -> io::Result<()> {
        self.alive = false;
        self.try_deregister()
    }

    /// Deregisters the region if nothing keeps it.
    pub fn try_deregister(&self) -> io::Result<()> {
        // SAFETY: the handle is of this region, and of no other until this succeeds; then the test ends.
        unsafe { destroy(command_fd(&self.domain), self.keys.handle) }
    }
}

impl Drop for RawRegion {
    fn drop(&mut self) {
        if self.alive {
            self.try_deregister().expect("deregister");
        }
    }
}

/// Allocates a DMA handle (`ibv_alloc_dmah`) without options. A device that refuses handles cannot be given one
/// at a registration.
pub fn alloc_dma_handle(domain: &ProtectionDomain) -> io::Result<()> {
    const OBJECT_DMAH: u16 = 17;
    const DRIVER_RXE: u32 = 14;
    #[repr(C)]
    struct Command(abi::Header, abi::Attribute);
    let header = abi::Header {
        length: size_of::<Command>() as u16,
        object_id: OBJECT_DMAH,
        num_attrs: 1,
        driver_id: DRIVER_RXE,
        ..Default::default()
    };
    let handle = abi::Attribute { flags: abi::ATTR_F_MANDATORY, ..Default::default() };
    let mut command = Command(header, handle);
    // SAFETY: the command lives through the call, and its attribute names no memory.
    match unsafe { libc::ioctl(command_fd(domain).as_raw_fd(), IOCTL, &raw mut command) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A memory window of type 2.
pub struct Window(NonNull<ffi::ibv_mw>);

impl Window {
    pub fn new(domain: &ProtectionDomain) -> Self {
        let pd = domain.as_raw().as_ptr();
        // SAFETY: the domain is live.
        let window = unsafe { (*(*pd).context).ops.alloc_mw.unwrap()(pd, ffi::IBV_MW_TYPE_2) };
        Self(NonNull::new(window).expect("a memory window"))
    }

    /// The key that the next binding may give: the same index with another low byte.
    pub fn next_key(&self) -> u32 {
        // SAFETY: the window is live.
        let key = unsafe { self.0.as_ref() }.rkey;
        key & !0xff | (key as u8).wrapping_add(1) as u32
    }

    /// Posts the binding of a range of the region, with remote access.
    pub fn bind(&self, pair: &QueuePair, region: &RawRegion, address: u64, length: u64) -> u32 {
        let rkey = self.next_key();
        let mut mr = ffi::ibv_mr { lkey: region.keys.lkey, rkey: region.keys.rkey, ..Default::default() };
        let mut request = request(ffi::ibv_wr_opcode::IBV_WR_BIND_MW);
        request.__bindgen_anon_2.bind_mw.mw = self.0.as_ptr();
        request.__bindgen_anon_2.bind_mw.rkey = rkey;
        request.__bindgen_anon_2.bind_mw.bind_info = ffi::ibv_mw_bind_info {
            mr: &raw mut mr,
            addr: address,
            length,
            mw_access_flags: REMOTE & !LOCAL_WRITE,
        };
        post(pair, request);
        rkey
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the window is live and destroyed once.
        let errno = unsafe { (*self.0.as_ref().context).ops.dealloc_mw.unwrap()(self.0.as_ptr()) };
        assert_eq!(errno, 0, "dealloc_mw");
    }
}

/// Posts the invalidation of a key by this side.
pub fn invalidate(pair: &QueuePair, key: u32) {
    let mut request = request(ffi::ibv_wr_opcode::IBV_WR_LOCAL_INV);
    request.__bindgen_anon_1.invalidate_rkey = key;
    post(pair, request);
}

/// Posts an empty SEND that invalidates a key of the receiver's.
pub fn send_with_invalidate(pair: &QueuePair, key: u32) {
    let mut request = request(ffi::ibv_wr_opcode::IBV_WR_SEND_WITH_INV);
    request.__bindgen_anon_1.invalidate_rkey = key;
    post(pair, request);
}

fn request(opcode: ffi::ibv_wr_opcode::Type) -> ffi::ibv_send_wr {
    let send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
    ffi::ibv_send_wr { wr_id: 77, opcode, send_flags, ..Default::default() }
}

fn post(pair: &QueuePair, mut request: ffi::ibv_send_wr) {
    // SAFETY: the queue pair is live, and the request names memory by keys only.
    let errno = unsafe { post_send(pair.as_raw().as_ptr(), &mut request, &mut null_mut()) };
    assert_eq!(errno, 0, "ibv_post_send");
}

/// Lets the peer flush through this queue pair.
pub fn allow_flush(pair: &QueuePair) {
    let access = REMOTE | FLUSH_GLOBAL | FLUSH_PERSISTENT;
    let mut attr = ffi::ibv_qp_attr { qp_access_flags: access, ..Default::default() };
    let mask = ffi::ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS.0 as i32;
    // SAFETY: the queue pair is live.
    assert_eq!(unsafe { ffi::ibv_modify_qp(pair.as_raw().as_ptr(), &mut attr, mask) }, 0, "modify_qp");
}

/// An operation of newer providers than Debian 12's.
#[derive(Clone, Copy)]
pub enum Newer {
    /// All bytes that earlier requests wrote are visible; type 1 is global, 2 persistent.
    Flush { kind: u8, length: u32 },
    /// Eight bytes at once.
    AtomicWrite([u8; 8]),
}

/// Offsets in `struct rxe_queue_buf` and `struct rxe_send_wqe` of rdma/rdma_user_rxe.h.
mod at {
    pub const PRODUCER: usize = 128;
    pub const SLOTS: usize = 384;
    pub const OPCODE: usize = 12;
    pub const REMOTE: usize = 24;
    pub const STATUS: usize = 144;
    pub const STATE: usize = 148;
    pub const IOVA: usize = 152;
    pub const RD_ATOMIC: usize = 180;
    pub const DMA: usize = 184;
    pub const INLINE: usize = 208;
}

/// Writes a request into the send queue and rings the doorbell. The last request must have been an RDMA WRITE
/// with this identifier that completed: its slot finds the queue, and is the pattern of the new one.
pub fn post_newer(pair: &QueuePair, wr_id: u64, operation: Newer, address: u64, rkey: u32) {
    let (queue, slots, size) = queue_with(wr_id);
    // SAFETY: the queue is mapped while the queue pair lives. The kernel reads a slot once the producer index
    // includes it, and nobody else posts to this queue pair.
    unsafe {
        let producer = AtomicU32::from_ptr(queue.add(at::PRODUCER).cast());
        let index = producer.load(Ordering::Acquire);
        let slot = |index: u32| queue.add(at::SLOTS + (index & (slots - 1)) as usize * size);
        let new = slot(index);
        slot(index.wrapping_sub(1)).copy_to_nonoverlapping(new, size);
        let put = |offset: usize, value: &[u8]| value.as_ptr().copy_to(new.add(offset), value.len());
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        put(at::STATUS, &words(&[0]));
        put(at::STATE, &words(&[0]));
        put(at::RD_ATOMIC, &words(&[0]));
        put(at::IOVA, &address.to_ne_bytes());
        put(at::REMOTE, &address.to_ne_bytes());
        match operation {
            Newer::Flush { kind, length } => {
                put(at::OPCODE, &words(&[14]));
                put(at::REMOTE + 8, &words(&[length, rkey, u32::from(kind)]));
                put(at::DMA, &words(&[length, length, 0, 0, 0, 0]));
            }
            Newer::AtomicWrite(value) => {
                put(at::OPCODE, &words(&[15]));
                put(at::REMOTE + 8, &words(&[rkey, 0]));
                put(at::DMA, &words(&[8, 8, 0, 0, 0, 0]));
                put(at::INLINE, &value);
            }
        }
        producer.store(index.wrapping_add(1), Ordering::Release);
        let qp = pair.as_raw().as_ptr();
        let mut answer = 0_u32;
        let response = halves((&raw mut answer).expose_provenance() as u64);
        let context = BorrowedFd::borrow_raw((*(*qp).context).cmd_fd);
        command(context, 28, 1, &[response[0], response[1], (*qp).handle, 0, 0, 128]).expect("the doorbell");
    }
}

/// The send queue whose last request has this identifier: its address, number of slots and their size.
fn queue_with(wr_id: u64) -> (*mut u8, u32, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc/self/maps");
    for line in maps.lines().filter(|line| line.contains("infiniband/uverbs")) {
        let (from, rest) = line.split_once('-').expect("a range");
        let (to, _) = rest.split_once(' ').expect("a range");
        let [from, to] = [from, to].map(|text| usize::from_str_radix(text, 16).expect("an address"));
        let queue = std::ptr::with_exposed_provenance_mut::<u8>(from);
        // SAFETY: the mapping begins with a rxe_queue_buf. It is not unmapped meanwhile: the tests that have
        // queue pairs run one at a time.
        let (size, mask, producer) = unsafe {
            let words = queue.cast::<u32>();
            (1 << words.read_volatile().min(20), words.add(1).read_volatile(), {
                words.add(at::PRODUCER / 4).read_volatile()
            })
        };
        let slot = at::SLOTS + (producer.wrapping_sub(1) & mask) as usize * size;
        if size < at::INLINE || slot + size > to - from {
            continue;
        }
        // SAFETY: the slot is in the mapping, and aligned as its size.
        if unsafe { queue.add(slot).cast::<u64>().read_volatile() } == wr_id {
            return (queue, mask + 1, size);
        }
    }
    panic!("no send queue has a request {wr_id:#x}; the device is no soft-RoCE");
}
