//! A guard of CPU access ends while its mapping is there, since its end is an ioctl on the mapping's fd.

use dmabuf_rdma::dmabuf::{CpuAccess, DmaBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let buffer = DmaBuf::from_fd(std::fs::File::open("/dev/null")?)?;
    let guard = {
        let mapping = buffer.map()?;
        mapping.begin(CpuAccess::Read)? //~ E0597
    };
    guard.end()?;
    Ok(())
}
