//! Scattered blocks across the wire: the library's tables of blocks against what others use for them.
//!
//! | peer | what it is |
//! |---|---|
//! | this library, Python | the package of `python/`, tables of numpy arrays, one call |
//! | NIXL | its UCX backend with UCX_TLS=rc, prepared lists of descriptors, from Python |
//! | Mooncake | its transfer engine with the protocol rdma, one batch call, from Python |
//! | by hand | the library's queue pair and dma-bufs, with chains of work requests in a loop of C |
//! | ib_write_bw | perftest: one buffer of a block's size again and again |
//! | ucx_perftest | UCX's own, over rc_verbs: likewise |
//!
//! What makes them comparable:
//! - Each has two processes, one at each end of the guest's wire, an MTU of 4096, and one queue pair. The library and
//!   the loop have 128 requests in flight, in chains of 16.
//! - All write the same blocks to the same places, in the same memory: the library and the loop as dma-bufs; NIXL and
//!   Mooncake, which take none without a GPU, and the library from Python beside them, as host memory. No block is followed by its neighbour, so nothing merges.
//! - The time is the initiator's, from the call to the last completion. Tables, prepared lists and connections are
//!   made before.
//! - The others poll for completions without a pause, so the library does too where it is compared with them. With its
//!   default options it sleeps, which is faster where soft-RoCE needs the processor. The loop is measured both ways.
//! - They take turns, first to last and last to first, in one guest. A peer's processes are stopped (SIGSTOP) while
//!   others have their turn. A ratio is the median over the rounds.
//! - After each turn every byte is compared, and the counters of the device and of its netdev show that the blocks
//!   went through them in packets of that MTU. A first turn does not count.
//!
//! Needs the guest's devices `rxe0` and `rxe1`, perftest, ucx-utils, and with `--python PROGRAM` a Python that has the
//! packages of `peers/requirements.txt`. Arguments choose loads (`64k`, `16k`, `4k`, `100000`) and peers (`nixl`,
//! `mooncake`, `python`, `python-polling`, `hand`, `hand-polling`, `perftest`, `ucx`). `--quick` takes one round of an eighth of the blocks.

// Not every benchmark needs all of it.
#[allow(dead_code)]
#[path = "common/mod.rs"]
mod common;
#[path = "peers/layout.rs"]
mod layout;
#[path = "peers/library.rs"]
mod library;
#[path = "peers/process.rs"]
mod process;
#[path = "peers/report.rs"]
mod report;
#[path = "peers/single.rs"]
mod single;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Result, Rows};
use layout::{End, Layout, Load};
use process::Pair;

/// The two ends of the wire.
const NEAR: &str = "rxe0";
const NEAR_NETDEV: &str = "wire0";
const FAR: &str = "rxe1";
const FAR_ADDRESS: &str = "192.168.77.2";

/// Requests in flight and in a chain, as the library has them by default.
const WINDOW: u32 = 128;
const CHAIN: u32 = 16;
const MTU: u64 = 4096;

/// Names the file with the far side's table.
const FAR_TABLE: &str = "FAR_TABLE";

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

#[derive(Clone, Copy, PartialEq)]
enum Peer {
    Library,
    Polling,
    Python,
    PythonPolling,
    Hand,
    HandPolling,
    Perftest,
    Ucx,
    Nixl,
    Mooncake,
}

impl Peer {
    const ALL: [Self; 10] = [
        Self::Polling,
        Self::Library,
        Self::PythonPolling,
        Self::Python,
        Self::HandPolling,
        Self::Hand,
        Self::Perftest,
        Self::Ucx,
        Self::Nixl,
        Self::Mooncake,
    ];

    fn is_library(self) -> bool {
        matches!(self, Self::Library | Self::Polling)
    }

    /// The argument that chooses it, and the role.
    fn word(self) -> &'static str {
        match self {
            Self::Library => "library",
            Self::Polling => "polling",
            Self::Python => "python",
            Self::PythonPolling => "python-polling",
            Self::Hand => "hand",
            Self::HandPolling => "hand-polling",
            Self::Perftest => "perftest",
            Self::Ucx => "ucx",
            Self::Nixl => "nixl",
            Self::Mooncake => "mooncake",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Library => "this library",
            Self::Polling => "this library, polling",
            Self::Python => "this library, Python",
            Self::PythonPolling => "this library, Python, polling",
            Self::Hand => "by hand",
            Self::HandPolling => "by hand, polling",
            Self::Perftest => "ib_write_bw",
            Self::Ucx => "ucx_perftest",
            Self::Nixl => "NIXL",
            Self::Mooncake => "Mooncake",
        }
    }

    /// What its blocks are in.
    fn memory(self) -> &'static str {
        match self {
            Self::Library | Self::Polling | Self::Hand | Self::HandPolling => "dma-bufs",
            Self::Python | Self::PythonPolling | Self::Nixl | Self::Mooncake => "host",
            Self::Perftest | Self::Ucx => "host, one block",
        }
    }

    /// The library waiting as this peer does; beside packages of Python also from there.
    fn like(self) -> &'static [Self] {
        match self {
            Self::Library | Self::Polling => &[],
            Self::Hand | Self::Python => &[Self::Library],
            Self::HandPolling | Self::Perftest | Self::Ucx | Self::PythonPolling => &[Self::Polling],
            Self::Nixl | Self::Mooncake => &[Self::Polling, Self::PythonPolling],
        }
    }

    /// Its script, if it is a package of Python.
    fn script(self) -> Option<&'static str> {
        match self {
            Self::Python | Self::PythonPolling => Some("over_dmabuf_rdma.py"),
            Self::Nixl => Some("over_nixl.py"),
            Self::Mooncake => Some("over_mooncake.py"),
            _ => None,
        }
    }

    /// What the ratio of the library's rate to this one's should be.
    fn goal(self, size: u64) -> Option<&'static str> {
        match (self, size / KIB) {
            (Self::Hand | Self::HandPolling, _) => Some("ratio >= 1.00"),
            (Self::Perftest, _) => Some("ratio >= 0.97"),
            (Self::Nixl | Self::Mooncake, 4) => Some("ratio >= 1.30"),
            (Self::Nixl | Self::Mooncake, 16) => Some("ratio >= 1.50"),
            (Self::Nixl | Self::Mooncake, 64) => Some("ratio >= 1.10"),
            _ => None,
        }
    }

    /// The command of one side.
    fn command(self, python: Option<&Path>, size: u64, near: bool, ends: [&End; 2]) -> Result<Command> {
        let mut command = match self.script() {
            Some(script) => {
                let python = python.ok_or("the packages of Python need --python PROGRAM")?;
                let mut command = Command::new(python);
                command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers").join(script));
                command
            }
            None => {
                let mut command = Command::new(env::current_exe()?);
                command.args([library::ROLE, self.word()]);
                command
            }
        };
        match self {
            // Its wheel has a libibverbs of its own, without providers.
            Self::Nixl => command.env("LD_PRELOAD", libibverbs()?).env("UCX_TLS", "rc"),
            Self::Python | Self::PythonPolling => {
                command.env("POLLING", if self == Self::Python { "0" } else { "1" })
            }
            Self::Mooncake => command.env("MC_GID_INDEX", "1").env("MC_MTU", MTU.to_string()),
            _ => &mut command,
        };
        let (device, side, end) = if near { (NEAR, "near", ends[0]) } else { (FAR, "far", ends[1]) };
        command.args([device, side, &size.to_string(), &end.memory()?]).arg(end.table());
        command.env(FAR_TABLE, ends[1].table()).env_remove("BENCH_ROWS");
        Ok(command)
    }
}

/// The libibverbs that this program runs with.
fn libibverbs() -> Result<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let found = path.into_iter().find(|path| path.contains("/libibverbs.so"));
    Ok(found.ok_or("this program has no libibverbs")?.into())
}

/// A peer that is ready for its turn.
enum Ready {
    /// Its two processes.
    Pair(Box<Pair>),
    /// A program that is run for each turn.
    Program(fn(Load) -> Result<f64>),
}

impl Ready {
    /// Blocks per second.
    fn turn(&mut self, load: Load) -> Result<f64> {
        match self {
            Self::Pair(pair) => Ok(load.count as f64 / pair.turn()?),
            Self::Program(run) => run(load),
        }
    }
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    if let Some(at) = arguments.iter().position(|word| word == library::ROLE) {
        return library::play(&arguments[at + 1..]);
    }
    let python = match arguments.iter().position(|word| word == "--python") {
        Some(at) => arguments.drain(at..at + 2).nth(1).map(PathBuf::from),
        None => None,
    };
    let quick = arguments.iter().any(|word| word == "--quick");
    // cargo's own arguments begin with dashes.
    let words: Vec<_> = arguments.iter().filter(|word| !word.starts_with('-')).collect();
    let load = |word, count, size, rounds| (word, Load { count, size: size * KIB, rounds });
    let mut loads = vec![
        load("64k", 512, 64, 9),
        load("16k", 4096, 16, 9),
        load("4k", 4096, 4, 15),
        load("100000", 100_000, 16, 7),
    ];
    let known: Vec<&str> =
        loads.iter().map(|(name, _)| *name).chain(Peer::ALL.into_iter().map(Peer::word)).collect();
    if let Some(unknown) = words.iter().find(|word| !known.contains(&word.as_str())) {
        return Err(
            format!("`{unknown}` is neither a load nor a peer; choose from {}", known.join(", ")).into()
        );
    }
    let chosen = |name: &str| words.iter().any(|word| word.as_str() == name);
    let others = Peer::ALL.iter().any(|peer| chosen(peer.word()));
    let wanted = |peer: &Peer| !others || peer.is_library() || chosen(peer.word());
    let peers: Vec<Peer> = Peer::ALL.into_iter().filter(wanted).collect();
    if loads.iter().any(|(name, _)| chosen(name)) {
        loads.retain(|(name, _)| chosen(name));
    }
    let mut rows = Rows::new()?;
    let mut table = report::Table::default();
    for (_, mut load) in loads {
        if quick {
            (load.count, load.rounds) = (load.count / 8, 1);
        }
        let rates = measure(&peers, python.as_deref(), load)?;
        report::add(&mut rows, &mut table, load, &rates)?;
    }
    table.print();
    Ok(())
}

/// Blocks per second of each peer in each round.
fn measure(peers: &[Peer], python: Option<&Path>, load: Load) -> Result<Vec<(Peer, Vec<f64>)>> {
    let folder = env::temp_dir().join(format!("peers-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let layout = Layout::new(load, &folder)?;
    let mut all = Vec::new();
    for &peer in peers {
        let named = |error| format!("{}, {}: {error}", peer.name(), load.name());
        let mut ready = match peer {
            Peer::Perftest => Ready::Program(single::perftest),
            Peer::Ucx => Ready::Program(single::ucx),
            _ => {
                let ends = [&layout.near, &layout.far];
                let near = peer.command(python, load.size, true, ends)?;
                let far = peer.command(python, load.size, false, ends)?;
                Ready::Pair(Box::new(Pair::start(near, far, &folder).map_err(named)?))
            }
        };
        // A turn that does not count, except where one takes a minute.
        if matches!(ready, Ready::Pair(_)) && load.count < 100_000 {
            counted(peer, &mut ready, &layout).map_err(named)?;
        }
        all.push((peer, ready, Vec::new()));
    }
    for round in 0..load.rounds {
        let turn = |(peer, ready, rates): &mut (Peer, Ready, Vec<f64>)| -> Result<()> {
            rates.push(counted(*peer, ready, &layout).map_err(|error| format!("{}: {error}", peer.name()))?);
            Ok(())
        };
        match round % 2 {
            0 => all.iter_mut().try_for_each(turn)?,
            _ => all.iter_mut().rev().try_for_each(turn)?,
        }
        let rates: Vec<_> =
            all.iter().map(|(peer, _, rates)| format!("{} {:.0}", peer.name(), rates[round])).collect();
        println!("{}, round {}, blocks/s: {}", load.name(), round + 1, rates.join(", "));
    }
    let rates = all.into_iter().map(|(peer, _, rates)| (peer, rates)).collect();
    fs::remove_dir_all(&folder)?;
    Ok(rates)
}

/// A turn, after which every byte must have arrived, and the near device must have sent the packets of all blocks, of
/// the MTU's size. It may have sent packets again.
fn counted(peer: Peer, ready: &mut Ready, layout: &Layout) -> Result<f64> {
    let load = layout.load;
    let read = |counter: &str| -> Result<u64> { Ok(fs::read_to_string(counter)?.trim().parse()?) };
    let sent = || -> Result<(u64, u64)> {
        let packets = read(&format!("/sys/class/infiniband/{NEAR}/ports/1/hw_counters/sent_pkts"))?;
        Ok((packets, read(&format!("/sys/class/net/{NEAR_NETDEV}/statistics/tx_bytes"))?))
    };
    if let Ready::Pair(_) = ready {
        layout.clear()?;
    }
    let before = sent()?;
    let rate = ready.turn(load)?;
    let after = sent()?;
    if let Ready::Pair(_) = ready {
        layout.verify()?;
    }
    let count = if let Ready::Program(_) = ready { load.count.min(single::MOST) } else { load.count };
    let (packets, bytes) = (after.0 - before.0, after.1 - before.1);
    let least = count * load.size.div_ceil(MTU);
    // UCX, which NIXL uses, sends small packets besides its messages.
    let small = bytes < packets * MTU * 3 / 4 && !matches!(peer, Peer::Ucx | Peer::Nixl);
    if packets < least || small {
        return Err(format!(
            "{NEAR} sent {packets} packets and {NEAR_NETDEV} {bytes} bytes for {count} blocks of {} KiB: this peer does \
             not use {NEAR}, or not with an MTU of {MTU}",
            load.size / KIB
        )
        .into());
    }
    Ok(rate)
}
