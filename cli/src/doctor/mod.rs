//! `doctor`: what works on this machine, in this container, for this user; and if something does not, why.
//!
//! 1. [`facts`] gathers what there is, or says why it could not look.
//! 2. [`trials`] tries every exporter with every device, and compares bytes.
//! 3. [`findings`] names causes and remedies, most useful first.
//! 4. [`grade`] sums up, and decides the exit status.

mod facts;
mod failure;
mod findings;
mod grade;
mod look;
mod print;
mod redact;
mod trials;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::{Result, ui};
use facts::Facts;
use findings::Finding;
use grade::Grade;
use look::Look;
use trials::Trials;

/// Say what works here and what does not, why, and what to do.
///
/// Looks at kernel, container, libraries, limits, devices and GPUs, then tries every exporter with every RDMA device: allocates,
/// registers and transfers from the device to itself, and compares the bytes. It changes no setting, and says what it could
/// not look at without more rights.
///
/// The exit status is 0 if verified bytes moved, 1 if none did, and 2 if the arguments were wrong.
#[derive(clap::Args)]
#[command(after_help = "docs/doctor.md explains every finding and the JSON.")]
pub struct Args {
    /// Print JSON, for programs.
    #[arg(long)]
    json: bool,
    /// Also write text and JSON into this file, for a bug report: addresses and host names are replaced.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Also draw the text into this SVG file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Look at copies of another machine's sys, proc, dev, etc, usr and boot in this folder, and try nothing.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

/// Everything that doctor found. docs/doctor.md documents its JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Version of this format. Additions do not change it.
    schema: u32,
    program: String,
    grade: Grade,
    summary: String,
    facts: Facts,
    /// None for a copy of another machine's files.
    trials: Option<Trials>,
    findings: Vec<Finding>,
}

impl Diagnosis {
    fn of(look: &Look) -> Self {
        let mut facts = Facts::gather(look);
        let trials = look.here.then(|| trials::run(&mut facts));
        let findings = findings::find(&facts, trials.as_ref());
        let grade = Grade::of(trials.as_ref());
        Self {
            schema: 1,
            program: concat!("dmabuf-rdma ", env!("CARGO_PKG_VERSION")).into(),
            summary: grade.summary(trials.as_ref()),
            grade,
            facts,
            trials,
            findings,
        }
    }
}

pub fn run(args: &Args) -> ExitCode {
    match examine(args) {
        Ok(grade) if grade.works() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            ui::failure(error.as_ref());
            ExitCode::from(2)
        }
    }
}

fn examine(args: &Args) -> Result<Grade> {
    let look = match &args.root {
        Some(root) if root.is_dir() => Look::at(root),
        Some(root) => return Err(format!("{} is no folder", root.display()).into()),
        None => Look::here(),
    };
    let diagnosis = Diagnosis::of(&look);
    if args.json {
        ui::line(serde_json::to_string_pretty(&diagnosis)?);
    } else {
        ui::line(print::text(&diagnosis));
    }
    let write = |path: &PathBuf, text: String| -> Result<()> {
        Ok(fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?)
    };
    if let Some(path) = &args.report {
        let public = redact::redacted(&diagnosis)?;
        let json = serde_json::to_string_pretty(&public)?;
        write(path, format!("{}\n\n{json}\n", anstream::adapter::strip_str(&print::text(&public))))?;
    }
    if let Some(path) = &args.svg {
        write(path, anstyle_svg::Term::new().render_svg(&print::text(&diagnosis)))?;
    }
    Ok(diagnosis.grade)
}
