//! `dmabuf-rdma doctor` on iWARP, where it connects by IP address.

use crate::common::doctor::Doctor;

#[test]
fn iwarp_moves_host_pages() {
    let siw = Doctor::new().run();
    let told = siw.told();
    for device in ["siw0", "siw1"] {
        let start = format!("import-unsupported: {device} imports no dma-bufs (");
        assert!(told.iter().any(|line| line.starts_with(&start)), "{told:?}");
    }
    assert_eq!((told.len(), siw.grade(), siw.status), (2, "C", 0), "{told:?} {:?}", siw.pairs());
    let moved: Vec<_> = siw.pairs().into_iter().filter(|pair| pair.ends_with(" ++++++")).collect();
    assert_eq!(moved.len(), 4, "{:?}", siw.pairs());
}
