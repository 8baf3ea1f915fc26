//! Transfers across the wire: this library against perftest.
//!
//! What makes the two comparable:
//! - Both run two processes, one on each device, which connect and then move the same number of messages of
//!   the same size: an MTU of 4096, 32 messages in flight, the same buffer for each message. Both time from
//!   the first post to the last completion.
//! - They take turns, A B then B A, in one guest. The ratio is the median over the pairs; the minimum and the
//!   maximum of the values are printed beside it.
//! - perftest's buffers are host memory, the library's are dma-bufs. perftest would copy small messages into
//!   the work request (inline), which is impossible for memory without a CPU address, so that is turned off.
//!
//! Both sending sides poll for completions without a pause. The part `asleep` measures the library as it
//! waits by default, which depends on the host.
//!
//! Processor time is that of the sending process, with its start, in user mode and in the kernel.
//!
//! Instructions are those of the sending process from its 64th to its 192nd message, counted by
//! single-stepping. A stepped perftest finds a completion nearly every time it polls, so its count is a lower
//! bound.
//!
//! The part `notify` compares notifications with `ib_send_lat`; both copy the bytes into the work request (inline). The
//! part `future` compares a write that is awaited in tokio with one that is waited for.
//!
//! Needs the guest's devices `rxe0` and `rxe1`, and perftest. An argument chooses a part: `latency`, `notify`, `future`,
//! `instructions`, `write`, `read`, `send`, `asleep`, `whole` (2 GiB with one call). `--quick` measures one
//! pair of few messages.

// Not every benchmark needs all of it.
#[allow(dead_code)]
#[path = "common/mod.rs"]
mod common;
#[path = "transfer/future.rs"]
mod future;
#[path = "transfer/party.rs"]
mod party;
#[path = "transfer/perftest.rs"]
mod perftest;

use std::env;

use common::{Pair, Peer, Result, Rows, Spread, pairs};
use party::ours;
use perftest::theirs;

/// The two ends of the wire.
const NEAR: &str = "rxe0";
const FAR: &str = "rxe1";
const FAR_ADDRESS: &str = "192.168.77.2";

/// Messages in flight.
const DEPTH: u32 = 32;
/// Messages in the library's work request chains.
const CHAIN: u32 = 8;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Write,
    Read,
    Send,
    /// One message to the peer and one back.
    Latency,
    /// One notification to the peer and one back.
    Notify,
}

impl Kind {
    fn is_latency(self) -> bool {
        matches!(self, Self::Latency | Self::Notify)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Send => "send",
            Self::Latency => "latency",
            Self::Notify => "notify",
        }
    }
}

/// What to measure.
#[derive(Clone, Copy)]
struct Load {
    kind: Kind,
    size: u64,
    times: u64,
    /// Move one buffer with all bytes, instead of one small buffer many times.
    whole: bool,
    /// Count the instructions of the sending process for this many messages.
    stepped: u64,
    /// The library sleeps until there are completions, instead of polling without a pause.
    asleep: bool,
}

impl Load {
    fn new(kind: Kind, size: u64, times: u64) -> Self {
        Self { kind, size, times, whole: false, stepped: 0, asleep: false }
    }
}

/// What was measured.
#[derive(Clone, Copy)]
struct Outcome {
    /// MiB/s, or microseconds one way.
    figure: f64,
    /// Microseconds of processor time per message.
    cpu: f64,
    /// Instructions of the sending process, if they are counted.
    instructions: u64,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some(at) = arguments.iter().position(|word| word == party::ROLE) {
        return party::play(&arguments[at + 1..]);
    }
    let quick = arguments.iter().any(|word| word == "--quick");
    // cargo's own arguments begin with dashes.
    let chosen: Vec<_> = arguments.iter().filter(|word| !word.starts_with('-')).collect();
    let wanted = |part: &str| chosen.is_empty() || chosen.iter().any(|word| *word == part);
    let pairs = |many| if quick { 1 } else { many };
    let mut rows = Rows::new()?;
    let bytes = if quick { 8 * MIB } else { 64 * MIB };
    // perftest moves at least 5 messages.
    let streamed = |kind, size| Load::new(kind, size, (bytes / size).max(5));
    if wanted("latency") {
        measure(&mut rows, Load::new(Kind::Latency, 8, 1000), pairs(31))?;
    }
    if wanted("notify") {
        measure(&mut rows, Load::new(Kind::Notify, 8, 1000), pairs(31))?;
    }
    if wanted("future") {
        future::measure(&mut rows, pairs(31))?;
    }
    if wanted("instructions") {
        instructions(&mut rows)?;
    }
    for kind in [Kind::Write, Kind::Read, Kind::Send] {
        if wanted(kind.name()) {
            for size in [64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB] {
                measure(&mut rows, streamed(kind, size), pairs(21))?;
            }
        }
    }
    if wanted("asleep") {
        for kind in [Kind::Write, Kind::Read] {
            measure(&mut rows, Load { asleep: true, ..streamed(kind, MIB) }, pairs(7))?;
        }
    }
    if wanted("whole") && !quick {
        measure(&mut rows, Load { whole: true, ..Load::new(Kind::Write, 8 * MIB, 256) }, 7)?;
    }
    Ok(())
}

/// User-mode instructions per message.
fn instructions(rows: &mut Rows) -> Result<()> {
    for kind in [Kind::Write, Kind::Send] {
        // After the first window, each post has to wait for a completion.
        let load = |stepped| Load { whole: true, stepped, ..Load::new(kind, 64 * KIB, 256) };
        let each = |run: fn(Load) -> Result<Outcome>| -> Result<f64> {
            let (few, many) = (run(load(64))?.instructions, run(load(192))?.instructions);
            Ok(many.saturating_sub(few) as f64 / 128.0)
        };
        let pair = Pair { library: each(ours)?, bare: each(theirs)? };
        let of = Spread::of([pair.library].into_iter());
        let peer = Some(Peer::of(&[pair]));
        let name = format!("{}: instructions a message", kind.name());
        rows.add(&name, "", of, peer, Some("ratio <= 1.00"))?;
    }
    Ok(())
}

fn measure(rows: &mut Rows, load: Load, count: usize) -> Result<()> {
    let (mut our_cpu, mut their_cpu) = (Vec::new(), Vec::new());
    let turns = {
        let library = || {
            let Outcome { figure, cpu, .. } = ours(load)?;
            our_cpu.push(cpu);
            Ok(figure)
        };
        let peer = || {
            let Outcome { figure, cpu, .. } = theirs(load)?;
            their_cpu.push(cpu);
            Ok(figure)
        };
        pairs(count, library, peer)?
    };
    let name = match load {
        Load { whole: true, size, times, .. } => format!("write, one call of {}", bytes(size * times)),
        Load { kind: Kind::Latency, size, .. } => format!("write latency, {}", bytes(size)),
        Load { kind: Kind::Notify, size, .. } => format!("notification latency, {}", bytes(size)),
        Load { kind, size, asleep: true, .. } => format!("{} asleep, {}", kind.name(), bytes(size)),
        Load { kind, size, .. } => format!("{}, {}", kind.name(), bytes(size)),
    };
    let (unit, goal) = match load {
        Load { asleep: true, .. } => ("MiB/s", None),
        Load { kind: Kind::Latency | Kind::Notify, .. } => ("us", Some("ratio <= 1.05")),
        _ => ("MiB/s", Some("ratio >= 1.00")),
    };
    let over = |value: fn(&Pair) -> f64| Spread::of(turns.iter().map(value));
    let (of, peer) = (over(|pair| pair.library), Peer::of(&turns));
    match (load.kind, goal) {
        (Kind::Write | Kind::Read | Kind::Send, Some(goal)) if !load.whole => {
            rows.add_compared(&name, unit, of, peer, goal, (load.kind.name(), load.size))?;
        }
        _ => rows.add(&name, unit, of, Some(peer), goal)?,
    }
    // The first of each was the warm-up.
    let spent: Vec<_> = our_cpu
        .iter()
        .zip(&their_cpu)
        .skip(1)
        .map(|(library, bare)| Pair { library: *library, bare: *bare })
        .collect();
    let of = Spread::of(spent.iter().map(|pair| pair.library));
    let goal = (!load.kind.is_latency()).then_some("ratio <= 1.00");
    rows.add(&format!("{name}: processor time a message"), "us", of, Some(Peer::of(&spent)), goal)
}

fn bytes(count: u64) -> String {
    match count {
        0..KIB => format!("{count} B"),
        KIB..MIB => format!("{} KiB", count / KIB),
        _ if count < 1 << 30 => format!("{} MiB", count / MIB),
        _ => format!("{} GiB", count >> 30),
    }
}
