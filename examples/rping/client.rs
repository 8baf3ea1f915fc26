//! The side that pings.

use std::net::SocketAddr;

use dmabuf_rdma::cm::Outgoing;

use crate::memory::{Memory, PING, PONG};
use crate::{Options, Result, TIMEOUT, connection, ui};

pub fn run(options: &Options) -> Result<()> {
    let source = options.source.map(|address| SocketAddr::new(address, 0));
    let outgoing = Outgoing::resolve(options.address()?, source, TIMEOUT)?;
    let mut connection = connection(&outgoing.device_name(), outgoing.port())?;
    let memory = Memory::new(connection.domain(), &options.exporter)?;
    outgoing.connect(&mut connection, &[], TIMEOUT)?;

    let size = options.size;
    let mut round = 0;
    while options.count == 0 || round < options.count {
        let ping = text(round, size as usize);
        memory.write(PING, &ping)?;
        // The server replies after it has read the ping, and again after it has written the pong.
        for buffer in [PING, PONG] {
            memory.put_description(buffer, size)?;
            connection.send(memory.outbox()?)?.wait()?;
            connection.recv(memory.inbox()?)?.wait()?;
        }
        let pong = memory.read(PONG, size)?;
        if options.validate && pong != ping {
            return Err(format!("round {round}: the server wrote other bytes than it was sent").into());
        }
        if options.verbose {
            ui::data("ping", &pong);
        }
        round = round.wrapping_add(1);
    }
    connection.disconnect();
    Ok(())
}

/// The bytes of a round: its number, then letters from another one on in each round, then a NUL.
fn text(round: u32, size: usize) -> Vec<u8> {
    let letters = (b'A'..=b'z').cycle().skip(round as usize % 58);
    let mut text: Vec<u8> = format!("rdma-ping-{round}: ").into_bytes();
    text.truncate(size);
    text.extend(letters.take(size - text.len()));
    text[size - 1] = 0;
    text
}
