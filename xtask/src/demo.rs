//! `cargo xtask demo`: transfers a dma-buf over an RDMA connection and verifies it.

use crate::guest::{Guest, Job};
use crate::host::{self, Need};
use crate::kernel::lines::LINUX_6_12;
use crate::kernel::rxe::Rxe;
use crate::size::Size;
use crate::{cargo, kernel, project, ui, vm};
use anyhow::{Context, Result};
use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

/// Transfer a dma-buf between two processes by RDMA WRITE and READ, and verify it.
///
/// Installs missing packages (with apt, as root; otherwise prints the command to
/// run), builds the program dmabuf-rdma, boots a guest with RDMA devices and runs its demo in it.
#[derive(clap::Args)]
pub struct Args {
    /// Size of each dma-buf
    #[arg(long, default_value = "1G")]
    size: Size,
    /// Exporter of the dma-buf that is written to: heap, heap:NAME, udmabuf, udmabuf:thp, udmabuf:2M or drm:DRIVER
    #[arg(long, default_value = "heap")]
    exporter: String,
    /// Use this machine's own RDMA device instead of a guest
    #[arg(long)]
    host: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let needs: &[Need] = if args.host { &[Need::Library] } else { &[Need::Library, Need::Guest] };
    host::ensure(needs)?;
    // The kernel is downloaded while the program is compiled.
    let kernel = (!args.host).then(|| thread::spawn(|| kernel::unpacked(&LINUX_6_12)));
    let step = ui::Step::start("Building", "the program dmabuf-rdma");
    let program = cargo::program()?;
    step.done("Built", "the program dmabuf-rdma");
    if let Some(kernel) = kernel {
        kernel.join().expect("fetching the kernel does not panic")?;
    }

    let size = args.size.to_string();
    let mut words: Vec<String> = [program.to_string_lossy().as_ref(), "demo", "run", "--size", &size]
        .iter()
        .chain(&["--exporter", &args.exporter])
        .map(|word| word.to_string())
        .collect();
    if std::io::stdout().is_terminal() {
        words.push("--progress".to_string());
    }
    if args.host {
        let status = Command::new(&words[0])
            .args(&words[1..])
            .current_dir(project::root())
            .status()
            .context("cannot run the demo")?;
        what_next(&program);
        return Ok(ExitCode::from(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(u8::MAX)));
    }
    // The processes run on the two ends of the guest's wire.
    words.extend(["--device", "rxe1", "--mover-device", "rxe0"].map(str::to_string));
    // Both sides have a buffer of that size; the guest needs the rest.
    let memory = Size(2 * args.size.0 + Size::mib(1536).0);
    let mut job = Job::new(words)?;
    job.directory = project::root().to_path_buf();
    // An emulated guest moves 150 MB/s, and less on a busy machine.
    let timeout = Duration::from_secs(600 + args.size.as_mib() / 4);
    let outcome = Guest { timeout: Some(timeout), ..Guest::new(Rxe::Dmabuf, memory) }.run(&job)?;
    vm::report(&outcome);
    if outcome.success() {
        what_next(&program);
    }
    Ok(ExitCode::from(vm::status(&outcome)))
}

/// Says how to ask the same of a machine.
fn what_next(program: &Path) {
    let here = std::env::current_dir().unwrap_or_default();
    let program = program.strip_prefix(here).unwrap_or(program).display();
    ui::note("Next", &format!("`{program} doctor` says what works on this machine"));
    ui::detail(&format!("`cargo xtask vm -- {program} doctor` says it of the guest"));
}
