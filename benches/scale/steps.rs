//! Counting instructions where no counter of the processor's can be had, as in an emulated guest: a child
//! process does the work, and this one steps it.

use std::process;

use nix::sys::ptrace;
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
