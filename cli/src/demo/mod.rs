//! `demo`: the whole path with both sides. The owner registers a dma-buf, and the mover writes and reads all of
//! it by RDMA. Both compare digests of what their CPU mappings show.

mod mover;
mod owner;
mod side;
mod wire;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use clap::Subcommand;

use crate::{Result, exporter, size, ui};

/// Move a dma-buf between two processes, both ways, and verify it.
///
/// `run` runs both sides on this machine. For two machines, start `owner --listen 0.0.0.0:18515` on one and
/// `mover --connect HOST:18515` on the other.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Run both sides on this machine, as two processes.
    Run {
        #[command(flatten)]
        owner: Options,
        /// The exporter of the mover's buffer.
        #[arg(long, default_value = "udmabuf")]
        mover_exporter: String,
        /// RDMA device of the mover; default: the owner's.
        #[arg(long)]
        mover_device: Option<String>,
        #[command(flatten)]
        display: Display,
    },
    /// Run the side that owns the buffer.
    Owner {
        #[command(flatten)]
        options: Options,
        /// Address to listen on for the mover; port 0 chooses a free port.
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: String,
    },
    /// Run the side that writes and reads the owner's buffer.
    Mover {
        /// RDMA device; default: the first.
        #[arg(long)]
        device: Option<String>,
        /// The exporter of this side's buffer.
        #[arg(long, default_value = "udmabuf")]
        exporter: String,
        /// Address that the owner listens on.
        #[arg(long)]
        connect: String,
        #[command(flatten)]
        display: Display,
    },
}

#[derive(clap::Args, Clone)]
struct Options {
    /// RDMA device; default: the first.
    #[arg(long)]
    device: Option<String>,
    #[arg(long, default_value = "heap", help = format!("The exporter of the owner's buffer: {}", exporter::NAMES))]
    exporter: String,
    /// Size of the buffer, such as 512M or 4G.
    #[arg(long, default_value = "1G", value_parser = size::parse_size)]
    size: u64,
}

#[derive(clap::Args, Clone, Copy)]
struct Display {
    /// Draw progress bars.
    #[arg(long)]
    progress: bool,
    /// How many times to write and read the whole buffer.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
}

pub fn run(args: Args) -> Result<()> {
    match args.role {
        Role::Owner { options, listen } => owner::run(&options, &listen),
        Role::Mover { device, exporter, connect, display } => {
            mover::run(device.as_deref(), &exporter, &connect, display)
        }
        Role::Run { owner, mover_exporter, mover_device, display } => {
            let device = mover_device.or_else(|| owner.device.clone());
            both(&owner, device.as_deref(), &mover_exporter, display)
        }
    }
}

/// Starts the owner as a process, and runs the mover in this one.
fn both(options: &Options, mover: Option<&str>, mover_exporter: &str, display: Display) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["demo", "owner", "--exporter", &options.exporter, "--size", &options.size.to_string()]);
    if let Some(device) = &options.device {
        command.args(["--device", device]);
    }
    let mut owner = command.stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(owner.stdout.take().expect("piped")).read_line(&mut line)?;
    let moved = match line.trim().strip_prefix(ui::LISTENING) {
        Some(address) => mover::run(mover, mover_exporter, address, display),
        None => Ok(()), // The owner failed and printed why; its status is checked below.
    };
    if moved.is_err() {
        // The owner may still wait for the mover, or may have exited already.
        let _ = owner.kill();
    }
    let status = owner.wait()?;
    moved?;
    if status.success() { Ok(()) } else { Err(format!("the owner ended with {status}").into()) }
}
