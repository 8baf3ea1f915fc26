//! `cargo xtask vm`: runs a command in the guest.

use crate::guest::{self, Guest, Job, Outcome, terminal};
use crate::host::{self, Need};
use crate::kernel::{self, rxe::Rxe};
use crate::lavapipe;
use crate::provider::Provider;
use crate::size::Size;
use crate::ui;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Exit statuses of `vm` itself; all others are the command's.
const TIMEOUT: u8 = 124;
const KERNEL_PROBLEM: u8 = 125;
const NO_STATUS: u8 = 126;

/// Run a command as root in a guest with two RDMA devices, rxe0 and rxe1.
///
/// The guest sees this machine's file system, read-only, under an overlay that
/// is discarded with the guest. Files that the command writes to the folder $OUT
/// are copied back. The exit status is the command's, or 124 after a timeout, 125
/// if the command succeeded but the kernel reported a problem (WARNING, BUG, oops,
/// hung task), or 126 if the guest ended before the command did.
#[derive(clap::Args)]
pub struct Args {
    /// The rdma_rxe module: Debian's, or the one with dma-buf import
    #[arg(long, value_enum, default_value = "dmabuf")]
    rxe: Rxe,
    /// Soft-iWARP devices, siw0 and siw1, instead of rxe0 and rxe1
    #[arg(long, conflicts_with = "rxe")]
    siw: bool,
    /// The libibverbs and providers that programs load [default: dmabuf, with --rxe stock debian]
    #[arg(long, value_enum)]
    provider: Option<Provider>,
    /// Memory of the guest; the host allocates it on first use
    #[arg(long, default_value = "4G")]
    mem: Size,
    /// CPUs of the guest
    #[arg(long, default_value = "2")]
    cpus: u32,
    /// Series of Debian kernels, or `debug` for one that checks itself
    #[arg(long, default_value = kernel::lines::LINUX_6_12.line)]
    kernel: String,
    /// Extra parameters for the kernel's command line
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    append: Vec<String>,
    /// Extra argument for QEMU; repeat the option for each argument
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
    /// Timeout in seconds, including boot; 0 for none [default: 600, none on a terminal]
    #[arg(long, value_name = "SECS")]
    timeout: Option<u64>,
    /// Set an environment variable for the command
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give the command a Vulkan device (Mesa's lavapipe)
    #[arg(long)]
    vulkan: bool,
    /// Destination for the contents of $OUT [default: a new folder in target/vm]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Do not give the command a terminal
    #[arg(long)]
    no_terminal: bool,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    guest::check_memory(args.mem)?;
    let kernel = kernel::lines::by_name(&args.kernel)?;
    host::ensure(&[Need::Guest])?;
    if kernel.configuration.is_some() {
        host::ensure(&[Need::KernelBuild])?;
    }
    let terminal = !args.no_terminal && terminal::present();
    let default = if terminal { 0 } else { 600 };
    let timeout = Some(args.timeout.unwrap_or(default)).filter(|&s| s > 0).map(Duration::from_secs);
    let mut guest = Guest {
        kernel,
        siw: args.siw,
        cpus: args.cpus,
        append: args.append,
        qemu: args.qemu_arg,
        timeout,
        terminal,
        out: args.out,
        ..Guest::new(args.rxe, args.mem)
    };
    guest.provider = args.provider.unwrap_or(guest.provider);
    let mut job = Job::new(args.command)?;
    if args.vulkan {
        for (name, value) in lavapipe::environment()? {
            job = job.env(&name, &value);
        }
    }
    for assignment in &args.env {
        let (name, value) = assignment.split_once('=').unwrap_or((assignment, ""));
        job = job.env(name, value);
    }
    let outcome = guest.run(&job)?;
    report(&outcome);
    if outcome.timed_out {
        ui::note("Hint", "set a longer timeout with --timeout SECS");
    }
    Ok(ExitCode::from(status(&outcome)))
}

/// Prints failures, and where the logs and results are.
pub fn report(outcome: &Outcome) {
    if let Some(failure) = &outcome.failure {
        ui::error(failure);
    }
    if !outcome.problems.is_empty() {
        ui::error("the guest's kernel reported a problem:");
        outcome.problems.iter().for_each(|line| ui::detail(line));
    }
    if outcome.failure.is_some() || !outcome.problems.is_empty() {
        ui::note("Logs", &outcome.logs.display().to_string());
    }
    if let Some(out) = &outcome.out {
        ui::note("Output", &out.display().to_string());
    }
}

/// The exit status for this outcome.
pub fn status(outcome: &Outcome) -> u8 {
    match outcome.status {
        Some(0) if !outcome.problems.is_empty() => KERNEL_PROBLEM,
        Some(status) => u8::try_from(status).unwrap_or(u8::MAX),
        None if outcome.timed_out => TIMEOUT,
        None => NO_STATUS,
    }
}
