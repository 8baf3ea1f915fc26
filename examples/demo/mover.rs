//! The side that writes and reads the owner's buffer.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use dmabuf_rdma::Transfer;
use dmabuf_rdma::transfer;

use crate::digest::{digest, fill};
use crate::side::Side;
use crate::ui::{self, Bar};
use crate::wire::{Answer, Command, Offer, Wire};
use crate::{Display, Result};

pub fn run(device: Option<&str>, exporter: &str, connect: &str, display: Display) -> Result<()> {
    let mut wire = Wire::new(TcpStream::connect(connect)?)?;
    let offer: Offer = wire.receive()?;
    let remote = offer.region;
    let size = remote.len();
    ui::side("owner", size, &offer.owner);

    let Side { buffer, region, connection, summary } = Side::new(device, exporter, size)?;
    ui::side("mover", size, &summary);
    wire.send(&Answer { endpoint: connection.endpoint() })?;
    connection.connect(&offer.endpoint)?;

    let mapping = buffer.map()?;
    // The exporter may have rounded the size up.
    let ours = region.slice(..size)?;
    for round in 0..u64::from(display.rounds) {
        let bar = Bar::new(display.progress, "fill", size);
        let filled = fill(&mapping, size, 2 * round + 1, |done| bar.set(done))?;
        bar.finish();
        let bar = Bar::new(display.progress, "write", size);
        let took = timed(connection.write(&ours, &remote)?, bar)?;
        ui::moved("write", size, took);
        ui::compared("owner", wire.ask(&Command::Digest)?, filled)?;

        let new = wire.ask(&Command::Fill { seed: 2 * round + 2 })?;
        if new == filled {
            return Err("the owner's new bytes equal the old ones: reading them would prove nothing".into());
        }
        let bar = Bar::new(display.progress, "read", size);
        let took = timed(connection.read(&ours, &remote)?, bar)?;
        ui::moved("read", size, took);
        ui::compared("mover", digest(&mapping, size)?, new)?;
    }
    wire.send(&Command::End)?;
    // Dropping the last handle deregisters too, and only logs a failure.
    drop(ours);
    region.deregister()?;
    ui::verified(size, display.rounds, [&offer.owner.path, &summary.path]);
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
