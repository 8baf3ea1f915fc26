//! The program `dmabuf-rdma`: says what works on this machine, and tries it out.
//!
//! Each command has a module. `ui.rs` prints for all of them but `doctor`, which has a report of its own.

mod bench;
mod copy;
mod demo;
mod doctor;
mod explain;
mod exporter;
mod net;
mod pages;
mod pattern;
mod ping;
mod register;
mod serve;
mod size;
mod ui;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Zero-copy RDMA on dma-bufs: says what works on this machine, and tries it out.
#[derive(Parser)]
#[command(name = "dmabuf-rdma", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Doctor(doctor::Args),
    Explain(explain::Args),
    Bench(bench::Args),
    Copy(copy::Args),
    Ping(ping::Args),
    Serve(serve::Args),
    Read(serve::ReadArgs),
    Write(serve::WriteArgs),
    Demo(demo::Args),
    Man(pages::ManArgs),
    Completions(pages::CompletionsArgs),
}

fn main() -> ExitCode {
    let run = match Cli::parse().command {
        Command::Doctor(args) => return doctor::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Copy(args) => copy::run(args),
        Command::Ping(args) => ping::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Read(args) => serve::read(&args),
        Command::Write(args) => serve::write(&args),
        Command::Demo(args) => demo::run(args),
        Command::Man(args) => pages::man(&args),
        Command::Completions(args) => pages::completions(&args),
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::failure(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        crate::Cli::command().debug_assert();
    }
}
