//! Makes registrations fail on request. This program defines its own `ioctl`, which the dynamic linker
//! prefers to libc's, so the library calls it.
//!
//! `unsafe` is here to replace a C function.

use std::ffi::{c_int, c_ulong, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use rdma_sys_ext::uverbs::{IOCTL, abi};

/// A uverbs command that can fail on request.
#[derive(Clone, Copy)]
pub enum Command {
    Register,
    Deregister,
}

/// The planned fault of a command.
struct Plan {
    /// The call that fails, counted from 1; 0 for none.
    countdown: AtomicI32,
    errno: AtomicI32,
    /// The values of the failed call. The library repeats a call before it gives up, so calls with the
    /// same values fail too.
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

/// Added to the remote keys of new registrations.
static KEY_CHANGE: AtomicU32 = AtomicU32::new(0);

/// A planned fault. Dropping it removes the fault.
pub struct Fault(Command);

impl Fault {
    /// Makes call `kth` (from 0, counted over all threads) of `command` fail, and its repetitions too.
    pub fn at(command: Command, kth: usize, errno: c_int) -> Self {
        let plan = &PLANS[command as usize];
        plan.errno.store(errno, Ordering::SeqCst);
        plan.countdown.store(kth as c_int + 1, Ordering::SeqCst);
        Self(command)
    }

    /// Whether the fault has occurred.
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

/// Makes registrations return a wrong remote key until dropped: they succeed, but transfers fail.
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

/// What a kernel's driver supports, for registrations of dma-bufs by any path.
#[derive(Clone, Copy)]
pub struct Driver {
    pub access: u32,
    /// The errno for other flags.
    pub errno: c_int,
    /// The errno for every dma-buf; 0 for none.
    pub dmabuf_errno: c_int,
}

static DRIVER: Mutex<Option<Driver>> = Mutex::new(None);

/// Makes the kernel refuse what this driver does not support; `None` for rxe itself.
pub fn set_driver(driver: Option<Driver>) {
    *DRIVER.lock().unwrap() = driver;
}

impl Driver {
    /// The errno for a registration, as a driver decides: the flags come before the descriptor.
    fn refuses(self, attributes: &[abi::Attribute]) -> Option<c_int> {
        let value = |id| attributes.iter().find(|a| a.attr_id == id).map_or(0, |a| a.data as u32);
        if value(abi::REG_DMABUF_MR_ACCESS_FLAGS) & !self.access != 0 {
            return Some(self.errno);
        }
        let known = value(abi::REG_DMABUF_MR_FD) as c_int >= 0;
        Some(self.dmabuf_errno).filter(|&errno| known && errno != 0)
    }
}

/// The attributes of a command.
///
/// # Safety
/// `argument` must point to a uverbs command.
unsafe fn attributes(argument: *const c_void) -> Vec<abi::Attribute> {
    // SAFETY: a command begins with a header, which has the number of attributes that follow.
    unsafe {
        let count = usize::from((*argument.cast::<abi::Header>()).num_attrs);
        let first = argument.cast::<abi::Header>().add(1).cast::<abi::Attribute>();
        (0..count).map(|at| first.add(at).read()).collect()
    }
}

/// The input values of a command, without the addresses of its answers.
fn values(attributes: &[abi::Attribute]) -> Vec<u64> {
    let answers = [abi::REG_DMABUF_MR_RESP_LKEY, abi::REG_DMABUF_MR_RESP_RKEY];
    attributes.iter().filter(|a| !answers.contains(&a.attr_id)).map(|a| a.data).collect()
}

/// # Safety
/// As for ioctl(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let command = if request == IOCTL as c_ulong {
        // SAFETY: the argument of this request begins with a header.
        let header = unsafe { argument.cast::<abi::Header>().read() };
        match (header.object_id, header.method_id) {
            (abi::OBJECT_MR, abi::MR_REG_DMABUF) => {
                // A probe has no descriptor and is no registration.
                // SAFETY: the argument points to a uverbs command.
                let attributes = unsafe { attributes(argument) };
                let driver = *DRIVER.lock().unwrap();
                if let Some(errno) = driver.and_then(|driver| driver.refuses(&attributes)) {
                    // SAFETY: this is the address of this thread's errno.
                    unsafe { *libc::__errno_location() = errno };
                    return -1;
                }
                let fd = attributes.iter().find(|a| a.attr_id == abi::REG_DMABUF_MR_FD);
                fd.is_some_and(|fd| fd.data as i32 >= 0).then_some(Command::Register)
            }
            (abi::OBJECT_MR, abi::MR_DESTROY) => Some(Command::Deregister),
            _ => None,
        }
    } else {
        None
    };
    if let Some(command) = command {
        let plan = &PLANS[command as usize];
        // SAFETY: the argument points to a uverbs command.
        if plan.fails(values(&unsafe { attributes(argument) })) {
            // SAFETY: this is the address of this thread's errno.
            unsafe { *libc::__errno_location() = plan.errno.load(Ordering::SeqCst) };
            return -1;
        }
    }
    // SAFETY: the caller vouches for the arguments, which are passed on.
    let answer = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) as c_int };
    let change = KEY_CHANGE.load(Ordering::SeqCst);
    if let (0, Some(Command::Register), 1..) = (answer, command, change) {
        // SAFETY: the argument points to a uverbs command, whose attribute of the remote key has the
        // address of the caller's u32.
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
