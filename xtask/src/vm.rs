//! `cargo xtask vm`: one command in the guest.

use crate::guest::{self, Guest, Job, Outcome, terminal};
use crate::host::{self, Need};
use crate::kernel::{self, rxe::Rxe};
use crate::lavapipe;
use crate::size::Size;
use crate::ui;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Statuses of our own, beside those of the command.
const HANG: u8 = 124;
const COMPLAINT: u8 = 125;
const NO_VERDICT: u8 = 126;

/// Run a command as root in a guest that has an RDMA device, rxe0.
///
/// The guest sees this machine's file system, read-only under an overlay that
/// goes away with it; what the command writes into the folder $OUT comes back.
/// The exit status is the command's, or 124 when the time was up, 125 when the
/// command succeeded and the kernel complained (WARNING, BUG, oops, hung task),
/// 126 when the guest ended without a verdict.
#[derive(clap::Args)]
pub struct Args {
    /// Which rdma_rxe: Debian's own, or the one with dma-buf import
    #[arg(long, value_enum, default_value = "dmabuf")]
    rxe: Rxe,
    /// Memory of the guest, used as it is touched
    #[arg(long, default_value = "4G")]
    mem: Size,
    /// Processors of the guest
    #[arg(long, default_value = "2")]
    cpus: u32,
    /// Which line of Debian kernels
    #[arg(long, default_value = kernel::lines::LINUX_6_12.line)]
    kernel: String,
    /// More words for the kernel's command line
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    append: Vec<String>,
    /// One more argument for QEMU; repeat it for each
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
    /// Time limit in seconds, boot included; 0 for none [default: 600, none on a terminal]
    #[arg(long, value_name = "SECS")]
    timeout: Option<u64>,
    /// Set a variable for the command
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give the command a Vulkan device, Mesa's lavapipe
    #[arg(long)]
    vulkan: bool,
    /// Where the contents of $OUT go [default: a new folder under target/vm]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Never give the command a terminal
    #[arg(long)]
    no_terminal: bool,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    guest::check_memory(args.mem)?;
    host::ensure(&[Need::Guest])?;
    let terminal = !args.no_terminal && terminal::present();
    let default = if terminal { 0 } else { 600 };
    let limit = Some(args.timeout.unwrap_or(default)).filter(|&s| s > 0).map(Duration::from_secs);
    let guest = Guest {
        kernel: kernel::lines::by_name(&args.kernel)?,
        cpus: args.cpus,
        append: args.append,
        qemu: args.qemu_arg,
        limit,
        terminal,
        out: args.out,
        ..Guest::new(args.rxe, args.mem)
    };
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
    Ok(ExitCode::from(status(&outcome)))
}

/// Says what went wrong, and where the results are.
pub fn report(outcome: &Outcome) {
    if let Some(failure) = &outcome.failure {
        ui::error(failure);
    }
    if !outcome.complaints.is_empty() {
        ui::error("the guest's kernel complained:");
        outcome.complaints.iter().for_each(|line| ui::detail(line));
    }
    if outcome.failure.is_some() || !outcome.complaints.is_empty() {
        ui::note("Logs", &outcome.logs.display().to_string());
    }
    if let Some(out) = &outcome.out {
        ui::note("Output", &out.display().to_string());
    }
}

/// The exit status that stands for this end.
pub fn status(outcome: &Outcome) -> u8 {
    match outcome.status {
        Some(0) if !outcome.complaints.is_empty() => COMPLAINT,
        Some(status) => u8::try_from(status).unwrap_or(u8::MAX),
        None if outcome.timed_out => HANG,
        None => NO_VERDICT,
    }
}
