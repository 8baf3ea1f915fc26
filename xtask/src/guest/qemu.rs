//! Starts QEMU with the guest's machine.

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

/// The accelerator that runs the guest's instructions.
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

    /// Parameters for the kernel. The kernel patches its code while it boots, and an emulated CPU may run what
    /// another one is patching ("Oops: int3"). So it boots with one CPU, and `main.sh` starts the others. The
    /// kernel's own check of the timer ("IO-APIC + timer doesn't work") takes a busy host for broken hardware.
    fn parameters(self) -> &'static [&'static str] {
        match self {
            Accel::Kvm => &[],
            Accel::Tcg => &["maxcpus=1", "no_timer_check"],
        }
    }

    /// TCG runs faster without these features. Without erms and fsrm the kernel
    /// clears pages 2 to 3 times faster, without pclmulqdq rxe's CRC is 50 %
    /// faster, and without la57 page walks have one level less.
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm,-pclmulqdq,-la57"],
        }
    }
}

/// The kernel's command line: a serial console with warnings and errors, no
/// boot-time waits, a reboot (which ends QEMU) on a panic, stall timeouts that
/// fit a slow machine, and a checked allocation (KFENCE) every 100 ms.
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
    "kfence.sample_interval=100",
];

/// A machine to start.
pub struct Machine<'a> {
    pub accel: Accel,
    pub cpus: u32,
    pub memory: Size,
    pub image: &'a Path,
    pub initramfs: &'a Path,
    /// Extra parameters for the kernel's command line.
    pub append: &'a [String],
    /// Extra arguments for QEMU.
    pub extra: &'a [String],
    /// Whether to add a terminal.
    pub terminal: bool,
}

/// A running machine, with the host's ends of its streams. Stopped when dropped.
pub struct Started {
    child: Child,
    events: Receiver<Event>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
    pub terminal: Option<UnixStream>,
}

impl Machine<'_> {
    /// Starts the machine; logs and shared files are in the folder of the run.
    pub fn start(&self, run: &RunDir) -> Result<Started> {
        let qemu = process::find("qemu-system-x86_64")
            .context("qemu-system-x86_64 is not installed; install the package qemu-system-x86")?;
        let mut command = Command::new(qemu);
        let mut cmdline: Vec<&str> = COMMAND_LINE.to_vec();
        cmdline.extend(self.accel.parameters());
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
        // Two display adapters that export dma-bufs; the tests that use them load
        // their modules.
        command.args(["-device", "virtio-gpu-pci", "-device", "bochs-display"]);
        command.args(self.extra);

        let log = File::create(run.qemu_log()).context("cannot write QEMU's log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        die_with_parent(&mut command);
        let child = command.spawn().with_context(|| format!("cannot run `{}`", process::shown(&command)))?;
        drop(inherited);
        let (sender, events) = channel();
        relay::control(control, sender);
        Ok(Started { child, events, stdout: Some(stdout), stderr: Some(stderr), terminal })
    }
}

/// Adds a port and returns the host's end. QEMU inherits the other end, so the
/// file system has no socket to clean up and no path that may be too long.
fn port(command: &mut Command, inherited: &mut Vec<OwnedFd>, kind: &str, name: &str) -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    let theirs = OwnedFd::from(theirs);
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())
        .context("cannot clear close-on-exec of QEMU's socket")?;
    command
        .arg("-chardev")
        .arg(format!("socket,id={name},fd={}", theirs.as_raw_fd()))
        .arg("-device")
        .arg(format!("{kind},chardev={name},name={name}"));
    inherited.push(theirs);
    Ok(ours)
}

/// Kills QEMU when this process ends for any reason.
fn die_with_parent(command: &mut Command) {
    let die = || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure calls only prctl, which does not
    // allocate or lock.
    unsafe { command.pre_exec(die) };
}

/// Escapes a path for QEMU's comma-separated options.
fn option(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

impl Started {
    /// The guest's next event; `None` after the timeout.
    pub fn next_event(&mut self, timeout: Duration) -> Option<Event> {
        match self.events.recv_timeout(timeout) {
            Ok(event) => Some(event),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => None,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Some(Event::Gone),
        }
    }

    /// Stops the machine, if it still runs.
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
