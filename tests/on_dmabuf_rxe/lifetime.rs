//! What a region holds, and that nothing leaks: regions, descriptors, dma-bufs.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dmabuf_rdma::mr::{Access, MemoryRegion};
use dmabuf_rdma::verbs::{Operation, WorkRequest};

use crate::common::buffers::{every_kind, heap};
use crate::common::census::{Census, dma_bufs, fds, regions};
use crate::common::leaks;
use crate::common::link::Link;
use crate::common::peers::{Peers, TIMEOUT, domain, remote_addr};
use crate::common::system::program;
use crate::common::{assert_same, contents, pattern};

#[test]
fn a_registration_adds_one_region_and_no_descriptor() {
    let domain = domain();
    let buffer = heap(1 << 20);
    let (fds_before, regions_before, buffers_before) = (fds(), regions(), dma_bufs());
    let region = MemoryRegion::builder(&domain, &buffer).register().unwrap();
    assert_eq!((fds(), regions(), dma_bufs()), (fds_before, regions_before + 1, buffers_before));
    drop(buffer);
    assert_eq!((fds(), dma_bufs()), (fds_before - 1, buffers_before), "the region holds the buffer");
    region.deregister().unwrap();
    assert_eq!((fds(), regions(), dma_bufs()), (fds_before - 1, regions_before, buffers_before - 1));
}

#[test]
fn a_thousand_cycles_leave_nothing() {
    let domain = domain();
    let kinds = every_kind();
    let buffers: Vec<_> = kinds.iter().map(|kind| (kind.allocate)(256 << 10)).collect();
    let census = Census::take();
    for cycle in 0..1000_u64 {
        let buffer = &buffers[cycle as usize % buffers.len()].dmabuf;
        let offset = cycle * 37 % (100 << 10);
        let region = MemoryRegion::builder(&domain, buffer)
            .range(offset..offset + (100 << 10) + cycle)
            .access(Access::REMOTE)
            .register()
            .unwrap();
        // `deregister` ends one half of them, dropping the other.
        if cycle % 2 == 0 {
            region.deregister().unwrap();
        }
    }
    census.assert_unchanged();
    leaks::assert_none();
}

#[test]
fn a_domain_may_be_dropped_before_its_regions() {
    let census = Census::take();
    let domain = domain();
    let regions: Vec<_> =
        (0..8).map(|_| MemoryRegion::builder(&domain, &heap(64 << 10)).register().unwrap()).collect();
    drop(domain);
    drop(regions);
    census.assert_unchanged();
}

#[test]
fn threads_register_and_transfer_at_once() {
    let census = Census::take();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let peers = Peers::new();
                for round in 0..10 {
                    let (from, to) = (heap(256 << 10), heap(256 << 10));
                    let put = pattern(256 << 10, thread << 8 | round);
                    from.map().unwrap().write(0, &put).unwrap();
                    peers.write(&peers.register(&from), &peers.register(&to));
                    assert_same(&contents(&to), &put, "the bytes of one thread");
                }
            });
        }
    });
    census.assert_unchanged();
}

/// Two processes that transfer bytes until one is killed.
struct Traffic {
    owner: Child,
    mover: Child,
}

impl Traffic {
    fn start() -> Self {
        let mut owner = Command::new(program())
            .args(["demo", "owner", "--exporter", "heap", "--size", "16M"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the demo's owner");
        let mut line = String::new();
        BufReader::new(owner.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit(' ').next().expect("an address").to_owned();
        let mut mover = Command::new(program())
            .args(["demo", "mover", "--connect", &address, "--rounds", "1000000"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the demo's mover");
        // The transfers have begun once the first one is reported.
        let mut lines = BufReader::new(mover.stdout.take().unwrap()).lines();
        let moved = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("MiB/s")));
        moved.expect("traffic").unwrap();
        // The mover would stop at a full or a closed pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self { owner, mover }
    }
}

#[test]
fn killing_the_owner_under_traffic_leaves_nothing() {
    let census = Census::take();
    for after in [0, 13, 37] {
        let mut traffic = Traffic::start();
        std::thread::sleep(Duration::from_millis(after));
        traffic.owner.kill().unwrap();
        traffic.owner.wait().unwrap();
        assert!(!traffic.mover.wait().unwrap().success(), "a mover without its owner fails");
        census.assert_unchanged();
    }
    leaks::assert_none();
}

#[test]
fn killing_the_mover_under_traffic_leaves_nothing() {
    let census = Census::take();
    for after in [0, 13, 37] {
        let mut traffic = Traffic::start();
        std::thread::sleep(Duration::from_millis(after));
        traffic.mover.kill().unwrap();
        traffic.mover.wait().unwrap();
        assert!(!traffic.owner.wait().unwrap().success(), "an owner without its mover says so");
        census.assert_unchanged();
    }
    leaks::assert_none();
}

#[test]
fn a_region_dropped_under_traffic_ends_only_the_transfer() {
    let census = Census::take();
    let peers = Peers::new();
    let (from, to) = (heap(8 << 20), heap(8 << 20));
    let source = peers.register(&from);
    let target = peers.register(&to);
    let write = Operation::Write { remote: remote_addr(&target, 0..8 << 20) };
    for id in 0..4 {
        let elements = [source.sge(..).unwrap()];
        peers.ours.pair.post(WorkRequest::new(id, write, &elements).signaled()).unwrap();
    }
    drop((target, to));
    let ends: Vec<_> = (0..4).map(|_| peers.ours.queue.wait(TIMEOUT).unwrap().success().is_ok()).collect();
    assert!(!ends[3], "the region was gone long before the fourth message could end: {ends:?}");
    drop((source, from, peers));
    census.assert_unchanged();
}

/// rxe cannot take its device away from a user: the driver waits for the last one, then deletes the device.
#[test]
fn deleting_the_device_while_regions_live() {
    let census = Census::take();
    let link = Link::new();
    let domain = link.domain();
    let regions: Vec<_> = (0..4)
        .map(|_| MemoryRegion::builder(&domain, &heap(1 << 20)).access(Access::REMOTE).register().unwrap())
        .collect();
    let delete = link.delete();
    std::thread::sleep(Duration::from_millis(300));
    regions.into_iter().for_each(|region| region.deregister().unwrap());
    drop(domain);
    link.deleted(delete);
    census.assert_unchanged();
}
