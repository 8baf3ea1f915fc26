//! Options may get more fields, so a program sets them by name.

use dmabuf_rdma::transfer::ConnectionOptions;

fn main() {
    let _ = ConnectionOptions { window: 64, ..Default::default() }; //~ E0639
    let _ = ConnectionOptions::default().window(64);
}
