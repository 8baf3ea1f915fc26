//! The side that is pinged.

use std::thread;
use std::time::Duration;

use dmabuf_rdma::cm::{Incoming, Listener};
use dmabuf_rdma::error::{ConnectError, TransferError};
use dmabuf_rdma::transfer::Connection;

use crate::memory::{Memory, PING};
use crate::{CONNECT, Options, Result, connection, ui};

pub fn run(options: &Options) -> Result<()> {
    let listener = Listener::bind(options.address()?)?;
    if !options.persistent {
        return serve(next(&listener)?, options);
    }
    loop {
        let (incoming, options) = (next(&listener)?, options.clone());
        thread::spawn(move || {
            // One client's trouble is not the others'.
            if let Err(error) = serve(incoming, &options) {
                ui::failure(error.as_ref());
            }
        });
    }
}

fn next(listener: &Listener) -> Result<Incoming> {
    loop {
        match listener.next(Duration::from_secs(3600)) {
            Err(dmabuf_rdma::Error::Connect(ConnectError::ConnectTimeout { .. })) => {}
            answer => return Ok(answer?),
        }
    }
}

fn serve(incoming: Incoming, options: &Options) -> Result<()> {
    let mut connection = connection(&incoming.device_name(), incoming.port())?;
    let memory = Memory::new(connection.domain(), &options.exporter)?;
    incoming.accept(&mut connection, &[], CONNECT)?;
    let mut rounds = 0;
    while options.count == 0 || rounds < options.count {
        if !told(&mut connection, &memory)? {
            break;
        }
        let source = memory.note()?;
        connection.read(memory.range(PING, source.len())?, &source)?;
        let text = memory.read(PING, source.len())?;
        if options.verbose {
            ui::data("server ping", &text);
        }
        connection.send(memory.sent()?)?;

        if !told(&mut connection, &memory)? {
            break;
        }
        let sink = memory.note()?;
        // As the other rping does: the text and its NUL.
        let length = text.iter().position(|byte| *byte == 0).map_or(text.len(), |end| end + 1);
        let length = (length as u64).min(sink.len());
        connection.write(memory.range(PING, length)?, sink.range(0, length)?)?;
        connection.send(memory.sent()?)?;
        rounds += 1;
    }
    Ok(())
}

/// Receives a note; false when the client has gone instead.
fn told(connection: &mut Connection, memory: &Memory) -> Result<bool> {
    match connection.recv(memory.received()?) {
        Ok(_) => Ok(true),
        Err(dmabuf_rdma::Error::Transfer(TransferError::PeerLeft { .. })) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
