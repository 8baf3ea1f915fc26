//! Registrations that fail when a test says so: this program's own `ioctl`, which the dynamic linker
//! prefers to libc's, so that the library's one private function for each command meets it.
//!
//! `unsafe` is here for standing in for a C function.

use std::ffi::{c_int, c_ulong, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use rdma_sys_ext::uverbs::{IOCTL, abi};

/// A command of the kernel's that can be made to fail.
#[derive(Clone, Copy)]
pub enum Command {
    Register,
    Deregister,
}

/// Per command: after how many calls one fails, from 1, 0 for no more; its errno; and what that call was
/// about, as the library asks again before it gives up.
struct Plan {
    countdown: AtomicI32,
    errno: AtomicI32,
    failed: Mutex<Option<Vec<u64>>>,
}

static PLANS: [Plan; 2] =
    [const { Plan { countdown: AtomicI32::new(0), errno: AtomicI32::new(0), failed: Mutex::new(None) } }; 2];

impl Plan {
    /// Whether a call with these values fails.
    fn fails(&self, values: Vec<u64>) -> bool {
        let mut failed = self.failed.lock().unwrap();
        if failed.as_ref() == Some(&values) {
            return true;
        }
        let due =
            self.countdown.load(Ordering::SeqCst) > 0 && self.countdown.fetch_sub(1, Ordering::SeqCst) == 1;
        if due {
            *failed = Some(values);
        }
        due
    }
}

/// What the remote key of the next registrations is changed by.
static KEY_CHANGE: AtomicU32 = AtomicU32::new(0);

/// A fault that is planned, until dropped.
pub struct Fault(Command);

impl Fault {
    /// Has the `kth` call, from 0, of such a command fail, of all threads together, and whichever asks
    /// the same again.
    pub fn at(command: Command, kth: usize, errno: c_int) -> Self {
        let plan = &PLANS[command as usize];
        plan.errno.store(errno, Ordering::SeqCst);
        plan.countdown.store(kth as c_int + 1, Ordering::SeqCst);
        Self(command)
    }

    /// Whether it has happened.
    pub fn happened(&self) -> bool {
        PLANS[self.0 as usize].failed.lock().unwrap().is_some()
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        let plan = &PLANS[self.0 as usize];
        plan.countdown.store(0, Ordering::SeqCst);
        *plan.failed.lock().unwrap() = None;
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

/// The attributes of a command.
///
/// # Safety
/// The argument is that of a uverbs command.
unsafe fn attributes(argument: *const c_void) -> Vec<abi::Attribute> {
    // SAFETY: a command begins with a header, which says how many attributes follow it.
    unsafe {
        let count = usize::from((*argument.cast::<abi::Header>()).num_attrs);
        let first = argument.cast::<abi::Header>().add(1).cast::<abi::Attribute>();
        (0..count).map(|at| first.add(at).read()).collect()
    }
}

/// The values that a command is about: not the addresses of its answers.
fn values(attributes: &[abi::Attribute]) -> Vec<u64> {
    let answers = [abi::REG_DMABUF_MR_RESP_LKEY, abi::REG_DMABUF_MR_RESP_RKEY];
    attributes.iter().filter(|a| !answers.contains(&a.attr_id)).map(|a| a.data).collect()
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
        // SAFETY: the argument is that of a uverbs command.
        if plan.fails(values(&unsafe { attributes(argument) })) {
            // SAFETY: the address of this thread's errno.
            unsafe { *libc::__errno_location() = plan.errno.load(Ordering::SeqCst) };
            return -1;
        }
    }
    // SAFETY: the caller answers for the arguments, which are passed on.
    let answer = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) as c_int };
    let change = KEY_CHANGE.load(Ordering::SeqCst);
    if let (0, Some(Command::Register), 1..) = (answer, command, change) {
        // SAFETY: the argument is that of a uverbs command, in which the attribute of the remote key has
        // the address of a u32 of the caller's.
        unsafe {
            let attributes = attributes(argument);
            for attribute in attributes.iter().filter(|a| a.attr_id == abi::REG_DMABUF_MR_RESP_RKEY) {
                let key = std::ptr::with_exposed_provenance_mut::<u32>(attribute.data as usize);
                *key = (*key).wrapping_add(change);
            }
        }
    }
    answer
}
