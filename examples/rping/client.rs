//! The side that pings.

use std::net::SocketAddr;

use dmabuf_rdma::cm::Outgoing;

use crate::memory::{Memory, PING, PONG};
use crate::{CONNECT, Options, Result, connection, ui};

pub fn run(options: &Options) -> Result<()> {
    let source = options.source.map(|address| SocketAddr::new(address, 0));
    let outgoing = Outgoing::resolve(options.address()?, source, CONNECT)?;
    let mut connection = connection(&outgoing.device_name(), outgoing.port())?;
    let memory = Memory::new(connection.domain(), &options.exporter)?;
    outgoing.connect(&mut connection, &[], CONNECT)?;

    let size = options.size;
    let mut round = 0;
    while options.count == 0 || round < options.count {
        let ping = text(round, size as usize);
        memory.write(PING, &ping)?;
        memory.put_note(PING, size)?;
        connection.send(memory.sent()?)?;
        connection.recv(memory.received()?)?;
        memory.put_note(PONG, size)?;
        connection.send(memory.sent()?)?;
        connection.recv(memory.received()?)?;
        let pong = memory.read(PONG, size)?;
        if options.validate && pong != ping {
            return Err("data mismatch!".into());
        }
        if options.verbose {
            ui::data("ping", &pong);
        }
        round = round.wrapping_add(1);
    }
    connection.disconnect();
    Ok(())
}

/// The text of a round: its number, letters that begin with another one each round, and a NUL.
fn text(round: u32, size: usize) -> Vec<u8> {
    let letters = (b'A'..=b'z').cycle().skip(round as usize % 58);
    let mut text: Vec<u8> = format!("rdma-ping-{round}: ").into_bytes();
    text.truncate(size);
    text.extend(letters.take(size - text.len()));
    text[size - 1] = 0;
    text
}
