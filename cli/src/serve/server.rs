//! The side that owns the buffer.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use dmabuf_rdma::Connection;
use dmabuf_rdma::cm::{Incoming, Listener};
use dmabuf_rdma::dmabuf::{CpuAccess, Mapping};
use dmabuf_rdma::exporter::Allocation;
use dmabuf_rdma::mr::Access;
use dmabuf_rdma::transfer::ConnectionOptions;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};

use super::Args;
use crate::net::{ACCEPT_TIMEOUT, TIMEOUT, address};
use crate::register::{READ_WRITE, register_as};
use crate::{Result, exporter, ui};

/// Bytes that are copied at once between file and buffer.
const BLOCK: usize = 1 << 20;

pub fn run(args: &Args) -> Result<()> {
    let size = match &args.file {
        Some(path) => std::fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?.len(),
        None => args.size,
    };
    let exporter = exporter::by_name(&args.exporter)?;
    let allocation = exporter.allocate(size)?;
    if let Some(path) = &args.file {
        load(path, &allocation.dmabuf.map()?, size)?;
    }
    let listener = Listener::bind(address(&args.listen, args.port)?)?;
    ui::listening(listener.local_addr());

    let mut served = 0;
    std::thread::scope(|scope| -> Result<()> {
        while args.clients == 0 || served < args.clients {
            let incoming = match listener.accept_request(ACCEPT_TIMEOUT) {
                Err(dmabuf_rdma::cm::Error::Timeout { .. }) => continue,
                incoming => incoming?,
            };
            served += 1;
            let allocation = &allocation;
            scope.spawn(move || {
                let peer = incoming.peer_addr();
                match serve(incoming, allocation, size, args.read_only) {
                    Ok(()) => ui::row("served", peer),
                    Err(error) => ui::failure(error.as_ref()),
                }
            });
        }
        Ok(())
    })?;
    args.file.as_deref().map_or(Ok(()), |path| save(&allocation.dmabuf.map()?, size, path))
}

/// Gives a client the buffer until it disconnects.
fn serve(incoming: Incoming, allocation: &Allocation, size: u64, read_only: bool) -> Result<()> {
    let domain = ProtectionDomain::new(&Device::by_name(&incoming.device_name())?.open()?)?;
    let access = if read_only { Access::REMOTE_READ } else { READ_WRITE };
    let region = register_as(&domain, allocation, size, access)?;
    let mut connection = Connection::new(&domain, ConnectionOptions::default().notifications(1))?;
    incoming.accept(&mut connection, &region.remote().to_bytes(), TIMEOUT)?;
    // Clients send no notification: the wait ends when the client disconnects.
    match connection.notifications().take_timeout(Duration::MAX) {
        Err(
            dmabuf_rdma::transfer::Error::NotificationsEnded { .. }
            | dmabuf_rdma::transfer::Error::PeerDisconnected { .. },
        ) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Err("the client sent a notification".into()),
    }
}

fn load(path: &Path, mapping: &Mapping, length: u64) -> Result<()> {
    let mut file = File::open(path)?;
    let memory = mapping.begin(CpuAccess::Write)?;
    let mut block = vec![0; BLOCK];
    for offset in (0..length).step_by(BLOCK) {
        let block = &mut block[..BLOCK.min((length - offset) as usize)];
        file.read_exact(block)?;
        memory.write(offset, block)?;
    }
    Ok(memory.end()?)
}

fn save(mapping: &Mapping, length: u64, path: &Path) -> Result<()> {
    let mut file = File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let memory = mapping.begin(CpuAccess::Read)?;
    let mut block = vec![0; BLOCK];
    for offset in (0..length).step_by(BLOCK) {
        let block = &mut block[..BLOCK.min((length - offset) as usize)];
        memory.read(offset, block)?;
        file.write_all(block)?;
    }
    Ok(memory.end()?)
}
