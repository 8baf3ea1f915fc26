//! The library's two processes: this program again, with a role on its command line.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::exporter::{DmaHeap, Exporter};
use dmabuf_rdma::mr::Access;
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Device, Endpoint, ProtectionDomain};
use dmabuf_rdma::{Connection, DmaBuf, MemoryRegion, RegionSlice, RemoteRegion};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::common::Result;
use super::common::steps::between_posts;
use super::{CHAIN, DEPTH, FAR, Kind, Load, NEAR, Outcome};

const TIMEOUT: Duration = Duration::from_secs(60);

/// The option before the role's arguments.
pub const ROLE: &str = "--role";

/// What the sides exchange to connect.
#[derive(Serialize, Deserialize)]
struct Offer {
    endpoint: Endpoint,
    region: RemoteRegion,
}

/// A side's process, with its two pipes.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(device: &str, load: Load) -> Result<Self> {
        let Load { kind, size, times, whole, asleep, .. } = load;
        let mut child = Command::new(env::current_exe()?)
            .args([ROLE, device, kind.name(), &size.to_string(), &times.to_string()])
            .args([whole.to_string(), asleep.to_string()])
            .env_remove("BENCH_ROWS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("no pipe")?;
        let output = BufReader::new(child.stdout.take().ok_or("no pipe")?);
        Ok(Self { child, input, output })
    }

    fn receive(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.output.read_line(&mut line)? {
            0 => Err("a side ended early".into()),
            _ => Ok(line),
        }
    }

    fn send(&mut self, line: &str) -> Result<()> {
        Ok(self.input.write_all(line.as_bytes())?)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn end(mut self) -> Result<()> {
        drop(self.input);
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("a side ended with {status}").into()) }
    }
}

/// One run of both sides.
pub(super) fn ours(load: Load) -> Result<Outcome> {
    let (mut far, mut near) = (Process::start(FAR, load)?, Process::start(NEAR, load)?);
    let (far_offer, near_offer) = (far.receive()?, near.receive()?);
    far.send(&near_offer)?;
    near.send(&far_offer)?;
    // Both have connected and posted their receives.
    far.receive()?;
    near.receive()?;
    near.send("go\n")?;
    let instructions = match load.stepped {
        0 => 0,
        messages => between_posts(near.pid(), messages / u64::from(CHAIN))?,
    };
    let seconds: f64 = near.receive()?.trim().parse()?;
    let before = processor_time();
    near.end()?;
    let cpu = spent_by(before, load.times);
    far.end()?;
    let figure = match load.kind {
        Kind::Latency | Kind::Notify => seconds * 1e6 / 2.0,
        _ => (load.size * load.times) as f64 / f64::from(1 << 20) / seconds,
    };
    Ok(Outcome { figure, cpu, instructions })
}

/// Processor time of all ended child processes.
pub fn processor_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("a valid argument");
    Duration::from_micros((usage.user_time() + usage.system_time()).num_microseconds() as u64)
}

/// Microseconds per message since `before`.
pub fn spent_by(before: Duration, times: u64) -> f64 {
    (processor_time() - before).as_nanos() as f64 / 1e3 / times as f64
}

struct Side {
    connection: Connection,
    region: MemoryRegion,
    buffer: DmaBuf,
}

fn side(device: &str, load: Load) -> Result<Side> {
    let domain = ProtectionDomain::new(&Device::by_name(device)?.open()?)?;
    let asleep = load.asleep || (!load.kind.is_latency() && device == FAR);
    let notifications = if load.kind == Kind::Notify { DEPTH } else { 0 };
    let options = ConnectionOptions::default()
        .message_size(load.size)
        .window(DEPTH)
        .chain(CHAIN)
        .busy_poll(!asleep)
        .notifications(notifications);
    let connection = Connection::new(&domain, options)?;
    let length = if load.whole { load.size * load.times } else { load.size.max(4096) };
    let buffer = DmaHeap::open("system")?.allocate(length)?.dmabuf;
    let region = MemoryRegion::builder(&domain, &buffer).access(Access::REMOTE).register()?;
    Ok(Side { connection, region, buffer })
}

/// The bytes of all messages: a whole large buffer, or a small buffer `times` times.
fn local(region: &MemoryRegion, load: Load) -> Result<RegionSlice> {
    Ok(match load.whole {
        true => region.into(),
        false => RegionSlice::concat(std::iter::repeat_n(region, load.times as usize))?,
    })
}

fn remote(region: &RemoteRegion, load: Load) -> Result<RemoteRegion> {
    let times = if load.whole { 1 } else { load.times as usize };
    let runs = std::iter::repeat_n(region.runs(), times).flatten().copied();
    Ok(RemoteRegion::new(runs, region.access(), region.buffer())?)
}

/// Plays the role of these arguments.
pub fn play(words: &[String]) -> Result<()> {
    let [device, kind, size, times, whole, asleep] = words else {
        return Err("a role has six arguments".into());
    };
    let kinds = [Kind::Write, Kind::Read, Kind::Send, Kind::Latency, Kind::Notify];
    let kind = kinds
        .into_iter()
        .find(|known| known.name() == kind)
        .ok_or_else(|| format!("kind {kind} is unknown"))?;
    let (whole, asleep) = (whole.parse()?, asleep.parse()?);
    let load = Load { whole, asleep, ..Load::new(kind, size.parse()?, times.parse()?) };
    let Side { mut connection, region, buffer } = side(device, load)?;
    let offer = Offer { endpoint: connection.endpoint(), region: region.remote() };
    println!("{}", serde_json::to_string(&offer)?);
    let peer: Offer = serde_json::from_str(&line()?)?;
    connection.connect(&peer.endpoint)?;
    match (kind, device.as_str()) {
        (Kind::Latency, _) => {
            println!("connected");
            latency(&mut connection, &region, &buffer, &peer.region, load.times, device == NEAR)
        }
        (Kind::Notify, _) => {
            println!("connected");
            notify(&connection, load, device == NEAR)
        }
        (Kind::Send, FAR) => {
            let local = local(&region, load)?;
            let receive = connection.recv(local)?;
            println!("connected");
            receive.wait()?;
            Ok(())
        }
        (_, FAR) => {
            println!("connected");
            // Until the parent closes the pipe.
            while !line()?.is_empty() {}
            Ok(())
        }
        _ => {
            let (local, remote) = (local(&region, load)?, remote(&peer.region, load)?);
            println!("connected");
            line()?;
            let start = Instant::now();
            let transfer = match kind {
                Kind::Write => connection.write(local, remote)?,
                Kind::Read => connection.read(local, remote)?,
                _ => connection.send(local)?,
            };
            transfer.wait()?;
            println!("{}", start.elapsed().as_secs_f64());
            Ok(())
        }
    }
}

fn line() -> Result<String> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(line)
}

/// The sides take turns to write the next number to each other, as ib_write_lat does.
fn latency(
    connection: &mut Connection,
    region: &MemoryRegion,
    buffer: &DmaBuf,
    peer: &RemoteRegion,
    times: u64,
    first: bool,
) -> Result<()> {
    // This side's number is at byte 0; the peer's arrives at byte 64.
    let mapping = buffer.map()?;
    let memory = mapping.begin(CpuAccess::ReadWrite)?;
    let seen = || -> Result<u64> {
        let mut bytes = [0; 8];
        memory.read(64, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    };
    let (local, remote) = (region.slice(..8)?, peer.slice(64..72)?);
    let write = |number: u64| -> Result<()> {
        memory.write(0, &number.to_le_bytes())?;
        connection.write(&local, &remote)?.wait()?;
        Ok(())
    };
    if first {
        line()?;
    }
    // As perftest, this reads the clock once a round, before the post.
    let mut stamps = Vec::with_capacity(times as usize);
    let start = (Instant::now(), ticks());
    for number in 1..times + 1 {
        if first {
            stamps.push(ticks());
            write(number)?;
        }
        // As perftest, this polls without a pause.
        while seen()? != number {}
        if !first {
            stamps.push(ticks());
            write(number)?;
        }
    }
    report(start, stamps, first)
}

/// Prints the median of the rounds, which perftest calls typical.
fn report(start: (Instant, u64), stamps: Vec<u64>, first: bool) -> Result<()> {
    let tick = start.0.elapsed().as_secs_f64() / (ticks() - start.1) as f64;
    if first {
        let mut trips: Vec<u64> = stamps.windows(2).map(|pair| pair[1] - pair[0]).collect();
        trips.sort();
        println!("{}", trips[trips.len() / 2] as f64 * tick);
    } else {
        while !line()?.is_empty() {}
    }
    Ok(())
}

/// The sides take turns to notify each other, as ib_send_lat does.
fn notify(connection: &Connection, load: Load, first: bool) -> Result<()> {
    let (payload, arrived) = (vec![7; load.size as usize], connection.notifications());
    if first {
        line()?;
    }
    let mut stamps = Vec::with_capacity(load.times as usize);
    let start = (Instant::now(), ticks());
    for number in 0..load.times as u32 {
        if first {
            stamps.push(ticks());
            connection.notify(number, &payload)?.wait()?;
        }
        arrived.take_timeout(TIMEOUT)?;
        if !first {
            stamps.push(ticks());
            connection.notify(number, &payload)?.wait()?;
        }
    }
    report(start, stamps, first)
}

/// perftest's clock. Reading it takes a few instructions; `Instant` takes a hundred.
fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction.
    return unsafe { std::arch::x86_64::_rdtsc() };
    #[cfg(not(target_arch = "x86_64"))]
    return std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
}
