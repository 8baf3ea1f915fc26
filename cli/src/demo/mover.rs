//! The side that writes and reads the owner's buffer.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use dmabuf_rdma::Transfer;
use dmabuf_rdma::transfer;

use super::Display;
use super::side::Side;
use super::wire::{Answer, Command, Offer, Summary, Wire};
use crate::Result;
use crate::pattern::{digest, fill};
use crate::ui::{self, Bar};

pub fn run(device: Option<&str>, exporter: &str, connect: &str, display: Display) -> Result<()> {
    let mut wire = Wire::new(TcpStream::connect(connect)?)?;
    let offer: Offer = wire.receive()?;
    let remote = offer.region;
    let size = remote.len();
    side("owner", size, &offer.owner);

    let Side { buffer, region, connection, summary } = Side::new(device, exporter, size)?;
    side("mover", size, &summary);
    wire.send(&Answer { endpoint: connection.endpoint() })?;
    connection.connect(&offer.endpoint)?;

    let mapping = buffer.map()?;
    // The exporter may have rounded the size up.
    let ours = region.slice(..size)?;
    for round in 0..u64::from(display.rounds) {
        let bar = Bar::shown(display.progress, "fill", size);
        let filled = fill(&mapping, size, 2 * round + 1, |done| bar.set(done))?;
        bar.finish();
        let bar = Bar::shown(display.progress, "write", size);
        let took = timed(connection.write(&ours, &remote)?, bar)?;
        moved("write", size, took);
        compared("owner", wire.ask(&Command::Digest)?, filled)?;

        let new = wire.ask(&Command::Fill { seed: 2 * round + 2 })?;
        if new == filled {
            return Err("the owner's new bytes equal the old ones: reading them would prove nothing".into());
        }
        let bar = Bar::shown(display.progress, "read", size);
        let took = timed(connection.read(&ours, &remote)?, bar)?;
        moved("read", size, took);
        compared("mover", digest(&mapping, size)?, new)?;
    }
    wire.send(&Command::End)?;
    // Dropping the last handle deregisters too, and only logs a failure.
    drop(ours);
    region.deregister()?;
    verified(size, display.rounds, [&offer.owner.path, &summary.path]);
    Ok(())
}

/// Waits for a transfer that was just started, and returns the time that it took.
fn timed(transfer: Transfer, bar: Bar) -> Result<Duration, transfer::Error> {
    let start = Instant::now();
    transfer.wait_with_progress(|done| bar.set(done))?;
    let took = start.elapsed();
    bar.finish();
    Ok(took)
}

fn side(role: &str, size: u64, summary: &Summary) {
    let Summary { device, exporter, path, register_ms } = summary;
    let size = ui::bytes(size);
    ui::row(role, format!("{exporter}, {size}, registered with {device} by {path} in {register_ms:.1} ms"));
}

fn moved(operation: &str, size: u64, took: Duration) {
    ui::row(operation, ui::rate(size, took));
}

/// Prints the digest of the bytes that a side received; fails unless it is the digest of the sent bytes.
fn compared(role: &str, received: u64, sent: u64) -> Result<()> {
    if received != sent {
        let message =
            format!("the {role} received bytes with digest {received:016x}, not {sent:016x} as sent");
        return Err(message.into());
    }
    ui::row("", format!("the {role} received bytes with digest {received:016x}, as sent"));
    Ok(())
}

fn verified(size: u64, rounds: u32, paths: [&String; 2]) {
    let rounds = if rounds == 1 { String::new() } else { format!(", {rounds} times") };
    let [owner, mover] = paths;
    let paths = if owner == mover { owner.clone() } else { format!("{owner} and {mover}") };
    ui::row("verified", format!("{} written and read in place{rounds}, by path {paths}", ui::bytes(size)));
}
