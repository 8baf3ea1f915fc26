//! The server: a task for each client.

use std::collections::HashMap;
use std::time::Duration;

use dmabuf_rdma::Connection;
use dmabuf_rdma::cm::{Incoming, Listener};
use dmabuf_rdma::transfer::{ConnectionOptions, Worker, WorkerOptions};
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use tokio::task::JoinSet;
use tokio_stream::StreamExt;

use crate::{ALIVE, DONE, Options, Result, TIMEOUT, address, digest, exporter, register};

/// A device that clients come through, and what is registered with it.
struct Served {
    worker: Worker,
    /// The description of the memory, and the digest of its bytes.
    reply: Vec<u8>,
    _region: dmabuf_rdma::MemoryRegion,
}

pub async fn serve(
    options: &Options,
    host: &str,
    size: u64,
    patience: Duration,
    clients: usize,
) -> Result<()> {
    let allocation =
        exporter::by_name(&options.exporter).map_err(|error| error.to_string())?.allocate(size)?;
    let digest = digest::fill(&allocation.dmabuf.map()?, size)?;
    let listener = Listener::bind(address(host, options.port)?)?;
    println!("listening on {}", listener.local_addr());

    let (mut devices, mut tasks, mut come) = (HashMap::new(), JoinSet::new(), 0);
    while clients == 0 || come < clients {
        let incoming = match listener.accept_request_async(Duration::MAX).await {
            Ok(incoming) => incoming,
            Err(error) => {
                // The request is lost, and others may come.
                eprintln!("service: {error}");
                continue;
            }
        };
        come += 1;
        let name = incoming.device_name();
        if !devices.contains_key(&name) {
            let domain = ProtectionDomain::new(&Device::by_name(&name)?.open()?)?;
            let region = register::register(&domain, &allocation)?;
            let mut reply = region.remote().slice(..size)?.len().to_le_bytes().to_vec();
            reply.extend(digest.to_le_bytes());
            reply.extend(region.remote().to_bytes());
            let worker = Worker::new(&domain, WorkerOptions::default().notifications(1024))?;
            devices.insert(name.clone(), Served { worker, reply, _region: region });
        }
        let served = &devices[&name];
        let connection = served.worker.connection(ConnectionOptions::default().window(32))?;
        let (reply, client) = (served.reply.clone(), incoming.peer_addr());
        tasks.spawn(async move {
            match one(incoming, connection, &reply, patience).await {
                Ok(()) => println!("{client} has verified all bytes"),
                Err(error) => println!("{client} is gone: {error}"),
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

/// Serves one client until it is done.
async fn one(incoming: Incoming, mut connection: Connection, reply: &[u8], patience: Duration) -> Result<()> {
    incoming.accept_async(&mut connection, reply, TIMEOUT).await?;
    let mut notifications = connection.notifications();
    loop {
        let Ok(next) = tokio::time::timeout(patience, notifications.next()).await else {
            // Dropping the connection disconnects the client.
            return Err(format!("it was silent for {patience:?}").into());
        };
        match next.ok_or("its notifications have ended")??.id {
            ALIVE => {}
            DONE => return Ok(()),
            other => return Err(format!("it sent notification {other}, which is unknown").into()),
        }
    }
}
