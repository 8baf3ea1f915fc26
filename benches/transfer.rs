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
//! perftest polls; the library sleeps between batches, but for the latency, where it polls too.
//!
//! Processor time is that of the sending process, start-up included, in user mode and in the kernel. An
//! emulated processor counts no instructions.
//!
//! Needs the devices `rxe0` and `rxe1` of the guest, and perftest. `--quick` makes one pair of little.

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

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Write,
    Read,
    Send,
    /// One message there and one back.
    Latency,
}

/// What both sides do.
#[derive(Clone, Copy)]
struct Load {
    kind: Kind,
    size: u64,
    times: u64,
    /// One range with all bytes, not one buffer again and again.
    whole: bool,
}

/// What came of it.
#[derive(Clone, Copy)]
struct Outcome {
    /// MiB/s, or microseconds one way.
    figure: f64,
    /// Microseconds of processor time a message.
    cpu: f64,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some(at) = arguments.iter().position(|word| word == party::ROLE) {
        return party::play(&arguments[at + 1..]);
    }
    let quick = arguments.iter().any(|word| word == "--quick");
    let mut rows = Rows::new()?;
    for kind in [Kind::Write, Kind::Read, Kind::Send] {
        for size in [64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB] {
            let bytes = if quick { 8 * MIB } else { 32 * MIB };
            // perftest makes at least 5.
            let load = Load { kind, size, times: (bytes / size).max(5), whole: false };
            measure(&mut rows, load, if quick { 1 } else { 9 })?;
        }
    }
    measure(
        &mut rows,
        Load { kind: Kind::Latency, size: 8, times: 1000, whole: false },
        if quick { 1 } else { 15 },
    )?;
    if !quick {
        measure(&mut rows, Load { kind: Kind::Write, size: 8 * MIB, times: 256, whole: true }, 7)?;
    }
    Ok(())
}

fn measure(rows: &mut Rows, load: Load, count: usize) -> Result<()> {
    let (mut our_cpu, mut their_cpu) = (Vec::new(), Vec::new());
    let turns = {
        let library = || {
            let Outcome { figure, cpu } = ours(load)?;
            our_cpu.push(cpu);
            Ok(figure)
        };
        let peer = || {
            let Outcome { figure, cpu } = theirs(load)?;
            their_cpu.push(cpu);
            Ok(figure)
        };
        pairs(count, library, peer)?
    };
    let name = match load {
        Load { whole: true, size, times, .. } => format!("write, one call of {}", bytes(size * times)),
        Load { kind: Kind::Latency, size, .. } => format!("write latency, {}", bytes(size)),
        Load { kind, size, .. } => format!("{kind:?}, {}", bytes(size)).to_lowercase(),
    };
    let (unit, goal) = match load.kind {
        Kind::Latency => ("us", "ratio <= 1.02"),
        _ => ("MiB/s", "ratio >= 1.00"),
    };
    let over = |value: fn(&Pair) -> f64| Spread::of(turns.iter().map(value));
    rows.add(&name, unit, over(|pair| pair.library), Some(Peer::of(&turns)), Some(goal))?;
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
