//! `cargo xtask`: the project's development tasks.
//!
//! It installs missing packages, builds the kernel modules, boots the guest and
//! runs the demo, tests and benchmarks in it. See `docs/testing.md`.

mod api;
mod bench;
mod cargo;
mod demo;
mod guest;
mod host;
mod kernel;
mod lavapipe;
#[cfg(test)]
mod layers;
mod lock;
mod process;
mod project;
mod provider;
mod size;
mod test;
mod ui;
mod vm;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Setup, guest, demo, tests and benchmarks of dmabuf-rdma.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    /// Take the guest's kernel from this Debian mirror instead of the machine's apt sources
    #[arg(long, global = true, value_name = "URL", env = host::MIRROR)]
    mirror: Option<String>,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Demo(demo::Args),
    Test(test::Args),
    Vm(vm::Args),
    Bench(bench::Args),
    Api(api::Args),
    Ui(test::refused::Args),
}

/// Variables that choose compilers and make's behaviour. They are about the user's other work, such as a kernel for
/// another architecture, and would reach every build below.
const OF_OTHER_BUILDS: &[&str] = &[
    "ARCH",
    "AR",
    "AS",
    "CC",
    "CFLAGS",
    "CPP",
    "CROSS_COMPILE",
    "CXX",
    "CXXFLAGS",
    "GNUMAKEFLAGS",
    "HOSTCC",
    "KBUILD_EXTMOD",
    "KBUILD_OUTPUT",
    "KCFLAGS",
    "LD",
    "LDFLAGS",
    "LLVM",
    "LLVM_IAS",
    "M",
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "NM",
    "O",
    "OBJCOPY",
    "STRIP",
    "SUBARCH",
    "V",
    "W",
];

fn main() -> ExitCode {
    for name in OF_OTHER_BUILDS {
        // SAFETY: this is the only thread, so nothing reads the environment meanwhile.
        unsafe { std::env::remove_var(name) };
    }
    let cli = Cli::parse();
    if let Some(url) = cli.mirror {
        host::use_mirror(url);
    }
    let result = match cli.task {
        Task::Demo(args) => demo::run(args),
        Task::Test(args) => test::run(args),
        Task::Vm(args) => vm::run(args),
        Task::Bench(args) => bench::run(args),
        Task::Api(args) => api::run(args),
        Task::Ui(args) => test::refused::run(args),
    };
    result.unwrap_or_else(|error| {
        ui::error(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}
