//! What the two sides tell each other over TCP: one JSON object a line.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use dmabuf_rdma::RemoteRegion;
use dmabuf_rdma::verbs::Endpoint;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Result;

/// The owner's first message: its buffer and where to reach it.
#[derive(Serialize, Deserialize)]
pub struct Offer {
    pub endpoint: Endpoint,
    pub region: RemoteRegion,
    pub party: Introduction,
}

/// A side's buffer, for people.
#[derive(Serialize, Deserialize)]
pub struct Introduction {
    pub device: String,
    pub exporter: String,
    pub path: String,
    pub register_ms: f64,
}

/// The mover's answer.
#[derive(Serialize, Deserialize)]
pub struct Answer {
    pub endpoint: Endpoint,
}

/// What the mover asks for then.
#[derive(Serialize, Deserialize)]
pub enum Ask {
    /// The digest of what your mapping shows.
    Digest,
    /// Fill your buffer with the pattern of this seed, then the digest.
    Fill { seed: u64 },
    /// We are done.
    Bye,
}

/// The owner's answer to `Digest` and `Fill`.
#[derive(Serialize, Deserialize)]
pub struct Shown {
    pub digest: u64,
}

/// A connection that carries messages.
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
            return Err("the other side hung up".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    pub fn ask<T: DeserializeOwned>(&mut self, question: &impl Serialize) -> Result<T> {
        self.send(question)?;
        self.receive()
    }
}
