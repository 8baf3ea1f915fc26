//! The side that owns the buffer: registers it, publishes its description, and says what it sees.

use std::net::TcpListener;

use crate::digest::{digest, fill};
use crate::party::Party;
use crate::wire::{Answer, Ask, Offer, Shown, Wire};
use crate::{Options, Result};

/// What precedes the address in the one line that the owner prints.
pub const LISTENING: &str = "listening on ";

pub fn run(options: &Options, listen: &str) -> Result<()> {
    let party = Party::new(options.device.as_deref(), &options.exporter, options.size)?;
    let mapping = party.buffer.map()?;
    let listener = TcpListener::bind(listen)?;
    println!("{LISTENING}{}", listener.local_addr()?);

    let mut wire = Wire::new(listener.accept()?.0)?;
    let endpoint = party.connection.endpoint();
    wire.send(&Offer { endpoint, region: party.region.remote(), party: party.introduction })?;
    let answer: Answer = wire.receive()?;
    party.connection.connect(&answer.endpoint)?;
    loop {
        let digest = match wire.receive()? {
            Ask::Digest => digest(&mapping, mapping.len())?,
            Ask::Fill { seed } => fill(&mapping, seed, |_| {})?,
            Ask::Bye => break,
        };
        wire.send(&Shown { digest })?;
    }
    // What was written stays in the buffer; the region goes, and says so if it cannot.
    Ok(party.region.deregister()?)
}
