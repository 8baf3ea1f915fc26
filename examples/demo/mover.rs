//! The side that writes and reads the owner's buffer.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use dmabuf_rdma::RemoteRegion;
use dmabuf_rdma::verbs::Operation;

use crate::digest::{digest, fill};
use crate::party::Party;
use crate::ui::{self, Bar};
use crate::wire::{Answer, Ask, Offer, Shown, Wire};
use crate::{Display, Result};

/// Bytes a work request, and requests under way at once.
const MESSAGE: u64 = 1 << 20;
const WINDOW: u64 = 16;

/// Longest time that one message may take.
const LIMIT: Duration = Duration::from_secs(30);

pub fn run(device: Option<&str>, exporter: &str, connect: &str, display: Display) -> Result<()> {
    let mut wire = Wire::new(TcpStream::connect(connect)?)?;
    let offer: Offer = wire.receive()?;
    let size = offer.region.len();
    ui::party("owner", size, &offer.party);

    let party = Party::new(device, exporter, size)?;
    ui::party("mover", size, &party.introduction);
    wire.send(&Answer { endpoint: party.pair.endpoint().expect("made here") })?;
    party.pair.connect(&offer.endpoint)?;

    let mapping = party.buffer.map()?;
    for round in 0..u64::from(display.rounds) {
        let bar = Bar::new(display.progress, "fill", size);
        fill(&mapping, 2 * round + 1, |done| bar.set(done))?;
        bar.finish();
        let write = |remote| Operation::Write { remote };
        let ours = digest(&mapping)?;
        let took = transfer(&party, &offer.region, write, "write", display)?;
        let theirs: Shown = wire.ask(&Ask::Digest)?;
        ui::moved("write", size, took);
        ui::compared("owner sees", theirs.digest, ours)?;

        let theirs: Shown = wire.ask(&Ask::Fill { seed: 2 * round + 2 })?;
        if theirs.digest == ours {
            return Err("the owner's new pattern equals the old one: this would prove nothing".into());
        }
        let read = |remote| Operation::Read { remote };
        let took = transfer(&party, &offer.region, read, "read", display)?;
        ui::moved("read", size, took);
        ui::compared("mover sees", digest(&mapping)?, theirs.digest)?;
    }
    wire.send(&Ask::Bye)?;
    party.region.deregister()?;
    ui::verified(size, display.rounds, [&offer.party.path, &party.introduction.path]);
    Ok(())
}

/// Moves all of the region, a window of messages under way at a time.
fn transfer(
    party: &Party,
    remote: &RemoteRegion,
    operation: impl Fn(dmabuf_rdma::transfer::RemoteAddr) -> Operation,
    what: &'static str,
    display: Display,
) -> Result<Duration> {
    let bar = Bar::new(display.progress, what, remote.len());
    let start = Instant::now();
    let (mut posted, mut done) = (0, 0);
    while done < remote.len() {
        while posted < remote.len() && posted - done < WINDOW * MESSAGE {
            let length = MESSAGE.min(remote.len() - posted);
            let element = party.region.sge(posted, length)?;
            party.pair.post(length, operation(remote.at(posted, length)?), &[element], true)?;
            posted += length;
        }
        // The identifier of a request is its length.
        done += party.queue.wait(LIMIT)?.success()?.wr_id;
        bar.set(done);
    }
    bar.finish();
    Ok(start.elapsed())
}
