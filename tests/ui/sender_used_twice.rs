//! A sender has one transfer in flight at a time: `start` borrows it until the transfer ends.

use dmabuf_rdma::MemoryRegion;
use dmabuf_rdma::transfer::{Error, Request, Sender};

fn twice(sender: &mut Sender, region: &MemoryRegion) -> Result<(), Error> {
    let first = sender.start(Request::send(region))?;
    let second = sender.start(Request::send(region))?; //~ E0499
    first.wait()?;
    second.wait()?;
    sender.send(region)?;
    Ok(())
}

fn main() {}
