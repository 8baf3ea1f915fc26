//! Manual pages and shell completions, from the same description as the help.

use std::fs;
use std::path::PathBuf;

use clap::CommandFactory;

use crate::{Cli, Result, ui};

/// Write the manual pages, one for each command.
#[derive(clap::Args)]
pub struct ManArgs {
    /// The folder for the pages.
    #[arg(long, default_value = ".")]
    out: PathBuf,
}

/// Print the completions of a shell.
#[derive(clap::Args)]
pub struct CompletionsArgs {
    shell: clap_complete::Shell,
}

pub fn man(args: &ManArgs) -> Result<()> {
    fs::create_dir_all(&args.out).map_err(|error| format!("{}: {error}", args.out.display()))?;
    clap_mangen::generate_to(Cli::command(), &args.out)?;
    ui::row("written", args.out.join("dmabuf-rdma.1").display());
    Ok(())
}

pub fn completions(args: &CompletionsArgs) -> Result<()> {
    clap_complete::generate(args.shell, &mut Cli::command(), "dmabuf-rdma", &mut std::io::stdout());
    Ok(())
}
