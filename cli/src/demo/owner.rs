//! The side that owns the buffer: registers it, sends its description to the mover, and replies with digests.

use std::net::TcpListener;

use super::Options;
use super::side::Side;
use super::wire::{Answer, Command, Offer, Reply, Wire};
use crate::pattern::{digest, fill};
use crate::{Result, ui};

pub fn run(options: &Options, listen: &str) -> Result<()> {
    let side = Side::new(options.device.as_deref(), &options.exporter, options.size)?;
    let (size, mapping) = (side.region.len(), side.buffer.map()?);
    let listener = TcpListener::bind(listen)?;
    ui::listening(listener.local_addr()?);

    let mut wire = Wire::new(listener.accept()?.0)?;
    let endpoint = side.connection.endpoint();
    wire.send(&Offer { endpoint, region: side.region.remote(), owner: side.summary })?;
    let answer: Answer = wire.receive()?;
    side.connection.connect(&answer.endpoint)?;
    loop {
        let digest = match wire.receive()? {
            Command::Digest => digest(&mapping, size)?,
            Command::Fill { seed } => fill(&mapping, size, seed, |_| {})?,
            Command::End => break,
        };
        wire.send(&Reply { digest })?;
    }
    // Dropping the last handle deregisters too, and only logs a failure.
    Ok(side.region.deregister()?)
}
