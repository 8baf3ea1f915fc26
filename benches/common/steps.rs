//! Counting instructions where no counter of the processor's can be had, as in an emulated guest: a child
//! process does the work, and this one steps it.

use std::process;

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::common::Result;

/// Instructions of the work and of the two signals around it, in user mode.
pub fn count(work: impl FnOnce()) -> Result<u64> {
    // SAFETY: this is a program of one thread when it forks, and the child ends without returning.
    match unsafe { fork()? } {
        ForkResult::Child => {
            let stop = || raise(Signal::SIGSTOP).is_ok();
            let done = ptrace::traceme().is_ok() && stop() && {
                work();
                stop()
            };
            // Not `exit`: what the child has copies of is its parent's to end.
            // SAFETY: takes a number.
            unsafe { libc::_exit(i32::from(!done)) }
        }
        ForkResult::Parent { child } => {
            let steps = step(child);
            // Whatever has become of it.
            let _ = ptrace::kill(child);
            let _ = waitpid(child, None);
            steps
        }
    }
}

fn step(child: Pid) -> Result<u64> {
    let stopped = |status| matches!(status, WaitStatus::Stopped(_, Signal::SIGSTOP));
    if !stopped(waitpid(child, None)?) {
        return Err(format!("process {} cannot step its child", process::id()).into());
    }
    let mut steps = 0;
    loop {
        ptrace::step(child, None)?;
        match waitpid(child, None)? {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => steps += 1,
            status if stopped(status) => return Ok(steps),
            status => return Err(format!("the child that is stepped: {status:?}").into()),
        }
    }
}

/// A write(2) of this to a device is `ibv_post_send` on soft-RoCE (IB_USER_VERBS_CMD_POST_SEND).
#[allow(dead_code)] // not by every benchmark
const POST_SEND: i64 = 28;

/// Lets a running process go on to the first list of requests that it posts, counts its instructions in user
/// mode until it has posted so many more, and leaves it to itself.
#[allow(dead_code)] // not by every benchmark
#[cfg(target_arch = "x86_64")]
pub fn between_posts(pid: Pid, lists: u64) -> Result<u64> {
    ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD)?;
    ptrace::interrupt(pid)?;
    let (mut steps, mut left) = (None, lists);
    // Behind the instruction that enters the kernel, of the one function that all posts go through.
    let mut after = 0;
    while left > 0 {
        let mut signal = None;
        match waitpid(pid, None)? {
            WaitStatus::PtraceSyscall(_) => {
                let info = ptrace::syscall_info(pid)?;
                // SAFETY: the entry of a system call, as `op` says.
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
            status => return Err(format!("the process that is stepped: {status:?}").into()),
        }
        match steps {
            _ if left == 0 => ptrace::detach(pid, signal)?,
            Some(_) => ptrace::step(pid, signal)?,
            None => ptrace::syscall(pid, signal)?,
        }
    }
    steps.ok_or_else(|| "the process posted nothing".into())
}

/// Whether the write that it stands before or behind posts.
#[cfg(target_arch = "x86_64")]
fn posts(pid: Pid) -> Result<bool> {
    let of = ptrace::getregs(pid)?;
    Ok(of.rdx >= 8 && ptrace::read(pid, of.rsi as ptrace::AddressType)? & 0xffff_ffff == POST_SEND)
}

#[allow(dead_code)]
#[cfg(not(target_arch = "x86_64"))]
pub fn between_posts(_: Pid, _: u64) -> Result<u64> {
    Err("posts are counted on x86-64 only".into())
}
