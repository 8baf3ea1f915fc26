//! An offset in a buffer is not an address that a device uses.

use dmabuf_rdma::{DmaBuf, Umem};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let buffer = DmaBuf::from_fd(std::fs::File::open("/dev/null")?)?;
    let offset: u64 = 4096;
    Umem::new(&buffer, offset.., offset)?; //~ E0308
    Ok(())
}
