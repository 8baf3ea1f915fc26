//! Transfers across the wire: this library against perftest.
//!
//! What makes the two comparable:
//! - Both are two processes, one on each device, that exchange a connection and then move the same number
//!   of messages of the same size: an MTU of 4096, 32 messages under way at once, the same buffer for each
//!   message. Each times from its first post to its last completion.
//! - They take turns, A B then B A, in one guest. The ratio is the median over the pairs, and the smallest
//!   and the largest value stand beside it.
//! - perftest's buffers are host memory, the library's are dma-bufs. perftest copies small messages into
//!   the request (inline), which memory without a CPU address does not permit; it is told not to.
//!
//! Both sending sides look for completions all the time. How the library does asleep, as it waits by
//! default, is a part of its own: it depends on the host.
//!
//! Processor time is that of the sending process, start-up included, in user mode and in the kernel.
//!
//! Instructions are those of the sending process between its 64th and its 192nd message, counted by stepping
//! it. perftest looks for completions all the time; while it is stepped it finds one nearly each time it
//! looks, so this is the least that it may take.
//!
//! Needs the devices `rxe0` and `rxe1` of the guest, and perftest. An argument chooses a part: `latency`,
//! `instructions`, `write`, `read`, `send`, `asleep`, `whole` (one call of 2 GiB). `--quick` makes one pair
//! of little.

// Not every benchmark needs all of it.
#[allow(dead_code)]
#[path = "common/mod.rs"]
mod common;
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

/// Messages under way at once.
const DEPTH: u32 = 32;
/// Of which the library posts so many with one call.
const BATCH: u32 = 8;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Write,
    Read,
    Send,
    /// One message there and one back.
    Latency,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Send => "send",
            Self::Latency => "latency",
        }
    }
}

/// What both sides do.
#[derive(Clone, Copy)]
struct Load {
    kind: Kind,
    size: u64,
    times: u64,
    /// One range with all bytes, not one buffer again and again.
    whole: bool,
    /// For so many messages the instructions of the sending process are counted.
    stepped: u64,
    /// The library sleeps until there is something to do, where it looks all the time otherwise.
    asleep: bool,
}

impl Load {
    fn new(kind: Kind, size: u64, times: u64) -> Self {
        Self { kind, size, times, whole: false, stepped: 0, asleep: false }
    }
}

/// What came of it.
#[derive(Clone, Copy)]
struct Outcome {
    /// MiB/s, or microseconds one way.
    figure: f64,
    /// Microseconds of processor time a message.
    cpu: f64,
    /// Of the sending process, where they are counted.
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
    // perftest makes at least 5.
    let streamed = |kind, size| Load::new(kind, size, (bytes / size).max(5));
    if wanted("latency") {
        measure(&mut rows, Load::new(Kind::Latency, 8, 1000), pairs(31))?;
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

/// Instructions for each message that is posted, in user mode.
fn instructions(rows: &mut Rows) -> Result<()> {
    for kind in [Kind::Write, Kind::Send] {
        // The first window is posted at once; from there on each post has to wait for a completion.
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
        Load { kind, size, asleep: true, .. } => format!("{} asleep, {}", kind.name(), bytes(size)),
        Load { kind, size, .. } => format!("{}, {}", kind.name(), bytes(size)),
    };
    let (unit, goal) = match load {
        Load { asleep: true, .. } => ("MiB/s", None),
        Load { kind: Kind::Latency, .. } => ("us", Some("ratio <= 1.02")),
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
    // The first of each was for nothing.
    let spent: Vec<_> = our_cpu
        .iter()
        .zip(&their_cpu)
        .skip(1)
        .map(|(library, bare)| Pair { library: *library, bare: *bare })
        .collect();
    let of = Spread::of(spent.iter().map(|pair| pair.library));
    let goal = (load.kind != Kind::Latency).then_some("ratio <= 1.00");
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
