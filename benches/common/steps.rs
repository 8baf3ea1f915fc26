//! Counts instructions without a hardware counter, for example in an emulated guest: a child process does
//! the work, and this process single-steps it.

use std::process;

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::Result;

/// Counts the user-mode instructions of `work` and of the two signals around it.
pub fn count(work: impl FnOnce()) -> Result<u64> {
    // SAFETY: the program has one thread when it forks, and the child exits without returning.
    match unsafe { fork()? } {
        ForkResult::Child => {
            let stop = || raise(Signal::SIGSTOP).is_ok();
            let done = ptrace::traceme().is_ok() && stop() && {
                work();
                stop()
            };
            // Not `exit`: exit handlers would run on the child's copies of the parent's objects.
            // SAFETY: the argument is a number.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        ForkResult::Parent { child } => {
            let steps = step(child);
            // The child may have ended already.
            let _ = ptrace::kill(child);
            let _ = waitpid(child, None);
            steps
        }
    }
}

fn step(child: Pid) -> Result<u64> {
    let stopped = |status| matches!(status, WaitStatus::Stopped(_, Signal::SIGSTOP));
    if !stopped(waitpid(child, None)?) {
        return Err(format!(
            "process {} cannot trace its child: it did not stop with SIGSTOP",
            process::id()
        )
        .into());
    }
    let mut steps = 0;
    loop {
        ptrace::step(child, None)?;
        match waitpid(child, None)? {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => steps += 1,
            status if stopped(status) => return Ok(steps),
            status => return Err(format!("unexpected status of the traced child: {status:?}").into()),
        }
    }
}

/// IB_USER_VERBS_CMD_POST_SEND. On soft-RoCE `ibv_post_send` is a write(2) of this command to the device.
#[allow(dead_code)] // not every benchmark uses it
const POST_SEND: i64 = 28;

/// Lets a running process continue until it posts its first WR chain. Then counts its user-mode instructions
/// until it has posted `lists` more chains, and detaches.
#[allow(dead_code)] // not every benchmark uses it
#[cfg(target_arch = "x86_64")]
pub fn between_posts(pid: Pid, lists: u64) -> Result<u64> {
    ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD)?;
    ptrace::interrupt(pid)?;
    let (mut steps, mut left) = (None, lists);
    // The address after the syscall instruction, which is the same for all posts.
    let mut after = 0;
    while left > 0 {
        let mut signal = None;
        match waitpid(pid, None)? {
            WaitStatus::PtraceSyscall(_) => {
                let info = ptrace::syscall_info(pid)?;
                // SAFETY: `op` says that this is a system call entry.
                let writes = info.op == libc::PTRACE_SYSCALL_INFO_ENTRY
                    && unsafe { info.u.entry.nr } == libc::SYS_write as u64;
                if writes && posts(pid)? {
                    (steps, after) = (Some(0), info.instruction_pointer);
                }
            }
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                steps = steps.map(|steps| steps + 1);
                if ptrace::getregs(pid)?.rip == after && posts(pid)? {
                    left -= 1;
                }
            }
            WaitStatus::Stopped(_, other) => signal = Some(other),
            WaitStatus::PtraceEvent(..) => {}
            status => return Err(format!("unexpected status of the traced process: {status:?}").into()),
        }
        match steps {
            _ if left == 0 => ptrace::detach(pid, signal)?,
            Some(_) => ptrace::step(pid, signal)?,
            None => ptrace::syscall(pid, signal)?,
        }
    }
    steps.ok_or_else(|| "the traced process posted no work request".into())
}

/// Whether the current write(2) is a POST_SEND command.
#[cfg(target_arch = "x86_64")]
fn posts(pid: Pid) -> Result<bool> {
    let of = ptrace::getregs(pid)?;
    Ok(of.rdx >= 8 && ptrace::read(pid, of.rsi as ptrace::AddressType)? & 0xffff_ffff == POST_SEND)
}

#[allow(dead_code)]
#[cfg(not(target_arch = "x86_64"))]
pub fn between_posts(_: Pid, _: u64) -> Result<u64> {
    Err("counting instructions between posts needs x86-64".into())
}
