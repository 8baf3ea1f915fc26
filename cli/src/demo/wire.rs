//! The messages between the two sides, over TCP: one JSON object per line.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use dmabuf_rdma::RemoteRegion;
use dmabuf_rdma::verbs::Endpoint;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Result;

/// The owner's first message: its endpoint and its region.
#[derive(Serialize, Deserialize)]
pub struct Offer {
    pub endpoint: Endpoint,
    pub region: RemoteRegion,
    pub owner: Summary,
}

/// A side and its buffer, to be printed.
#[derive(Serialize, Deserialize)]
pub struct Summary {
    pub device: String,
    pub exporter: String,
    pub path: String,
    pub register_ms: f64,
}

/// The mover's reply.
#[derive(Serialize, Deserialize)]
pub struct Answer {
    pub endpoint: Endpoint,
}

/// The mover's further messages.
#[derive(Serialize, Deserialize)]
pub enum Command {
    /// Compute the digest of the buffer.
    Digest,
    /// Fill the buffer with the pattern of this seed, and compute its digest.
    Fill { seed: u64 },
    /// End the run.
    End,
}

/// The owner's reply to `Digest` and `Fill`.
#[derive(Serialize, Deserialize)]
pub struct Reply {
    pub digest: u64,
}

/// A TCP connection that carries messages.
pub struct Wire {
    reader: BufReader<TcpStream>,
}

impl Wire {
    pub fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.reader.get_mut().write_all(&line)?)
    }

    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err("the other side closed the connection".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Sends a command, and returns the digest in the owner's reply.
    pub fn ask(&mut self, command: &Command) -> Result<u64> {
        self.send(command)?;
        let Reply { digest } = self.receive()?;
        Ok(digest)
    }
}
