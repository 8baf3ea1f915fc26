//! `dmabuf-rdma doctor` on a machine whose RDMA devices are gone. No other test here opens one.

use crate::common::doctor::Doctor;
use crate::common::system::run;

#[test]
fn a_machine_without_devices() {
    let devices = [("rxe0", "wire0"), ("rxe1", "wire1")];
    devices.iter().for_each(|(device, _)| drop(run("rdma", &["link", "delete", device])));
    let none = Doctor::new().run();
    for (device, netdev) in devices {
        run("rdma", &["link", "add", device, "type", "rxe", "netdev", netdev]);
    }
    let told = none.told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("no-device: the kernel has no RDMA device"), "{told:?}");
    assert!(
        told[0].contains(" -> load the NIC's driver, move a device here (rdma dev set), or add soft-RoCE"),
        "{told:?}"
    );
    assert_eq!((none.grade(), none.status), ("F", 1));
    assert!(none.json["facts"]["devices"].as_array().unwrap().is_empty());
}
