//! The receiving side, with a buffer of the system heap, and the messages between the two sides over TCP: one
//! JSON object per line.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use dmabuf_rdma::RemoteRegion;
use dmabuf_rdma::exporter::{DmaHeap, Exporter};
use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::{CompletionQueue, Context, Endpoint, ProtectionDomain, QueuePair};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::Result;

/// What precedes the address in the line that the peer prints.
pub const LISTENING: &str = "listening on ";

/// The sender's first message.
#[derive(Serialize, Deserialize)]
pub struct Hello {
    pub endpoint: Endpoint,
    pub size: u64,
}

/// The peer's reply: where to write.
#[derive(Serialize, Deserialize)]
pub struct Offer {
    pub endpoint: Endpoint,
    pub region: RemoteRegion,
}

/// The sender's second message: everything is written.
#[derive(Serialize, Deserialize)]
pub struct Sent {
    pub digest: u128,
}

/// The peer's second reply: the digest of the bytes in its buffer.
#[derive(Serialize, Deserialize)]
pub struct Verdict {
    pub digest: u128,
}

pub fn run(context: &Context, address: &str) -> Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("{LISTENING}{}", listener.local_addr()?);
    let mut stream = listener.accept()?.0;
    let hello: Hello = receive(&mut stream)?;

    let domain = ProtectionDomain::new(context)?;
    let buffer = DmaHeap::open("system")?.allocate(hello.size)?.dmabuf;
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    let region = MemoryRegion::builder(&domain, &buffer).access(access).register()?;
    let queue = CompletionQueue::new(context, 16)?;
    let pair = QueuePair::new(&domain, &queue, &queue, Default::default())?;
    pair.connect(&hello.endpoint)?;
    let endpoint = pair.endpoint().ok_or("a pair made here has one")?;
    send(&mut stream, &Offer { endpoint, region: region.remote() })?;

    let sent: Sent = receive(&mut stream)?;
    let mut bytes = vec![0; hello.size as usize];
    buffer.map()?.read(0, &mut bytes)?;
    let mut digest = Xxh3::new();
    digest.update(&bytes);
    let digest = digest.digest128();
    send(&mut stream, &Verdict { digest })?;
    if digest == sent.digest { Ok(()) } else { Err("the bytes that arrived differ from those sent".into()) }
}

pub fn send(stream: &mut TcpStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

pub fn receive<T: DeserializeOwned>(stream: &mut TcpStream) -> Result<T> {
    let mut line = Vec::new();
    // Byte by byte, because a read must not take bytes of the next message; messages are few and short.
    loop {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 {
            return Err("the other side closed the connection".into());
        }
        match byte {
            [b'\n'] => return Ok(serde_json::from_slice(&line)?),
            [byte] => line.push(byte),
        }
    }
}
