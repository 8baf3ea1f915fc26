//! The side that is pinged.

use std::thread;
use std::time::Duration;

use dmabuf_rdma::cm::{self, Incoming, Listener};
use dmabuf_rdma::{Connection, transfer};

use crate::memory::{Memory, PING};
use crate::{Options, Result, TIMEOUT, connection, ui};

pub fn run(options: &Options) -> Result<()> {
    let listener = Listener::bind(options.address()?)?;
    if !options.persistent {
        return serve(accept_request(&listener)?, options);
    }
    loop {
        let (incoming, options) = (accept_request(&listener)?, options.clone());
        thread::spawn(move || {
            // The failure of one client does not end the others.
            if let Err(error) = serve(incoming, &options) {
                ui::failure(error.as_ref());
            }
        });
    }
}

/// Waits for a client without a timeout.
fn accept_request(listener: &Listener) -> Result<Incoming, cm::Error> {
    loop {
        match listener.accept_request(Duration::from_secs(3600)) {
            Err(cm::Error::Timeout { .. }) => {}
            result => return result,
        }
    }
}

fn serve(incoming: Incoming, options: &Options) -> Result<()> {
    let mut connection = connection(&incoming.device_name(), incoming.port())?;
    let memory = Memory::new(connection.domain(), &options.exporter)?;
    incoming.accept(&mut connection, &[], TIMEOUT)?;
    let mut rounds = 0;
    while options.count == 0 || rounds < options.count {
        if !receive(&mut connection, &memory)? {
            break;
        }
        let ping = memory.described()?;
        connection.read(memory.slice(PING, ping.len())?, &ping)?.wait()?;
        let text = memory.read(PING, ping.len())?;
        if options.verbose {
            ui::data("server ping", &text);
        }
        connection.send(memory.outbox()?)?.wait()?;

        if !receive(&mut connection, &memory)? {
            break;
        }
        let pong = memory.described()?;
        // The text with its NUL, as the other rping writes it.
        let length = text.iter().position(|byte| *byte == 0).map_or(text.len(), |end| end + 1);
        let length = (length as u64).min(pong.len());
        connection.write(memory.slice(PING, length)?, pong.slice(..length)?)?.wait()?;
        connection.send(memory.outbox()?)?.wait()?;
        rounds += 1;
    }
    Ok(())
}

/// Receives a message; false if the client disconnected instead.
fn receive(connection: &mut Connection, memory: &Memory) -> Result<bool> {
    match connection.recv(memory.inbox()?).and_then(|transfer| transfer.wait()) {
        Ok(_) => Ok(true),
        Err(transfer::Error::PeerDisconnected { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
