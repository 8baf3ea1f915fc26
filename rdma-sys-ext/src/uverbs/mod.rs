//! The ioctl interface of `/dev/infiniband/uverbsN`, below libibverbs and its providers.
//!
//! A verbs context is a `cmd_fd`. Every object on it (protection domain, memory region, queue pair) has
//! a 32-bit handle, which libibverbs keeps in the object's `handle` field. A command names an object
//! type, a method and a list of attributes; all commands share the opcode [`IOCTL`]. [`abi`] has the
//! constants, and each object type has a submodule with its calls.
//!
//! | module | object | calls |
//! |---|---|---|
//! | [`mr`] | memory region | [`reg_dmabuf_mr`](mr::reg_dmabuf_mr), [`destroy`](mr::destroy) |
//!
//! # Errors
//! Any command may return these errnos of the kernel's `uverbs_ioctl.c`:
//! - EPROTONOSUPPORT: the kernel has no such object, method or mandatory attribute.
//! - EOPNOTSUPP: the device's driver lacks the operation.
//! - ENOENT: the handle does not exist on this `cmd_fd`.
//! - EINVAL: the handle belongs to another type of object.
//! - EIO: the device is gone.
//! - ENOTTY: not a uverbs descriptor.

pub mod abi;
pub mod mr;

pub use abi::IOCTL;

use crate::ioctl::ioctl;
use std::io;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};

/// The driver id that the kernel accepted last.
static LAST_DRIVER: AtomicU32 = AtomicU32::new(0);

/// One attribute of a command, with a borrow of the memory that the kernel may write for it.
#[repr(transparent)]
#[derive(Debug)]
struct Attr<'a>(abi::Attribute, PhantomData<&'a mut u32>);

impl<'a> Attr<'a> {
    fn new(attr_id: u16, len: usize, data: u64) -> Self {
        let attribute = abi::Attribute {
            attr_id,
            // Every value here is an integer of at most 8 bytes.
            len: len as u16,
            flags: abi::ATTR_F_MANDATORY,
            attr_data: 0,
            data,
        };
        Attr(attribute, PhantomData)
    }

    /// The handle of an existing object, or 0 for an object to create: the kernel fills it in.
    fn object(attr_id: u16, handle: u32) -> Self {
        Attr::new(attr_id, 0, handle.into())
    }

    /// A 64-bit value. The kernel reads a value of at most 8 bytes from the attribute itself.
    fn u64(attr_id: u16, value: u64) -> Self {
        Attr::new(attr_id, size_of::<u64>(), value)
    }

    /// A 32-bit value, in the first four of the eight bytes of `data`.
    #[inline]
    fn u32(attr_id: u16, value: u32) -> Self {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&value.to_ne_bytes());
        Attr::new(attr_id, size_of::<u32>(), u64::from_ne_bytes(bytes))
    }

    /// The address where the kernel writes a 32-bit answer.
    fn out_u32(attr_id: u16, answer: &'a mut u32) -> Self {
        let address = (&raw mut *answer).expose_provenance();
        Attr::new(attr_id, size_of::<u32>(), address as u64)
    }

    /// The handle in this attribute, filled in by the kernel for a new object.
    fn handle(&self) -> u32 {
        self.0.data as u32
    }
}

/// A command with its attributes, laid out as the kernel reads it.
#[repr(C)]
#[derive(Debug)]
struct Command<'a, const N: usize> {
    header: abi::Header,
    attributes: [Attr<'a>; N],
}

impl<'a, const N: usize> Command<'a, N> {
    fn new(object_id: u16, method_id: u16, attributes: [Attr<'a>; N]) -> Self {
        let header = abi::Header {
            length: size_of::<Self>() as u16,
            object_id,
            method_id,
            num_attrs: N as u16,
            ..abi::Header::default()
        };
        Command { header, attributes }
    }

    /// Runs the command and fills in the handles of new objects.
    ///
    /// The kernel first compares the driver id in the header with that of the device and returns EINVAL if they
    /// differ. libibverbs keeps the id in a private struct, so this tries the last accepted id and probes for the
    /// right one only after an EINVAL. Alternating between devices of two drivers costs a few refused calls each
    /// time.
    fn run(&mut self, cmd_fd: BorrowedFd<'_>) -> io::Result<()> {
        self.header.driver_id = LAST_DRIVER.load(Ordering::Relaxed);
        match self.ioctl(cmd_fd) {
            Ok(()) => Ok(()),
            Err(refused) => self.run_again(cmd_fd, refused),
        }
    }

    #[cold]
    fn run_again(&mut self, cmd_fd: BorrowedFd<'_>, refused: io::Error) -> io::Result<()> {
        if refused.raw_os_error() != Some(libc::EINVAL) {
            return Err(refused);
        }
        match driver_id(cmd_fd) {
            Some(right) if right != self.header.driver_id => {
                LAST_DRIVER.store(right, Ordering::Relaxed);
                self.header.driver_id = right;
                self.ioctl(cmd_fd)
            }
            _ => Err(refused),
        }
    }

    fn ioctl(&mut self, cmd_fd: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: the kernel reads the header and `num_attrs` attributes, which `new` counted. It writes
        // into the attributes and through the addresses in them; those come only from `out_u32`, whose
        // exclusive borrow lasts as long as this command.
        unsafe { ioctl(cmd_fd, IOCTL, &raw mut *self) }.map(drop)
    }
}

/// Finds the driver id of a uverbs descriptor (`enum rdma_driver_id`) without side effects: the kernel returns
/// EPROTONOSUPPORT for an unknown object type, but only after it has accepted the driver id.
fn driver_id(cmd_fd: BorrowedFd<'_>) -> Option<u32> {
    // The headers of rdma-core 65 end at 21, and each new driver gets the next id.
    const END: u32 = 256;
    let mut nothing = Command::new(abi::OBJECT_NONE, 0, []);
    (0..END).find(|&driver_id| {
        nothing.header.driver_id = driver_id;
        let answer = nothing.ioctl(cmd_fd);
        matches!(answer, Err(e) if e.raw_os_error() == Some(libc::EPROTONOSUPPORT))
    })
}

#[cfg(test)]
mod tests;
