//! The guest: a stock Debian kernel in QEMU on the host's own file system.
//!
//! The host's root is shared read-only and put under an overlay, so the guest
//! has every program and library of the host and can change none. A run is a
//! folder ([`rundir`]), a job in it ([`job`]), a machine ([`qemu`]) with an
//! accelerator that works ([`accel`]), which boots from an [`initramfs`], and
//! streams that come back ([`relay`], [`terminal`]). A kernel that complains
//! on its [`console`] fails the run.

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
use crate::kernel::{self, Kernel};
use crate::process::tail;
use crate::size::Size;
use anyhow::{Result, bail};
use qemu::{Machine, Started};
use relay::{Captured, Event};
use rundir::RunDir;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a guest may take until it runs its job. It takes seconds; this is
/// for a host that is busy with something else.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// A guest to start.
#[derive(Debug)]
pub struct Guest {
    pub kernel: &'static Kernel,
    pub rxe: Rxe,
    pub memory: Size,
    pub cpus: u32,
    pub append: Vec<String>,
    pub qemu: Vec<String>,
    /// For the whole run; `None` for as long as it takes.
    pub limit: Option<Duration>,
    /// Give the job the caller's terminal instead of streams.
    pub terminal: bool,
    /// Keep what the job prints on stdout for the caller as well.
    pub capture: bool,
    /// Where `$OUT` goes; a folder under `target/vm` when `None`.
    pub out: Option<PathBuf>,
    /// Say what is done.
    pub verbose: bool,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// The job's status, if it came to an end.
    pub status: Option<i32>,
    /// Whether it was ended because its time was up.
    pub timed_out: bool,
    /// Why the run failed otherwise, in words.
    pub failure: Option<String>,
    /// The kernel's complaints.
    pub complaints: Vec<String>,
    /// Where `$OUT` is, if there is something in it.
    pub out: Option<PathBuf>,
    /// Where the logs are.
    pub logs: PathBuf,
    /// What the job printed, if asked for.
    pub stdout: String,
}

impl Outcome {
    /// Whether the job ended well in a kernel that did not complain.
    pub fn success(&self) -> bool {
        self.status == Some(0) && self.failure.is_none() && self.complaints.is_empty()
    }

    /// Whether the guest died of QEMU's emulation and not of what ran in it: while the kernel patches its
    /// own code (a static key), another emulated processor can run into the breakpoint that stands there
    /// for a moment, after the kernel believes that all have seen it go. The kernel itself has no other
    /// `int3` that it does not know of.
    pub fn tripped_over_a_patch(&self) -> bool {
        self.complaints.iter().any(|line| line.contains("Oops: int3"))
    }
}

impl Guest {
    /// A guest with Debian 12's kernel and defaults for the rest.
    pub fn new(rxe: Rxe, memory: Size) -> Guest {
        Guest {
            kernel: &kernel::lines::LINUX_6_12,
            rxe,
            memory,
            cpus: 2,
            append: Vec::new(),
            qemu: Vec::new(),
            limit: Some(Duration::from_secs(600)),
            terminal: false,
            capture: false,
            out: None,
            verbose: true,
        }
    }

    /// Boots it, runs the job, ends it.
    pub fn run(&self, job: &Job) -> Result<Outcome> {
        let kernel = kernel::unpacked(self.kernel)?;
        let module = match self.rxe {
            Rxe::Stock => None,
            Rxe::Dmabuf => Some(rxe::dmabuf_module(&kernel)?),
        };
        let initramfs = initramfs::build(&kernel, module.as_deref())?;
        let run = RunDir::new()?;
        let accel = accel::choose(&kernel.image(), &initramfs)?;
        let (rows, columns) = terminal::size();
        job.write(
            &run.share(),
            &[
                ("RELEASE", kernel.release.clone()),
                ("MODULES", kernel.modules_dir().to_string_lossy().into_owned()),
                ("RXE", self.rxe.name().to_string()),
                ("STOCK_RXE", kernel.stock_rxe()?.to_string_lossy().into_owned()),
                ("RXE_MODULE", module.unwrap_or_default().to_string_lossy().into_owned()),
                ("DMA_SG_MODULE", kernel.dma_sg()?.to_string_lossy().into_owned()),
                ("TERMINAL", if self.terminal { "yes" } else { "" }.to_string()),
                ("ROWS", rows.to_string()),
                ("COLUMNS", columns.to_string()),
            ],
        )?;
        let mut append = vec![format!("initcall_blacklist={}", self.kernel.skipped_initcalls.join(","))];
        append.extend(self.append.iter().cloned());
        let machine = Machine {
            accel,
            cpus: self.cpus,
            memory: self.memory,
            image: &kernel.image(),
            initramfs: &initramfs,
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
            if self.verbose {
                let what = format!("Linux {}, {} rxe, {}", kernel.release, self.rxe.name(), accel.name());
                crate::ui::note(
                    "Guest",
                    &format!("{what}, ready in {}", crate::ui::seconds(start.elapsed())),
                );
            }
        };
        let ended = self.attend(&mut started, &run, start, ready)?;
        started.stop();
        for stream in streams.into_iter().flatten() {
            let _ = stream.join();
        }
        let console = String::from_utf8_lossy(&fs::read(run.console()).unwrap_or_default()).into_owned();
        let complaints = console::problems(&console);
        let timed_out = matches!(ended, Ended::TimedOut(_));
        let (status, failure) = match ended {
            Ended::Exit(status) => (Some(status), None),
            // The complaints say it already.
            Ended::Failure(text) | Ended::TimedOut(text) if !complaints.is_empty() => (None, Some(text)),
            Ended::Failure(text) | Ended::TimedOut(text) => {
                let said = fs::read_to_string(run.qemu_log()).unwrap_or_default();
                let last = format!("{text}\n{}{}", tail(&console, 15), tail(&said, 15));
                (None, Some(last.trim_end().to_string()))
            }
        };
        let stdout =
            stdout.lock().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        Ok(Outcome {
            status,
            timed_out,
            failure,
            complaints,
            out: run.take_out(self.out.as_deref())?,
            logs: run.keep_logs(),
            stdout,
        })
    }

    /// Waits for the verdict, for the time limit or for the end of the guest.
    fn attend(&self, started: &mut Started, run: &RunDir, start: Instant, ready: impl Fn()) -> Result<Ended> {
        let mut running = false;
        let mut raw = None;
        let (leave, left) = std::sync::mpsc::channel();
        loop {
            let limit = match (running, self.limit) {
                (false, limit) => Some(limit.map_or(BOOT_LIMIT, |l| l.min(BOOT_LIMIT))),
                (true, limit) => limit,
            };
            if let Some(limit) = limit.filter(|&limit| start.elapsed() >= limit) {
                let doing = if running { "the command still ran" } else { "the guest was not ready" };
                return Ok(Ended::TimedOut(format!("{doing} after {}; ended it", crate::ui::seconds(limit))));
            }
            if left.try_recv().is_ok() {
                return Ok(Ended::Failure("left with Ctrl-]".into()));
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
                Some(Event::Failed(text)) => return Ok(Ended::Failure(format!("the guest says: {text}"))),
                Some(Event::Gone) => {
                    return Ok(Ended::Failure("the guest ended without a verdict".into()));
                }
                None => {
                    // A panic reboots, which ends QEMU; should it hang there, this sees it.
                    let console = fs::read(run.console()).unwrap_or_default();
                    if String::from_utf8_lossy(&console).lines().any(console::is_fatal) {
                        std::thread::sleep(Duration::from_secs(1));
                        return Ok(Ended::Failure("the guest's kernel panicked".into()));
                    }
                }
            }
        }
    }
}

enum Ended {
    Exit(i32),
    TimedOut(String),
    Failure(String),
}

/// Refuses what QEMU would refuse later and less clearly.
pub fn check_memory(memory: Size) -> Result<()> {
    if memory < Size::mib(512) {
        bail!("a guest needs at least 512M of memory");
    }
    Ok(())
}
