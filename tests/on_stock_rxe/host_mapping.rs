//! HostMapping: registrations of our own host pages, for devices that cannot import.

use dmabuf_rdma::exporter::PageKind;
use dmabuf_rdma::mr::{Access, MemoryRegion, Path, RegisterError};

use crate::assert_refused;
use crate::common::buffers::{udmabuf, udmabuf_kinds};
use crate::common::bytes;
use crate::common::census::Census;
use crate::common::peers::{Peers, domain};
use crate::common::system::{Memlock, unprivileged};
use crate::common::{contents, pattern};

#[test]
fn every_byte_of_every_udmabuf() {
    udmabuf_kinds().iter().for_each(|kind| bytes::whole_buffer(Path::HostMapping, kind));
}

#[test]
fn odd_ranges_with_their_own_iova() {
    udmabuf_kinds().iter().for_each(|kind| bytes::odd_range(Path::HostMapping, kind));
}

#[test]
fn sends_and_atomics() {
    udmabuf_kinds().iter().for_each(|kind| bytes::send_and_atomics(Path::HostMapping, kind));
}

#[test]
fn host_mapping_follows_the_importing_paths_and_is_reported() {
    let (domain, allocation) = (domain(), udmabuf(PageKind::Base, 4096));
    let region = MemoryRegion::builder(&domain, &allocation.dmabuf)
        .host_mapping(allocation.backing.as_ref().unwrap())
        .register()
        .unwrap();
    assert_eq!(region.path(), Path::HostMapping);
}

#[test]
fn the_region_keeps_its_pages() {
    let census = Census::take();
    let peers = Peers::new();
    let allocation = udmabuf(PageKind::Base, 4096);
    let region = bytes::builder(&peers, Path::HostMapping, &allocation).register().unwrap();
    let bytes = pattern(4096, 9);
    allocation.dmabuf.map().unwrap().write(0, &bytes).unwrap();
    drop(allocation);
    let other = udmabuf(PageKind::Base, 4096);
    let other_region = bytes::builder(&peers, Path::HostMapping, &other).register().unwrap();
    peers.read(&region, &other_region);
    assert_eq!(contents(&other.dmabuf), bytes);
    drop((region, other_region, other, peers));
    census.assert_unchanged();
}

#[test]
fn the_memlock_limit_is_reported_with_the_bytes_needed() {
    let allocation = udmabuf(PageKind::Base, 4 << 20);
    let _limit = Memlock::new(1 << 20);
    let refused = unprivileged(|| {
        // Every user may open the device node, so `nobody` also makes the domain.
        let domain = domain();
        MemoryRegion::builder(&domain, &allocation.dmabuf)
            .access(Access::REMOTE)
            .host_mapping(allocation.backing.as_ref().unwrap())
            .register()
            .map(drop)
    });
    let message = assert_refused!(
        refused,
        RegisterError::MemlockLimit {
            path: Path::HostMapping,
            limit: 0x10_0000,
            pinned: 0,
            needed: 0x40_0000,
            ..
        }
    );
    assert!(
        message.contains("HostMapping pins 4194304 bytes")
            && message.contains("RLIMIT_MEMLOCK is 1048576 bytes"),
        "{message}"
    );
}

#[test]
fn a_thousand_cycles_leave_nothing() {
    let domain = domain();
    let allocation = udmabuf(PageKind::Base, 64 << 10);
    let census = Census::take();
    for _ in 0..1000 {
        let region = MemoryRegion::builder(&domain, &allocation.dmabuf)
            .access(Access::REMOTE)
            .host_mapping(allocation.backing.as_ref().unwrap())
            .register()
            .unwrap();
        region.deregister().unwrap();
    }
    census.assert_unchanged();
}
