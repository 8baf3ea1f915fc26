//! `dmabuf-rdma doctor` on a device that imports no dma-bufs.

use crate::common::doctor::Doctor;

#[test]
fn a_device_without_import_moves_host_pages() {
    let stock = Doctor::new().run();
    let refused = |device: &str| {
        format!(
            "import-unsupported: {device} imports no dma-bufs (Verbs: EOPNOTSUPP, the user-space provider has no reg_dmabuf_mr; Uverbs: EOPNOTSUPP, the kernel driver does not import dma-bufs) -> no released soft-RoCE or soft-iWARP imports dma-bufs: use a NIC, or for tests the module of kernel/rxe; a udmabuf of your own registers by HostMapping"
        )
    };
    let [one, other] = ["rxe0", "rxe1"].map(refused);
    stock.assert("C", &[&one, &other], &[]);
    for pair in stock.pairs() {
        let expected = match pair.split(' ').next().unwrap() {
            "udmabuf" => "HostMapping ++++++",
            "host" => "HostMemory ++++++",
            _ => "none +-....",
        };
        assert!(pair.ends_with(expected), "{pair}");
    }
}
