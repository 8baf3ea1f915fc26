//! The client: reads the buffer in parts, many in flight, and verifies its digest.

use std::time::{Duration, Instant};

use dmabuf_rdma::cm::Outgoing;
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use dmabuf_rdma::{Connection, RemoteRegion};

use crate::{ALIVE, DONE, Options, Result, TIMEOUT, Then, address, digest, exporter, register};

const PART: u64 = 1 << 20;

pub async fn fetch(options: &Options, host: &str, then: Option<Then>) -> Result<()> {
    let outgoing = Outgoing::resolve_async(address(host, options.port)?, None, TIMEOUT).await?;
    let domain = ProtectionDomain::new(&Device::by_name(&outgoing.device_name())?.open()?)?;
    let mut connection = Connection::new(&domain, ConnectionOptions::default())?;
    let reply = outgoing.connect_async(&mut connection, &[], TIMEOUT).await?;
    let (size, rest) = reply.split_first_chunk().ok_or("the server's reply is too short")?;
    let (expected, rest) = rest.split_first_chunk().ok_or("the server's reply is too short")?;
    let (size, expected) = (u64::from_le_bytes(*size), u64::from_le_bytes(*expected));
    let (remote, _padding) = RemoteRegion::split_from(rest)?;

    let allocation =
        exporter::by_name(&options.exporter).map_err(|error| error.to_string())?.allocate(size)?;
    let region = register::register(&domain, &allocation)?;
    let (start, mut parts) = (Instant::now(), Vec::new());
    for offset in (0..size).step_by(PART as usize) {
        let range = offset..size.min(offset + PART);
        parts.push(connection.read(region.slice(range.clone())?, remote.slice(range)?)?);
    }
    match then {
        Some(Then::Cancel) => {
            parts.iter().for_each(|part| part.cancel());
            connection.disconnect();
            println!("cancelled");
            return Ok(());
        }
        Some(Then::Silent) => {
            println!("silent");
            loop {
                tokio::time::sleep(Duration::from_secs(3600)).await;
            }
        }
        None => {}
    }
    for (at, part) in parts.into_iter().enumerate() {
        part.timeout(TIMEOUT).await?;
        if at % 16 == 0 {
            connection.notify(ALIVE, &[])?.await?;
        }
    }
    let took = start.elapsed();
    let received = digest::digest(&allocation.dmabuf.map()?, size)?;
    if received != expected {
        return Err(format!("the digest is {received:016x} instead of {expected:016x}").into());
    }
    connection.notify(DONE, &[])?.await?;
    println!("read {size} bytes in {took:.2?}, verified");
    Ok(())
}
