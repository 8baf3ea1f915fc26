//! The guest: a stock Debian kernel in QEMU on the host's file system.
//!
//! The guest mounts the host's root read-only under an overlay, so it has every
//! program and library of the host and cannot change them. A run has a folder
//! ([`rundir`]) with a job ([`job`]). A machine ([`qemu`]) with a working
//! accelerator ([`accel`]) boots from an [`initramfs`], and its output comes back
//! through [`relay`] and [`terminal`]. A problem that the kernel reports on its
//! [`console`] fails the run.

mod accel;
mod console;
mod cpio;
mod initramfs;
mod job;
mod qemu;
mod relay;
mod rundir;
pub mod terminal;

pub use job::Job;

use crate::kernel::rxe::{self, Rxe};
use crate::kernel::{self, Kernel, Unpacked};
use crate::process::tail;
use crate::provider::{self, Provider};
use crate::size::Size;
use crate::ui;
use anyhow::{Result, bail};
use qemu::{Accel, Machine, Started};
use relay::{Captured, Event};
use rundir::RunDir;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Timeout for the boot. It normally takes seconds, and longer on a busy host.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// A guest to start.
#[derive(Debug)]
pub struct Guest {
    pub kernel: &'static Kernel,
    pub rxe: Rxe,
    /// Soft-iWARP devices, siw0 and siw1, instead of those of soft-RoCE.
    pub siw: bool,
    pub provider: Provider,
    pub memory: Size,
    pub cpus: u32,
    pub append: Vec<String>,
    pub qemu: Vec<String>,
    /// Emulation, also where KVM works: for a CPU of choice.
    pub emulate: bool,
    /// Timeout for the whole run; `None` for no timeout.
    pub timeout: Option<Duration>,
    /// Give the job the caller's terminal instead of pipes.
    pub terminal: bool,
    /// Also return the job's stdout in [`Outcome::stdout`].
    pub capture: bool,
    /// Destination for `$OUT`; `None` for a new folder in `target/vm`.
    pub out: Option<PathBuf>,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// The job's exit status, if the job ended.
    pub status: Option<i32>,
    /// Whether the run hit its timeout.
    pub timed_out: bool,
    /// Why the job has no exit status.
    pub failure: Option<String>,
    /// Problems that the guest's kernel reported on its console.
    pub problems: Vec<String>,
    /// The folder with the contents of `$OUT`, if there are any.
    pub out: Option<PathBuf>,
    /// The folder with the logs.
    pub logs: PathBuf,
    /// The job's stdout, if [`Guest::capture`] is set.
    pub stdout: String,
}

impl Outcome {
    /// Whether the job succeeded and the kernel reported no problem.
    pub fn success(&self) -> bool {
        self.status == Some(0) && self.failure.is_none() && self.problems.is_empty()
    }

    /// Whether a bug in QEMU's emulation killed the guest. While the kernel patches its own code (a static
    /// key), it sets a breakpoint for a moment. Another emulated CPU can still hit the breakpoint after the
    /// kernel has removed it. The kernel has no other `int3` that it does not handle.
    pub fn hit_patched_code(&self) -> bool {
        self.problems.iter().any(|line| line.contains("Oops: int3"))
    }
}

impl Guest {
    /// A guest with Linux 6.12 and default settings.
    pub fn new(rxe: Rxe, memory: Size) -> Guest {
        Guest {
            kernel: &kernel::lines::LINUX_6_12,
            rxe,
            siw: false,
            // Without dma-buf import it would change nothing.
            provider: match rxe {
                Rxe::Stock => Provider::Debian,
                Rxe::Dmabuf => Provider::Dmabuf,
            },
            memory,
            cpus: 2,
            append: Vec::new(),
            qemu: Vec::new(),
            emulate: false,
            timeout: Some(Duration::from_secs(600)),
            terminal: false,
            capture: false,
            out: None,
        }
    }

    /// Boots the guest, runs the job and stops the guest. Starts it once more if it dies while it boots.
    pub fn run(&self, job: &Job) -> Result<Outcome> {
        let parts = self.parts(job)?;
        let accel = match self.emulate {
            true => Accel::Tcg,
            false => accel::choose(&parts.kernel.image(), &parts.initramfs)?,
        };
        started_again(accel, |accel| self.start(&parts, accel))
    }

    /// Fetches and builds what the guest consists of.
    fn parts(&self, job: &Job) -> Result<Parts> {
        let kernel = kernel::unpacked(self.kernel)?;
        // The stock guest has Debian's modules only, and needs no compiler.
        let (module, dma_sg) = match self.rxe {
            Rxe::Stock => (None, None),
            Rxe::Dmabuf => (Some(rxe::dmabuf_module(&kernel)?), Some(kernel.dma_sg()?)),
        };
        let siw = if self.siw { Some(kernel.siw()?) } else { None };
        let initramfs = initramfs::build(&kernel, module.as_deref())?;
        let mut job = job.clone().env("DMABUF_RDMA_PROVIDER", self.provider.name());
        if self.provider == Provider::Dmabuf {
            job = job.library_path(&provider::libraries()?);
        }
        let (rows, columns) = terminal::size();
        let path = |path: Option<PathBuf>| path.unwrap_or_default().to_string_lossy().into_owned();
        let settings = vec![
            ("RELEASE", kernel.release.clone()),
            ("MODULES", path(Some(kernel.modules_dir()))),
            ("RXE", if self.siw { "siw" } else { self.rxe.name() }.to_string()),
            ("SIW_MODULE", path(siw)),
            ("STOCK_RXE", path(Some(kernel.stock_rxe()?))),
            ("RXE_MODULE", path(module)),
            ("DMA_SG_MODULE", path(dma_sg)),
            ("TERMINAL", if self.terminal { "yes" } else { "" }.to_string()),
            ("ROWS", rows.to_string()),
            ("COLUMNS", columns.to_string()),
        ];
        Ok(Parts { kernel, initramfs, job, settings })
    }

    /// Starts the guest with this accelerator, and waits until it has ended.
    fn start(&self, parts: &Parts, accel: Accel) -> Result<Attempt> {
        let kernel = &parts.kernel;
        let run = RunDir::new()?;
        parts.job.write(&run.share(), &parts.settings)?;
        let mut append = vec![format!("initcall_blacklist={}", self.kernel.skipped_initcalls.join(","))];
        append.extend(self.append.iter().cloned());
        let machine = Machine {
            accel,
            cpus: self.cpus,
            memory: self.memory,
            image: &kernel.image(),
            initramfs: &parts.initramfs,
            append: &append,
            extra: &self.qemu,
            terminal: self.terminal,
        };
        let start = Instant::now();
        let mut started = machine.start(&run)?;
        let stdout = Captured::default();
        let copy = self.capture.then(|| stdout.clone());
        let streams = [
            started.stdout.take().map(|s| relay::output(s, std::io::stdout(), copy)),
            started.stderr.take().map(|s| relay::output(s, std::io::stderr(), None)),
        ];
        let ready = || {
            let devices = if self.siw { "siw".to_string() } else { format!("{} rxe", self.rxe.name()) };
            let what = format!("Linux {}, {devices}, {}", kernel.release, accel.name());
            ui::note("Guest", &format!("{what}, ready in {}", ui::seconds(start.elapsed())));
        };
        let ended = self.wait(&mut started, &run, start, ready)?;
        started.stop();
        for stream in streams.into_iter().flatten() {
            let _ = stream.join();
        }
        let console = String::from_utf8_lossy(&fs::read(run.console()).unwrap_or_default()).into_owned();
        let problems = console::problems(&console);
        let timed_out = matches!(ended, Ended::TimedOut(_));
        let died_booting = matches!(ended, Ended::DiedBooting(_));
        let (status, failure) = match ended {
            Ended::Exit(status) => (Some(status), None),
            // The reported problems explain the failure.
            Ended::Failure(text) | Ended::TimedOut(text) | Ended::DiedBooting(text)
                if !problems.is_empty() =>
            {
                (None, Some(text))
            }
            Ended::Failure(text) | Ended::TimedOut(text) | Ended::DiedBooting(text) => {
                let qemu = fs::read_to_string(run.qemu_log()).unwrap_or_default();
                let text = format!("{text}\n{}{}", tail(&console, 15), tail(&qemu, 15));
                (None, Some(text.trim_end().to_string()))
            }
        };
        let stdout =
            stdout.lock().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let outcome = Outcome {
            status,
            timed_out,
            failure,
            problems,
            out: run.take_out(self.out.as_deref())?,
            logs: run.keep_logs(),
            stdout,
        };
        Ok(Attempt { outcome, died_booting })
    }

    /// Waits for the job's exit status, the timeout or the end of the guest.
    fn wait(&self, started: &mut Started, run: &RunDir, start: Instant, ready: impl Fn()) -> Result<Ended> {
        let mut running = false;
        let mut raw = None;
        let (leave, left) = std::sync::mpsc::channel();
        loop {
            let timeout = match (running, self.timeout) {
                (false, timeout) => Some(timeout.map_or(BOOT_TIMEOUT, |t| t.min(BOOT_TIMEOUT))),
                (true, timeout) => timeout,
            };
            if let Some(timeout) = timeout.filter(|&timeout| start.elapsed() >= timeout) {
                let after = ui::seconds(timeout);
                return Ok(Ended::TimedOut(match running {
                    true => format!("timeout: the command did not end within {after}"),
                    false => format!("timeout: the guest did not boot within {after}"),
                }));
            }
            if left.try_recv().is_ok() {
                return Ok(Ended::Failure("you stopped the guest with Ctrl-]".into()));
            }
            match started.next_event(Duration::from_millis(100)) {
                Some(Event::Ready) => {
                    running = true;
                    ready();
                    if let Some(stream) = started.terminal.take() {
                        let leave = leave.clone();
                        raw = Some(terminal::Raw::enter()?);
                        relay::output(stream.try_clone()?, std::io::stdout(), None);
                        terminal::input(stream, move || {
                            let _ = leave.send(());
                        });
                    }
                }
                Some(Event::Exit(status)) => {
                    drop(raw);
                    return Ok(Ended::Exit(status));
                }
                Some(Event::Failed(text)) => {
                    return Ok(Ended::Failure(format!("the guest's init failed: {text}")));
                }
                Some(Event::Gone) => return Ok(died(running, "the guest ended before the command did")),
                None => {
                    // A panic reboots, which ends QEMU. The reboot may hang, so look for the panic too.
                    let console = fs::read(run.console()).unwrap_or_default();
                    if String::from_utf8_lossy(&console).lines().any(console::is_fatal) {
                        std::thread::sleep(Duration::from_secs(1));
                        return Ok(died(running, "the guest's kernel panicked"));
                    }
                }
            }
        }
    }
}

/// What a guest consists of.
struct Parts {
    kernel: Unpacked,
    initramfs: PathBuf,
    job: Job,
    settings: Vec<(&'static str, String)>,
}

/// One start of a guest.
struct Attempt {
    outcome: Outcome,
    /// Whether the guest ended before its init reported anything.
    died_booting: bool,
}

enum Ended {
    Exit(i32),
    TimedOut(String),
    Failure(String),
    DiedBooting(String),
}

fn died(running: bool, how: &str) -> Ended {
    if running { Ended::Failure(how.into()) } else { Ended::DiedBooting(how.into()) }
}

/// Starts a guest, and once more, by emulation, if it died while it booted: before it has run anything.
fn started_again(accel: Accel, mut start: impl FnMut(Accel) -> Result<Attempt>) -> Result<Outcome> {
    let first = start(accel)?;
    if !first.died_booting {
        return Ok(first.outcome);
    }
    ui::warn(first.outcome.failure.as_deref().unwrap_or("the guest ended"));
    first.outcome.problems.iter().for_each(|line| ui::detail(line));
    ui::note("Again", "the guest died while it booted; starting it once more, with emulation");
    Ok(start(Accel::Tcg)?.outcome)
}

/// Checks the memory size before QEMU fails with a less clear message.
pub fn check_memory(memory: Size) -> Result<()> {
    if memory < Size::mib(512) {
        bail!("--mem {memory} is too small; a guest needs at least 512M");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(status: Option<i32>, died_booting: bool) -> Attempt {
        let outcome = Outcome {
            status,
            timed_out: false,
            failure: status.is_none().then(|| "ended".to_string()),
            problems: Vec::new(),
            out: None,
            logs: PathBuf::new(),
            stdout: String::new(),
        };
        Attempt { outcome, died_booting }
    }

    #[test]
    fn a_guest_that_dies_booting_is_started_once_more_by_emulation() {
        let run = |accel, attempts: &[(Option<i32>, bool)]| {
            let (mut left, mut with) = (attempts.iter(), Vec::new());
            let outcome = started_again(accel, |accel| {
                with.push(accel);
                let &(status, died) = left.next().expect("no third start");
                Ok(attempt(status, died))
            });
            (outcome.unwrap().status, with)
        };
        use Accel::{Kvm, Tcg};
        assert_eq!(run(Kvm, &[(None, true), (Some(0), false)]), (Some(0), vec![Kvm, Tcg]));
        assert_eq!(run(Tcg, &[(None, true), (Some(3), false)]), (Some(3), vec![Tcg, Tcg]));
        assert_eq!(run(Tcg, &[(None, true), (None, true)]), (None, vec![Tcg, Tcg]));
        // What has run is not repeated, nor what init refused.
        assert_eq!(run(Kvm, &[(None, false)]), (None, vec![Kvm]));
        assert_eq!(run(Tcg, &[(Some(1), false)]), (Some(1), vec![Tcg]));
    }
}
