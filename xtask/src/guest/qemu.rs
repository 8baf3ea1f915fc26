//! The machine that QEMU is asked for.

use super::relay::{self, Event};
use super::rundir::RunDir;
use crate::process;
use crate::size::Size;
use anyhow::{Context, Result};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    Kvm,
    Tcg,
}

impl Accel {
    pub fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "KVM",
            Accel::Tcg => "TCG",
        }
    }

    /// Without erms and fsrm the kernel clears pages in a loop that TCG
    /// translates two to three times faster; without pclmulqdq rxe's CRC is a
    /// table and half again as fast; without la57 page walks are a level shorter.
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm,-pclmulqdq,-la57"],
        }
    }
}

/// The kernel's command line: serial console with warnings and worse, nothing
/// that waits, a reboot (which ends QEMU) instead of a halt on a panic, and
/// time limits that a slow machine does not meet by being slow.
const COMMAND_LINE: &[&str] = &[
    "console=ttyS0",
    "loglevel=5",
    "panic=-1",
    "oops=panic",
    "random.trust_cpu=on",
    "tsc=reliable",
    "mitigations=off",
    "nokaslr",
    "apparmor=0",
    "audit=0",
    "cryptomgr.notests",
    "rcupdate.rcu_cpu_stall_timeout=60",
    "watchdog_thresh=30",
];

/// A machine to start.
pub struct Machine<'a> {
    pub accel: Accel,
    pub cpus: u32,
    pub memory: Size,
    pub image: &'a Path,
    pub initramfs: &'a Path,
    /// More words for the kernel's command line.
    pub append: &'a [String],
    /// More arguments for QEMU.
    pub extra: &'a [String],
    /// Whether a terminal is wanted beside the streams.
    pub terminal: bool,
}

/// A machine that runs, with our ends of its streams. Ended when dropped.
pub struct Started {
    child: Child,
    events: Receiver<Event>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
    pub terminal: Option<UnixStream>,
}

impl Machine<'_> {
    /// Starts it; logs and shared files go to the folder of the run.
    pub fn start(&self, run: &RunDir) -> Result<Started> {
        let qemu = process::find("qemu-system-x86_64")
            .context("qemu-system-x86_64 is missing (package qemu-system-x86)")?;
        let mut command = Command::new(qemu);
        let mut cmdline: Vec<&str> = COMMAND_LINE.to_vec();
        cmdline.extend(self.append.iter().map(String::as_str));
        let memory = format!("{}M", self.memory.as_mib());
        let cpus = self.cpus.to_string();
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"])
            .args(self.accel.arguments())
            .args(["-smp", &cpus, "-m", &memory])
            .arg("-kernel")
            .arg(self.image)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", &cmdline.join(" ")])
            .arg("-serial")
            .arg(format!("file:{}", option(&run.console())))
            .arg("-fsdev")
            .arg("local,id=root,path=/,security_model=none,readonly=on,multidevs=remap")
            .args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"])
            .arg("-fsdev")
            .arg(format!("local,id=share,path={},security_model=none", option(&run.share())))
            .args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"])
            .args(["-device", "virtio-serial-pci,max_ports=8"]);

        let mut inherited = Vec::new();
        let control = port(&mut command, &mut inherited, "virtserialport", "control")?;
        let stdout = port(&mut command, &mut inherited, "virtserialport", "stdout")?;
        let stderr = port(&mut command, &mut inherited, "virtserialport", "stderr")?;
        let terminal = match self.terminal {
            true => Some(port(&mut command, &mut inherited, "virtconsole", "terminal")?),
            false => None,
        };
        // Two display adapters that export dma-bufs; their modules are loaded
        // only by those who want them.
        command.args(["-device", "virtio-gpu-pci", "-device", "bochs-display"]);
        command.args(self.extra);

        let log = File::create(run.qemu_log()).context("cannot write QEMU's log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        die_with_us(&mut command);
        let child = command.spawn().with_context(|| format!("cannot run `{}`", process::shown(&command)))?;
        drop(inherited);
        let (sender, events) = channel();
        relay::control(control, sender);
        Ok(Started { child, events, stdout: Some(stdout), stderr: Some(stderr), terminal })
    }
}

/// Adds a port; returns our end of it. QEMU inherits the other end, so that
/// there is no socket in the file system to find, clean up or be too long.
fn port(command: &mut Command, inherited: &mut Vec<OwnedFd>, kind: &str, name: &str) -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    let theirs = OwnedFd::from(theirs);
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).context("cannot hand a socket to QEMU")?;
    command
        .arg("-chardev")
        .arg(format!("socket,id={name},fd={}", theirs.as_raw_fd()))
        .arg("-device")
        .arg(format!("{kind},chardev={name},name={name}"));
    inherited.push(theirs);
    Ok(ours)
}

/// QEMU must not outlive us, whatever ends us.
fn die_with_us(command: &mut Command) {
    let die = || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        Ok(())
    };
    // SAFETY: between fork and exec only one prctl is called, which allocates
    // nothing and takes no lock.
    unsafe { command.pre_exec(die) };
}

/// A path inside one of QEMU's comma-separated options.
fn option(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

impl Started {
    /// What the guest says next; `None` when it says nothing in that time.
    pub fn next_event(&mut self, limit: Duration) -> Option<Event> {
        match self.events.recv_timeout(limit) {
            Ok(event) => Some(event),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => None,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Some(Event::Gone),
        }
    }

    /// Ends it, if it has not ended itself.
    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.stop();
    }
}
