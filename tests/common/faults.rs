//! Registrations that fail when a test says so: this program's own `ioctl`, which the dynamic linker
//! prefers to libc's, so that the library's one private function for each command meets it.
//!
//! `unsafe` is here for standing in for a C function.

use std::ffi::{c_int, c_ulong, c_void};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use rdma_sys_ext::uverbs::{IOCTL, abi};

/// A command of the kernel's that can be made to fail.
#[derive(Clone, Copy)]
pub enum Command {
    Register,
    Deregister,
}

/// Per command: which call from now on fails, from 1, 0 for none; and its errno.
struct Plan {
    countdown: AtomicI32,
    errno: AtomicI32,
}

static PLANS: [Plan; 2] = [const { Plan { countdown: AtomicI32::new(0), errno: AtomicI32::new(0) } }; 2];

/// What the remote key of the next registrations is changed by.
static KEY_CHANGE: AtomicU32 = AtomicU32::new(0);

/// A fault that is planned, until dropped.
pub struct Fault(Command);

impl Fault {
    /// Has the `kth` call, from 0, of such a command fail, of all threads together.
    pub fn at(command: Command, kth: usize, errno: c_int) -> Self {
        let plan = &PLANS[command as usize];
        plan.errno.store(errno, Ordering::SeqCst);
        plan.countdown.store(kth as c_int + 1, Ordering::SeqCst);
        Self(command)
    }

    /// Whether it has happened.
    pub fn happened(&self) -> bool {
        PLANS[self.0 as usize].countdown.load(Ordering::SeqCst) <= 0
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        PLANS[self.0 as usize].countdown.store(0, Ordering::SeqCst);
    }
}

/// Has registrations return a remote key that is not theirs, until dropped: they register, and do not
/// transfer.
pub struct WrongKeys(());

impl WrongKeys {
    pub fn new() -> Self {
        KEY_CHANGE.store(0x100, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for WrongKeys {
    fn drop(&mut self) {
        KEY_CHANGE.store(0, Ordering::SeqCst);
    }
}

/// # Safety
/// As of ioctl(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let command = if request == IOCTL as c_ulong {
        // SAFETY: the argument of this request begins with such a header.
        let header = unsafe { argument.cast::<abi::Header>().read() };
        match (header.object_id, header.method_id) {
            (abi::OBJECT_MR, abi::MR_REG_DMABUF) => Some(Command::Register),
            (abi::OBJECT_MR, abi::MR_DESTROY) => Some(Command::Deregister),
            _ => None,
        }
    } else {
        None
    };
    if let Some(command) = command {
        let plan = &PLANS[command as usize];
        if plan.countdown.load(Ordering::SeqCst) > 0 && plan.countdown.fetch_sub(1, Ordering::SeqCst) == 1 {
            // SAFETY: the address of this thread's errno.
            unsafe { *libc::__errno_location() = plan.errno.load(Ordering::SeqCst) };
            return -1;
        }
    }
    // SAFETY: the caller answers for the arguments, which are passed on.
    let answer = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) as c_int };
    let change = KEY_CHANGE.load(Ordering::SeqCst);
    if let (0, Some(Command::Register), 1..) = (answer, command, change) {
        // SAFETY: the header is followed by its attributes; that of the remote key has the address of a
        // u32 of the caller's.
        unsafe {
            let count = usize::from((*argument.cast::<abi::Header>()).num_attrs);
            let first = argument.cast::<abi::Header>().add(1).cast::<abi::Attribute>();
            for attribute in (0..count).map(|at| first.add(at).read()) {
                if attribute.attr_id == abi::REG_DMABUF_MR_RESP_RKEY {
                    let key = std::ptr::with_exposed_provenance_mut::<u32>(attribute.data as usize);
                    *key = (*key).wrapping_add(change);
                }
            }
        }
    }
    answer
}
