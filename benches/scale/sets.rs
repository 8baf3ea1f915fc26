//! Sets against one region of the same bytes, and parallel registration against serial.

use dmabuf_rdma::exporter::{Exporter, Udmabuf};
use dmabuf_rdma::mr::{MemoryRegion, Path, RegionSet, SetError};
use dmabuf_rdma::verbs::ProtectionDomain;

use super::{ACCESS, Memory, timed};
use crate::common::{Peer, Result, Rows, Spread, pairs};

const GIB: u64 = 1 << 30;
const PAIRS: usize = 7;

pub fn run(rows: &mut Rows, domain: &ProtectionDomain) -> Result<()> {
    let memory = Memory::new(4 * GIB)?;
    let whole = memory.part(0..4 * GIB)?.dmabuf;
    let parts = memory.parts(4 * GIB, GIB)?;
    let milliseconds = |took: std::time::Duration| took.as_secs_f64() * 1e3;
    let one = || {
        let (took, region) = timed(|| MemoryRegion::builder(domain, &whole).access(ACCESS).register())?;
        drop(region);
        Ok(milliseconds(took))
    };
    let mut compare = |name: &str,
                       goal,
                       set: &dyn Fn() -> std::result::Result<RegionSet, SetError>|
     -> Result<()> {
        let set = || {
            let (took, set) = timed(set)?;
            assert_eq!(set.len(), 4 * GIB);
            drop(set);
            Ok(milliseconds(took))
        };
        let pairs = pairs(PAIRS, set, one)?;
        rows.add(name, "ms", Spread::of(pairs.iter().map(|pair| pair.library)), Some(Peer::of(&pairs)), goal)
    };
    compare("4 GiB: 4 dma-bufs as a set, to one region", Some("ratio <= 1.15"), &|| {
        RegionSet::of_buffers(&parts).access(ACCESS).register(domain)
    })?;
    compare("4 GiB: by default, to one region", Some("ratio <= 1.15"), &|| {
        RegionSet::builder(&whole).access(ACCESS).register(domain)
    })?;
    compare("4 GiB: 4 chunks of one dma-buf, to one region", None, &|| {
        RegionSet::builder(&whole).access(ACCESS).chunk_size(GIB).register(domain)
    })?;
    drop((whole, parts, memory));
    host_mapping(rows, domain)
}

/// Two threads against one, on the path that pins host pages.
fn host_mapping(rows: &mut Rows, domain: &ProtectionDomain) -> Result<()> {
    let allocation = Udmabuf::open()?.allocate(GIB)?;
    let backings = [allocation.backing.clone().ok_or("a udmabuf has host pages")?];
    let register = |threads| {
        let (took, set) = timed(|| {
            RegionSet::builder(&allocation.dmabuf)
                .access(ACCESS)
                .chunk_size(GIB / 16)
                .paths(&[])
                .host_mapping(&backings)
                .threads(threads)
                .register(domain)
        })?;
        assert_eq!((set.path(), set.chunks().len()), (Path::HostMapping, 16));
        drop(set);
        Ok(took.as_secs_f64() * 1e3)
    };
    let pairs = pairs(2 * PAIRS + 1, || register(2), || register(1))?;
    let time = Spread::of(pairs.iter().map(|pair| pair.library));
    let name = "1 GiB HostMapping: 2 threads, to 1";
    // 1.6 times as fast.
    rows.add(name, "ms", time, Some(Peer::of(&pairs)), Some("ratio <= 0.625"))
}
