//! An element borrows the handle that keeps its region registered.

use dmabuf_rdma::MemoryRegion;
use dmabuf_rdma::verbs::Sge;

fn element(region: &MemoryRegion) -> Result<Sge<'_>, Box<dyn std::error::Error>> {
    let slice = region.slice(..4096)?;
    let element = slice.sge()?;
    Ok(element) //~ E0515
}

fn dangling(region: MemoryRegion) -> Result<(), Box<dyn std::error::Error>> {
    let element = region.sge(..4096)?;
    drop(region); //~ E0505
    println!("{element:?}");
    Ok(())
}

fn main() {}
