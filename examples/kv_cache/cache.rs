//! A cache of pages in a dma-buf, for each layer a pool, and behind them a message of page indices.

use dmabuf_rdma::MemoryRegion;
use dmabuf_rdma::dmabuf::{CpuAccess, Mapping};
use dmabuf_rdma::mr::RegionSlice;
use dmabuf_rdma::verbs::ProtectionDomain;
use xxhash_rust::xxh64::Xxh64;

use crate::{Options, Result, exporter, register};

pub struct Cache {
    pub region: MemoryRegion,
    mapping: Mapping,
    layers: u32,
    /// Pages of a request in a layer.
    pages: u32,
    page_size: u64,
    /// A pool has so many times the pages of a request.
    spare: u32,
}

impl Cache {
    pub fn new(domain: &ProtectionDomain, options: &Options, spare: u32) -> Result<Self> {
        let Options { layers, pages, page_size, .. } = *options;
        if layers == 0 || pages == 0 || page_size == 0 || page_size % 8 != 0 {
            return Err(
                "layers, pages and page size must not be 0, and the page size is a multiple of 8".into()
            );
        }
        let pools = u64::from(layers) * u64::from(pages) * u64::from(spare);
        let size = pools.checked_mul(page_size).ok_or("the cache is larger than 2^64 bytes")?;
        let allocation = exporter::by_name(&options.exporter)?.allocate(size + 4 * u64::from(pages))?;
        let region = register::register(domain, &allocation)?;
        let mapping = allocation.dmabuf.map()?;
        Ok(Self { region, mapping, layers, pages, page_size, spare })
    }

    /// Number of pages in all pools.
    pub fn all_pages(&self) -> usize {
        self.layers as usize * self.pool() as usize
    }

    /// Number of pages in the pool of a layer.
    fn pool(&self) -> u32 {
        self.pages * self.spare
    }

    /// The pages of a request in each pool: any order, and gaps between them.
    pub fn scattered(&self, seed: u32) -> Vec<u32> {
        let (pool, mut step) = (self.pool(), seed | 1);
        while gcd(step, pool) != 1 {
            step += 2;
        }
        (0..self.pages).map(|at| (u64::from(at) * u64::from(step) % u64::from(pool)) as u32).collect()
    }

    /// Indices of these pages of a layer among all pages.
    pub fn in_layer(&self, layer: u32, indices: &[u32]) -> impl Iterator<Item = usize> {
        let first = layer as usize * self.pool() as usize;
        indices.iter().map(move |page| first + *page as usize)
    }

    /// Computes the pages of a layer, and returns their digest.
    pub fn compute(&self, layer: u32, indices: &[u32]) -> Result<u64> {
        let (guard, mut digest) = (self.mapping.begin(CpuAccess::Write)?, Xxh64::new(0));
        for (at, page) in self.in_layer(layer, indices).enumerate() {
            let bytes = self.contents(layer, at);
            digest.update(&bytes);
            guard.write(page as u64 * self.page_size, &bytes)?;
        }
        guard.end()?;
        Ok(digest.digest())
    }

    /// Compares the pages of a layer with what was computed, and returns their digest.
    pub fn verify(&self, layer: u32, indices: &[u32]) -> Result<u64> {
        let (guard, mut digest) = (self.mapping.begin(CpuAccess::Read)?, Xxh64::new(0));
        let mut bytes = vec![0; self.page_size as usize];
        for (at, page) in self.in_layer(layer, indices).enumerate() {
            guard.read(page as u64 * self.page_size, &mut bytes)?;
            if bytes != self.contents(layer, at) {
                return Err(format!("page {at} of layer {layer} has other bytes than were computed").into());
            }
            digest.update(&bytes);
        }
        guard.end()?;
        Ok(digest.digest())
    }

    /// What stands for a computation: bytes that differ from page to page and from word to word.
    fn contents(&self, layer: u32, page: usize) -> Vec<u8> {
        let seed = (u64::from(layer) << 32 | page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (1..=self.page_size / 8).flat_map(|word| seed.wrapping_mul(2 * word + 1).to_le_bytes()).collect()
    }

    /// The memory of the message.
    pub fn message(&self) -> Result<RegionSlice> {
        let start = self.all_pages() as u64 * self.page_size;
        Ok(self.region.slice(start..start + 4 * u64::from(self.pages))?)
    }

    pub fn write_message(&self, indices: &[u32]) -> Result<()> {
        let bytes: Vec<u8> = indices.iter().flat_map(|index| index.to_le_bytes()).collect();
        Ok(self.mapping.write(self.all_pages() as u64 * self.page_size, &bytes)?)
    }

    pub fn read_message(&self) -> Result<Vec<u32>> {
        let mut bytes = vec![0; 4 * self.pages as usize];
        self.mapping.read(self.all_pages() as u64 * self.page_size, &mut bytes)?;
        let index = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        Ok(bytes.chunks_exact(4).map(index).collect())
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}
