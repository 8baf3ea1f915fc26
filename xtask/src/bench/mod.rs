//! `cargo xtask bench NAME`: runs a benchmark in its guest or on this machine.
//!
//! A benchmark is a cargo bench target, or an ignored unit test of the library,
//! that writes one JSON object per line to the file named by `BENCH_ROWS`. xtask
//! prints the rows as a table, writes `target/bench/NAME.json`, and draws a chart
//! if rows have points.

mod chart;
pub mod python;
mod rows;

use crate::guest::{Guest, Job};
use crate::host::{self, Need};
use crate::kernel::rxe::Rxe;
use crate::provider::Provider;
use crate::size::Size;
use crate::{cargo, project, ui, vm};
use anyhow::{Context, Result, bail};
use rows::Row;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// The guest for a benchmark.
struct Shape {
    rxe: Rxe,
    memory: Size,
    cpus: u32,
    timeout: Duration,
}

/// A benchmark of one or several parts.
struct Benchmark {
    name: &'static str,
    about: &'static str,
    parts: &'static [Part],
    /// The labels of its chart, `target/bench/NAME.svg`, if it has one.
    chart: Option<chart::Labels>,
    /// Peers that are Python packages, if it has any.
    packages: Option<python::Packages>,
}

/// The part of a benchmark that runs in one place.
struct Part {
    program: Program,
    /// `None` to run on this machine.
    guest: Option<Shape>,
}

/// What a part runs.
#[derive(Clone, Copy)]
enum Program {
    /// A cargo bench target.
    Bench(&'static str),
    /// An ignored unit test of the library, by its path. It can reach what is not public.
    UnitTest(&'static str),
    /// The same of the C library.
    UnitTestOfC(&'static str),
}

const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "register",
        about: "register and deregister, compared with a bare C program; sets, cost per GiB",
        parts: &[Part {
            program: Program::Bench("register"),
            guest: Some(Shape {
                rxe: Rxe::Dmabuf,
                memory: Size::gib(7),
                cpus: 2,
                timeout: Duration::from_secs(1200),
            }),
        }],
        chart: Some(chart::Labels { title: "Registration time per GiB", x: "region size", peer: "C" }),
        packages: None,
    },
    Benchmark {
        name: "cache",
        about: "hits of the registration cache, compared with a HashMap behind a RwLock",
        parts: &[Part { program: Program::UnitTest("mr::tests::cache_bench::cache_hit"), guest: None }],
        chart: None,
        packages: None,
    },
    Benchmark {
        name: "post",
        about: "post transfers and blocks natively, compared with requests by hand on the same stub provider",
        parts: &[
            Part { program: Program::UnitTest("transfer::tests::post_bench::post"), guest: None },
            Part { program: Program::UnitTest("transfer::tests::future_bench::future"), guest: None },
        ],
        chart: None,
        packages: None,
    },
    Benchmark {
        name: "c",
        about: "calls of the C library, compared with the same in Rust",
        parts: &[Part { program: Program::UnitTestOfC("tests::bench::calls"), guest: None }],
        chart: None,
        packages: None,
    },
    Benchmark {
        name: "export",
        about: "export device memory and find it in the cache, with stub libraries, compared with the driver's calls",
        parts: &[
            Part { program: Program::UnitTest("mr::tests::pointer_bench::pointer_hit"), guest: None },
            Part {
                program: Program::Bench("export"),
                guest: Some(Shape {
                    rxe: Rxe::Stock,
                    memory: Size::gib(1),
                    cpus: 2,
                    timeout: Duration::from_secs(600),
                }),
            },
        ],
        chart: None,
        packages: None,
    },
    Benchmark {
        name: "sg",
        about: "lists of runs, compared with C over a scatterlist; their sources, compared with the kernel",
        parts: &[
            Part { program: Program::Bench("sg"), guest: None },
            Part {
                program: Program::Bench("sg_memory"),
                guest: Some(Shape {
                    rxe: Rxe::Dmabuf,
                    memory: Size::gib(7),
                    cpus: 2,
                    timeout: Duration::from_secs(600),
                }),
            },
        ],
        chart: None,
        packages: None,
    },
    Benchmark {
        name: "transfer",
        about: "bandwidth and latency over the guest's wire, compared with perftest",
        parts: &[Part {
            program: Program::Bench("transfer"),
            guest: Some(Shape {
                rxe: Rxe::Dmabuf,
                memory: Size::gib(7),
                cpus: 2,
                timeout: Duration::from_secs(3600),
            }),
        }],
        chart: Some(chart::Labels { title: "Over the wire", x: "message size", peer: "perftest" }),
        packages: None,
    },
    Benchmark {
        name: "peers",
        about: "scattered blocks over the guest's wire, from Rust and Python, compared with NIXL, Mooncake, UCX and perftest",
        parts: &[Part {
            program: Program::Bench("peers"),
            guest: Some(Shape {
                rxe: Rxe::Dmabuf,
                memory: Size::gib(7),
                cpus: 2,
                timeout: Duration::from_secs(3 * 3600),
            }),
        }],
        chart: Some(chart::Labels { title: "Scattered blocks over the wire", x: "block size", peer: "" }),
        packages: Some(python::Packages {
            folder: "peers",
            requirements: "benches/peers/requirements.txt",
            purpose: "to compare with",
            advice: "To compare with the other peers alone, name them: cargo xtask bench peers -- hand hand-polling perftest ucx",
            // The arguments that choose them, and those that choose the other peers.
            words: &["nixl", "mooncake", "python", "python-polling"],
            others: &["hand", "hand-polling", "perftest", "ucx"],
        }),
    },
];

/// Run a benchmark and compare it with its goals.
#[derive(clap::Args)]
pub struct Args {
    /// Name of the benchmark; without it, list all
    name: Option<String>,
    /// Use this machine's RDMA device instead of a guest
    #[arg(long)]
    host: bool,
    /// Fail if a goal is missed
    #[arg(long)]
    check: bool,
    /// Arguments for the benchmark
    #[arg(last = true)]
    arguments: Vec<String>,
}

pub fn run(mut args: Args) -> Result<ExitCode> {
    let Some(name) = args.name.clone() else {
        for benchmark in BENCHMARKS {
            println!("{:12} {}", benchmark.name, benchmark.about);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let Some(benchmark) = BENCHMARKS.iter().find(|b| b.name == name) else {
        let names: Vec<_> = BENCHMARKS.iter().map(|b| b.name).collect();
        bail!("benchmark `{name}` is unknown; use one of {}", names.join(", "));
    };
    let in_guests = !args.host && benchmark.parts.iter().any(|part| part.guest.is_some());
    let mut needs = vec![Need::Library, Need::Peers];
    needs.extend(in_guests.then_some(Need::Guest));
    needs.extend(benchmark.packages.is_some().then_some(Need::BlockPeers));
    host::ensure(&needs)?;
    if let Some(packages) = benchmark.packages.as_ref().filter(|packages| packages.wanted(&args.arguments)) {
        let python = packages.install()?;
        python::install_ours(&python, "release")?;
        args.arguments.extend(["--python".into(), python.to_string_lossy().into_owned()]);
    }
    let step = ui::Step::start("Building", benchmark.name);
    let programs = benchmark.parts.iter().map(|part| part.program.build()).collect::<Result<Vec<_>>>()?;
    step.done("Built", benchmark.name);

    let home = project::target().join("bench");
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let mut rows = Vec::new();
    let mut success = true;
    for (part, program) in benchmark.parts.iter().zip(programs) {
        // Run the other parts even if one fails.
        success &= part.run(&args, &program, &home, &mut rows)?;
    }
    let json = home.join(format!("{}.json", benchmark.name));
    fs::write(&json, rows::to_json(&rows)?).with_context(|| format!("cannot write {}", json.display()))?;
    print!("{}", rows::table(&rows));
    let chart = benchmark.chart.as_ref().map(|labels| chart::svg(labels, &rows)).transpose()?;
    if let Some(text) = chart.flatten() {
        let path = home.join(format!("{}.svg", benchmark.name));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        ui::note("Chart", &path.display().to_string());
    }
    ui::note("Rows", &json.display().to_string());
    if !success {
        ui::error(&format!("benchmark {name} failed; see its output above"));
    } else if rows.is_empty() {
        ui::error(&format!("benchmark {name} measured nothing; check its arguments"));
    }
    let met = rows.iter().all(|row| row.met() != Some(false));
    let fine = success && !rows.is_empty() && (met || !args.check);
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Program {
    fn build(self) -> Result<PathBuf> {
        match self {
            Self::Bench(target) => cargo::executable(&["bench", "--no-run", "--bench", target], target),
            Self::UnitTest(_) => {
                cargo::executable(&["test", "--release", "--no-run", "--lib"], "dmabuf_rdma")
            }
            Self::UnitTestOfC(_) => {
                cargo::executable(&["test", "--release", "--no-run", "--lib"], "dmabuf_rdma_capi")
            }
        }
    }

    /// For the name of a file.
    fn name(self) -> &'static str {
        match self {
            Self::Bench(target) => target,
            Self::UnitTest(path) | Self::UnitTestOfC(path) => path.rsplit("::").next().unwrap_or(path),
        }
    }

    /// The program's own arguments.
    fn arguments(self) -> Vec<String> {
        match self {
            Self::Bench(_) => Vec::new(),
            Self::UnitTest(path) | Self::UnitTestOfC(path) => {
                ["--ignored", "--exact", path, "--nocapture"].map(str::to_string).to_vec()
            }
        }
    }
}

impl Part {
    /// Runs this part, adds its rows and returns whether it succeeded.
    fn run(&self, args: &Args, program: &Path, home: &Path, rows: &mut Vec<Row>) -> Result<bool> {
        let lines = home.join(format!("{}.rows", self.program.name()));
        let _ = fs::remove_file(&lines);
        let arguments = [self.program.arguments(), args.arguments.clone()].concat();
        let success = match self.guest.as_ref().filter(|_| !args.host) {
            Some(shape) => {
                let guest = Guest {
                    cpus: shape.cpus,
                    timeout: Some(shape.timeout),
                    out: Some(home.to_path_buf()),
                    // The kernel's command is measured, without a provider's additions.
                    provider: Provider::Debian,
                    ..Guest::new(shape.rxe, shape.memory)
                };
                in_the_guest(&guest, program, &arguments, &lines)?
            }
            None => {
                let mut command = Command::new(program);
                command.args(&arguments).current_dir(project::root()).env("BENCH_ROWS", &lines);
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
    // Only the guest knows $OUT, so a shell expands it there.
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
