//! The side that has the file.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dmabuf_rdma::cm::Outgoing;
use dmabuf_rdma::dmabuf::CpuAccess;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};
use dmabuf_rdma::{Connection, RemoteRegion, Transfer};
use xxhash_rust::xxh64::Xxh64;

use super::file::{Source, digest_of};
use super::{BLOCK, END, FREE, MAX_BLOCK, Options, SLOTS, connection_options, extent, pack, pair};
use crate::net::{TIMEOUT, address};
use crate::{Result, exporter, pattern, register, ui};

pub fn send(
    options: &Options,
    host: &str,
    path: Option<PathBuf>,
    size: Option<u64>,
    block: u64,
) -> Result<()> {
    if !block.is_multiple_of(8) || block > MAX_BLOCK {
        return Err(format!("a block of {block} bytes: take a multiple of 8 up to 1G").into());
    }
    let (source, length) = Source::open(path, size)?;
    let outgoing = Outgoing::resolve(address(host, options.port)?, None, TIMEOUT)?;
    let domain = ProtectionDomain::new(&Device::by_name(&outgoing.device_name())?.open()?)?;
    let allocation = exporter::by_name(&options.exporter)?.allocate(SLOTS * block)?;
    let (region, mapping) = (register::register(&domain, &allocation)?, allocation.dmabuf.map()?);
    let mut connection = Connection::new(&domain, connection_options())?;
    let answer = outgoing.connect(&mut connection, &pack(length, block), TIMEOUT)?;
    let (remote, rest) = RemoteRegion::split_from(&answer)?;
    let (have, digest) = pair(rest)?;

    let blocks = length.div_ceil(block);
    let (first, mut all) =
        match digest_of(have.min(blocks), block, length, |at, bytes| source.read(at, bytes))? {
            same if have <= blocks && same.digest() == digest => (have, same),
            _ => (0, Xxh64::new(0)),
        };
    if first > 0 {
        ui::row("resumed", format!("the receiver has {} already", ui::bytes((first * block).min(length))));
    }
    let bar = ui::Bar::new("send", length);
    let start = Instant::now();
    let mut bytes = vec![0; block.min(length) as usize];
    let mut in_flight: VecDeque<(Transfer, u64, u64)> = VecDeque::new();
    // Blocks whose place at the receiver is free again.
    let mut freed = first;
    let announce = |(transfer, index, digest): (Transfer, u64, u64)| -> Result<()> {
        transfer.wait()?;
        connection.notify(BLOCK, &pack(index, digest))?.wait()?;
        bar.set(extent(index, block, length).end);
        Ok(())
    };
    for index in first..blocks {
        if in_flight.len() as u64 == SLOTS / 2 {
            announce(in_flight.pop_front().expect("not empty"))?;
        }
        while index >= freed + SLOTS {
            // A receiver may save to a slow disk.
            let notification = connection.notifications().take_timeout(Duration::MAX)?;
            if notification.id != FREE {
                return Err(format!("the receiver sent notification {}", notification.id).into());
            }
            freed += 1;
        }
        let extent = extent(index, block, length);
        let bytes = &mut bytes[..(extent.end - extent.start) as usize];
        source.read(extent.start, bytes)?;
        let digest = pattern::of_block(bytes);
        all.update(&digest.to_le_bytes());
        let at = index % SLOTS * block;
        let memory = mapping.begin(CpuAccess::Write)?;
        memory.write(at, bytes)?;
        memory.end()?;
        let slot = at..at + bytes.len() as u64;
        let transfer = connection.write(region.slice(slot.clone())?, remote.slice(slot)?)?;
        in_flight.push_back((transfer, index, digest));
    }
    in_flight.into_iter().try_for_each(announce)?;
    let took = start.elapsed();
    connection.notify(END, &all.digest().to_le_bytes())?.wait()?;
    // The receiver's last word: it has saved and compared everything.
    while connection.notifications().take_timeout(Duration::MAX)?.id != END {}
    bar.finish();
    ui::row("sent", ui::rate(length - (first * block).min(length), took));
    ui::row("digest", format!("{:016x}, as received", all.digest()));
    Ok(())
}
