//! Shared by the benchmarks: paired measurements and result rows.

#[allow(dead_code)] // not every benchmark uses it
pub mod steps;

use std::env;
use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Pins this process to the highest allowed CPU, since the lowest ones handle interrupts.
#[allow(dead_code)] // not every benchmark uses it
pub fn stay_on_one_processor() -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let last = (0..CpuSet::count()).rev().find(|&cpu| allowed.is_set(cpu) == Ok(true));
    let mut one = CpuSet::new();
    one.set(last.ok_or("the affinity mask allows no CPU")?)?;
    Ok(sched_setaffinity(this, &one)?)
}

/// The CPUs that this program may use.
#[allow(dead_code)] // not every benchmark uses it
pub struct Processors(CpuSet);

#[allow(dead_code)]
impl Processors {
    pub fn allowed() -> Result<Self> {
        Ok(Self(sched_getaffinity(Pid::from_raw(0))?))
    }

    /// Pins this thread to the `nth` allowed CPU.
    pub fn stay_on(&self, nth: usize) -> Result<()> {
        let cpu = (0..CpuSet::count()).filter(|&cpu| self.0.is_set(cpu) == Ok(true)).nth(nth);
        let mut one = CpuSet::new();
        one.set(cpu.ok_or_else(|| format!("the affinity mask allows fewer than {} CPUs", nth + 1))?)?;
        Ok(sched_setaffinity(Pid::from_raw(0), &one)?)
    }

    /// Lets this thread, and the threads that it starts, run on all allowed CPUs.
    pub fn all(&self) -> Result<()> {
        Ok(sched_setaffinity(Pid::from_raw(0), &self.0)?)
    }
}

/// One measurement of each side.
pub struct Pair {
    pub library: f64,
    pub bare: f64,
}

/// Measures both sides alternately, A B then B A, after one unmeasured warm-up of each.
pub fn pairs(
    pairs: usize,
    mut library: impl FnMut() -> Result<f64>,
    mut bare: impl FnMut() -> Result<f64>,
) -> Result<Vec<Pair>> {
    library()?;
    bare()?;
    let pair = |at| {
        if at % 2 == 0 {
            let library = library()?;
            Ok(Pair { library, bare: bare()? })
        } else {
            let bare = bare()?;
            Ok(Pair { library: library()?, bare })
        }
    };
    (0..pairs).map(pair).collect()
}

#[derive(Clone, Copy)]
pub struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

impl Spread {
    /// The spread of an odd number of values, so that one of them is the median.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.collect();
        values.sort_by(f64::total_cmp);
        Self { min: values[0], median: values[values.len() / 2], max: values[values.len() - 1] }
    }
}

pub struct Peer {
    pub value: f64,
    pub ratio: f64,
    /// The quartiles of the ratios.
    pub half: (f64, f64),
}

impl Peer {
    /// The peer's median, and the median of the ratios library / peer over all pairs.
    pub fn of(pairs: &[Pair]) -> Self {
        let mut ratios: Vec<_> = pairs.iter().map(|pair| pair.library / pair.bare).collect();
        ratios.sort_by(f64::total_cmp);
        let at = |quarters| ratios[(ratios.len() - 1) * quarters / 4];
        let value = Spread::of(pairs.iter().map(|pair| pair.bare)).median;
        Self { value, ratio: ratios[ratios.len() / 2], half: (at(1), at(3)) }
    }
}

/// Waits until a server listens. A connection would be taken for the client's, so this reads /proc.
#[allow(dead_code)] // not every benchmark uses it
pub fn until_it_listens(port: u16) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    let port = format!(":{port:04X} ");
    while Instant::now() < end {
        let sockets = ["/proc/net/tcp", "/proc/net/tcp6"].map(std::fs::read_to_string);
        let listens = |text: &str| text.lines().any(|line| line.contains(&port) && line.contains(" 0A "));
        if sockets.iter().flatten().any(|text| listens(text)) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err("the server does not listen".into())
}

/// Prints rows on stdout and writes them as JSON lines to the file named by `BENCH_ROWS`.
pub struct Rows(Option<File>);

impl Rows {
    pub fn new() -> Result<Self> {
        Ok(Self(env::var_os("BENCH_ROWS").map(File::create).transpose()?))
    }

    pub fn add(
        &mut self,
        row: &str,
        unit: &str,
        of: Spread,
        peer: Option<Peer>,
        goal: Option<&str>,
    ) -> Result<()> {
        self.write(row, unit, of, peer, goal, None)
    }

    /// Adds a row that is also a point of the chart, of `series` at `x`.
    #[allow(dead_code)]
    pub fn add_point(&mut self, row: &str, unit: &str, of: Spread, series: &str, x: u64) -> Result<()> {
        self.write(row, unit, of, None, None, Some((series, x)))
    }

    /// Adds a row that is a point of the chart, with the peer's value.
    #[allow(dead_code)]
    pub fn add_compared(
        &mut self,
        row: &str,
        unit: &str,
        of: Spread,
        peer: Peer,
        goal: &str,
        (series, x): (&str, u64),
    ) -> Result<()> {
        self.write(row, unit, of, Some(peer), Some(goal), Some((series, x)))
    }

    fn write(
        &mut self,
        row: &str,
        unit: &str,
        of: Spread,
        peer: Option<Peer>,
        goal: Option<&str>,
        point: Option<(&str, u64)>,
    ) -> Result<()> {
        let Spread { min, median, max } = of;
        print!("{row:<40} {median:>9.2} {unit} ({min:.2} to {max:.2})");
        match &peer {
            Some(Peer { value, ratio, half: (low, high) }) => {
                println!(", peer {value:.2} {unit}, ratio {ratio:.4} ({low:.3} to {high:.3})");
            }
            None => println!(),
        }
        if let Some(file) = &mut self.0 {
            let half = peer.as_ref().map(|peer| peer.half);
            let (peer, ratio) = peer.map(|peer| (peer.value, peer.ratio)).unzip();
            let (low, high) = half.unzip();
            let (series, x) = point.unzip();
            let line = json!({
                "row": row, "value": median, "unit": unit, "min": min, "max": max,
                "peer_value": peer, "ratio": ratio, "ratio_low": low, "ratio_high": high, "goal": goal,
                "series": series, "x": x,
            });
            writeln!(file, "{line}")?;
        }
        Ok(())
    }
}
