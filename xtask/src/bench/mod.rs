//! `cargo xtask bench NAME`: a benchmark, run where it belongs.
//!
//! A benchmark is a cargo bench target that writes one JSON object a line into
//! the file that `BENCH_ROWS` names; here the rows become a table for people,
//! `target/bench/NAME.json` for programs, and a chart where they have points.

mod chart;
mod rows;

use crate::guest::{Guest, Job};
use crate::host::{self, Need};
use crate::kernel::rxe::Rxe;
use crate::size::Size;
use crate::{cargo, project, ui, vm};
use anyhow::{Context, Result, bail};
use rows::Row;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// The guest that a benchmark runs in.
struct Shape {
    rxe: Rxe,
    memory: Size,
    cpus: u32,
    limit: Duration,
}

/// A benchmark, in one or several parts.
struct Benchmark {
    name: &'static str,
    about: &'static str,
    parts: &'static [Part],
    /// Of its chart, `target/bench/NAME.svg`, where rows are points of one.
    chart: Option<chart::Labels>,
}

/// What runs in one place.
struct Part {
    /// The cargo target.
    target: &'static str,
    /// `None` for a benchmark of this machine itself.
    guest: Option<Shape>,
}

const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "register",
        about: "register and deregister against a bare C program; sets, the cache, the cost of a GiB",
        parts: &[Part {
            target: "register",
            guest: Some(Shape {
                rxe: Rxe::Dmabuf,
                memory: Size::gib(7),
                cpus: 2,
                limit: Duration::from_secs(1200),
            }),
        }],
        chart: Some(chart::Labels { title: "Registering, by the GiB", x: "size of the region", peer: "C" }),
    },
    Benchmark {
        name: "export",
        about: "device memory as a dma-buf, on the stub libraries, against the driver's own call",
        parts: &[Part {
            target: "export",
            guest: Some(Shape {
                rxe: Rxe::Stock,
                memory: Size::gib(1),
                cpus: 2,
                limit: Duration::from_secs(600),
            }),
        }],
        chart: None,
    },
    Benchmark {
        name: "sg",
        about: "lists of runs, against C over a scatterlist, and where they come from, against the kernel",
        parts: &[
            Part { target: "sg", guest: None },
            Part {
                target: "sg_memory",
                guest: Some(Shape {
                    rxe: Rxe::Dmabuf,
                    memory: Size::gib(7),
                    cpus: 2,
                    limit: Duration::from_secs(600),
                }),
            },
        ],
        chart: None,
    },
    Benchmark {
        name: "transfer",
        about: "bandwidth and latency across the guest's wire, against perftest",
        parts: &[Part {
            target: "transfer",
            guest: Some(Shape {
                rxe: Rxe::Dmabuf,
                memory: Size::gib(7),
                cpus: 2,
                limit: Duration::from_secs(3600),
            }),
        }],
        chart: Some(chart::Labels { title: "Across the wire", x: "size of a message", peer: "perftest" }),
    },
];

/// Run a benchmark and show how it does against its goals.
#[derive(clap::Args)]
pub struct Args {
    /// Which one; without it, what there is
    name: Option<String>,
    /// Run it on this machine's RDMA device instead of in a guest
    #[arg(long)]
    host: bool,
    /// Fail when a goal is missed
    #[arg(long)]
    check: bool,
    /// More arguments for the benchmark
    #[arg(last = true)]
    arguments: Vec<String>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let Some(name) = &args.name else {
        for benchmark in BENCHMARKS {
            println!("{:12} {}", benchmark.name, benchmark.about);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let Some(benchmark) = BENCHMARKS.iter().find(|b| b.name == name) else {
        let names: Vec<_> = BENCHMARKS.iter().map(|b| b.name).collect();
        bail!("no benchmark `{name}`; there is {}", names.join(", "));
    };
    let in_guests = !args.host && benchmark.parts.iter().any(|part| part.guest.is_some());
    let needs: &[Need] =
        if in_guests { &[Need::Library, Need::Peers, Need::Guest] } else { &[Need::Library, Need::Peers] };
    host::ensure(needs)?;
    let step = ui::Step::start("Building", benchmark.name);
    let build = |part: &Part| cargo::executable(&["bench", "--no-run", "--bench", part.target], part.target);
    let programs = benchmark.parts.iter().map(build).collect::<Result<Vec<_>>>()?;
    step.done("Built", benchmark.name);

    let home = project::target().join("bench");
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let mut rows = Vec::new();
    let mut success = true;
    for (part, program) in benchmark.parts.iter().zip(programs) {
        // A part that fails does not keep the others from showing what they measure.
        success &= part.run(&args, &program, &home, &mut rows)?;
    }
    let json = home.join(format!("{}.json", benchmark.name));
    fs::write(&json, rows::to_json(&rows)?).with_context(|| format!("cannot write {}", json.display()))?;
    print!("{}", rows::table(&rows));
    if let Some(text) = benchmark.chart.as_ref().and_then(|labels| chart::svg(labels, &rows)) {
        let path = home.join(format!("{}.svg", benchmark.name));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        ui::note("Chart", &path.display().to_string());
    }
    ui::note("Rows", &json.display().to_string());
    if !success {
        ui::error("the benchmark failed");
    } else if rows.is_empty() {
        ui::error("the benchmark wrote no rows");
    }
    let met = rows.iter().all(|row| row.met() != Some(false));
    let fine = success && !rows.is_empty() && (met || !args.check);
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Part {
    /// Runs it and adds its rows; whether it succeeded.
    fn run(&self, args: &Args, program: &Path, home: &Path, rows: &mut Vec<Row>) -> Result<bool> {
        let lines = home.join(format!("{}.rows", self.target));
        let _ = fs::remove_file(&lines);
        let success = match self.guest.as_ref().filter(|_| !args.host) {
            Some(shape) => {
                let guest = Guest {
                    cpus: shape.cpus,
                    limit: Some(shape.limit),
                    out: Some(home.to_path_buf()),
                    ..Guest::new(shape.rxe, shape.memory)
                };
                in_the_guest(&guest, program, &args.arguments, &lines)?
            }
            None => {
                let mut command = Command::new(program);
                command.args(&args.arguments).current_dir(project::root()).env("BENCH_ROWS", &lines);
                command.status().context("cannot run the benchmark")?.success()
            }
        };
        let text = fs::read_to_string(&lines).unwrap_or_default();
        for line in text.lines() {
            rows.push(Row::parse(line)?);
        }
        let _ = fs::remove_file(&lines);
        Ok(success)
    }
}

fn in_the_guest(guest: &Guest, program: &Path, arguments: &[String], lines: &Path) -> Result<bool> {
    let file = lines.file_name().map(PathBuf::from).unwrap_or_default();
    // $OUT is known only inside, so a shell puts the name together.
    let script = format!("BENCH_ROWS=$OUT/{} exec \"$@\"", file.display());
    let mut words: Vec<String> = ["sh", "-c", &script, "bench"].map(str::to_string).to_vec();
    words.push(program.to_string_lossy().into_owned());
    words.extend(arguments.iter().cloned());
    let mut job = Job::new(words)?;
    job.directory = project::root().to_path_buf();
    let mut outcome = guest.run(&job)?;
    outcome.out = None;
    vm::report(&outcome);
    Ok(outcome.success())
}
