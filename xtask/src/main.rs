//! `cargo xtask`: everything around the library that is not the library.
//!
//! It sets up what is missing, builds the kernel module, boots the guest and
//! runs the demo, the tests and the benchmarks in it. See `docs/testing.md`.

mod bench;
mod cargo;
mod demo;
mod guest;
mod host;
mod kernel;
mod lavapipe;
mod lock;
mod process;
mod project;
mod size;
mod test;
mod ui;
mod vm;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Set-up, guest, demo, tests and benchmarks of dmabuf-rdma.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Demo(demo::Args),
    Test(test::Args),
    Vm(vm::Args),
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Demo(args) => demo::run(args),
        Task::Test(args) => test::run(args),
        Task::Vm(args) => vm::run(args),
        Task::Bench(args) => bench::run(args),
    };
    result.unwrap_or_else(|error| {
        ui::error(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}
