//! The side that writes and reads the owner's buffer.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use dmabuf_rdma::transfer::{Connection, Request};

use crate::digest::{digest, fill};
use crate::party::Party;
use crate::ui::{self, Bar};
use crate::wire::{Answer, Ask, Offer, Shown, Wire};
use crate::{Display, Result};

pub fn run(device: Option<&str>, exporter: &str, connect: &str, display: Display) -> Result<()> {
    let mut wire = Wire::new(TcpStream::connect(connect)?)?;
    let offer: Offer = wire.receive()?;
    let size = offer.region.len();
    ui::party("owner", size, &offer.party);

    let mut party = Party::new(device, exporter, size)?;
    ui::party("mover", size, &party.introduction);
    wire.send(&Answer { endpoint: party.connection.endpoint() })?;
    party.connection.connect(&offer.endpoint)?;

    let mapping = party.buffer.map()?;
    for round in 0..u64::from(display.rounds) {
        let bar = Bar::new(display.progress, "fill", size);
        let ours = fill(&mapping, 2 * round + 1, |done| bar.set(done))?;
        bar.finish();
        let bar = Bar::new(display.progress, "write", size);
        let took = transfer(&mut party.connection, Request::write(&party.region, &offer.region), bar)?;
        let theirs: Shown = wire.ask(&Ask::Digest)?;
        ui::moved("write", size, took);
        ui::compared("owner sees", theirs.digest, ours)?;

        let theirs: Shown = wire.ask(&Ask::Fill { seed: 2 * round + 2 })?;
        if theirs.digest == ours {
            return Err("the owner's new pattern equals the old one: this would prove nothing".into());
        }
        let bar = Bar::new(display.progress, "read", size);
        let took = transfer(&mut party.connection, Request::read(&party.region, &offer.region), bar)?;
        ui::moved("read", size, took);
        ui::compared("mover sees", digest(&mapping, mapping.len())?, theirs.digest)?;
    }
    wire.send(&Ask::Bye)?;
    party.region.deregister()?;
    ui::verified(size, display.rounds, [&offer.party.path, &party.introduction.path]);
    Ok(())
}

/// Moves all of the region.
fn transfer(connection: &mut Connection, request: Request<'_>, bar: Bar) -> Result<Duration> {
    let start = Instant::now();
    let mut report = |done| bar.set(done);
    connection.start(request)?.progress(&mut report).wait()?;
    let took = start.elapsed();
    bar.finish();
    Ok(took)
}
