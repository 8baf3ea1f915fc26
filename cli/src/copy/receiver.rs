//! The side that gets the file.

use std::path::PathBuf;
use std::time::Duration;

use dmabuf_rdma::Connection;
use dmabuf_rdma::cm::Listener;
use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use xxhash_rust::xxh64::Xxh64;

use super::file::Partial;
use super::{BLOCK, END, FREE, MAX_BLOCK, Options, SLOTS, connection_options, extent, pack, pair};
use crate::net::{ACCEPT_TIMEOUT, TIMEOUT, address};
use crate::{Result, exporter, pattern, register, ui};

pub fn receive(options: &Options, host: &str, to: Option<PathBuf>) -> Result<()> {
    let listener = Listener::bind(address(host, options.port)?)?;
    ui::listening(listener.local_addr());
    let incoming = listener.accept_request(ACCEPT_TIMEOUT)?;
    let (length, block) = pair(incoming.private_data())?;
    if length == 0 || block == 0 || block > MAX_BLOCK {
        let reason = format!("the sender asks for {length} bytes in blocks of {block}");
        incoming.reject(&[])?;
        return Err(reason.into());
    }

    let domain = ProtectionDomain::new(&Device::by_name(&incoming.device_name())?.open()?)?;
    let allocation = exporter::by_name(&options.exporter)?.allocate(SLOTS * block)?;
    let (region, mapping) = (register::register(&domain, &allocation)?, allocation.dmabuf.map()?);
    let partial = to.as_deref().map(Partial::open).transpose()?;
    let (have, mut all) = match &partial {
        Some(partial) => partial.have(block, length)?,
        None => (0, Xxh64::new(0)),
    };
    let mut connection = Connection::new(&domain, connection_options())?;
    let mut reply = region.remote().to_bytes();
    reply.extend(pack(have, all.digest()));
    incoming.accept(&mut connection, &reply, TIMEOUT)?;

    let bar = ui::Bar::new("receive", length);
    let mut bytes = vec![0; block.min(length) as usize];
    let mut next = have;
    let mut take = || -> Result<bool> {
        let notification = connection.notifications().take_timeout(Duration::MAX)?;
        match notification.id {
            BLOCK => {
                let (index, digest) = pair(&notification.payload)?;
                // The sender has another file, and starts from the beginning.
                if index == 0 && next == have && have > 0 {
                    (next, all) = (0, Xxh64::new(0));
                }
                let extent = extent(index, block, length);
                if index != next || extent.is_empty() {
                    return Err(format!("the sender sent block {index} instead of {next}").into());
                }
                let bytes = &mut bytes[..(extent.end - extent.start) as usize];
                let memory = mapping.begin(CpuAccess::Read)?;
                memory.read(index % SLOTS * block, bytes)?;
                memory.end()?;
                let received = pattern::of_block(bytes);
                if received != digest {
                    return Err(format!(
                        "block {index} has digest {received:016x}, the sender's {digest:016x}"
                    )
                    .into());
                }
                all.update(&digest.to_le_bytes());
                partial.as_ref().map_or(Ok(()), |partial| partial.save(extent.start, bytes))?;
                connection.notify(FREE, &index.to_le_bytes())?.wait()?;
                next += 1;
                bar.set(extent.end);
                Ok(false)
            }
            END => {
                let sent =
                    notification.payload.first_chunk().ok_or("the sender's last message has no digest")?;
                let (sent, received) = (u64::from_le_bytes(*sent), all.digest());
                if sent != received || next != length.div_ceil(block) {
                    return Err(format!(
                        "the received bytes have digest {received:016x}, the sent bytes {sent:016x}"
                    )
                    .into());
                }
                Ok(true)
            }
            id => Err(format!("the sender sent notification {id}").into()),
        }
    };
    let ended = loop {
        match take() {
            Ok(false) => {}
            Ok(true) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    bar.finish();
    if let (Err(_), Some(partial)) = (&ended, &partial) {
        ui::row("kept", format!("{}; start both sides again to go on from there", partial.path().display()));
    }
    ended?;
    if let Some(partial) = partial {
        partial.finish(length)?;
    }
    connection.notify(END, &[])?.wait()?;
    ui::row("received", format!("{}, digest {:016x}, verified", ui::bytes(length), all.digest()));
    Ok(())
}
