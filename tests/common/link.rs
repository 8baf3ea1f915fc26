//! A third soft-RoCE device, which a test can delete.

use std::process::{Child, Command};

use dmabuf_rdma::verbs::{Device, ProtectionDomain};

use super::system::run;

/// The device `going` on its own dummy network interface.
pub struct Link(());

impl Link {
    #[track_caller]
    pub fn new() -> Self {
        run("ip", &["link", "add", "going0", "type", "dummy"]);
        run("ip", &["address", "add", "10.99.0.1/24", "dev", "going0"]);
        run("ip", &["link", "set", "going0", "up"]);
        run("rdma", &["link", "add", "going", "type", "rxe", "netdev", "going0"]);
        Self(())
    }

    #[track_caller]
    pub fn domain(&self) -> ProtectionDomain {
        let device = Device::by_name("going").expect("the device `going`");
        ProtectionDomain::new(&device.open().expect("open")).expect("protection domain")
    }

    /// Starts to delete the device. The driver waits until no process uses it.
    pub fn delete(&self) -> Child {
        Command::new("rdma").args(["link", "delete", "going"]).spawn().expect("rdma")
    }

    /// Waits for the end of `delete` and deletes the network interface.
    #[track_caller]
    pub fn deleted(&self, mut delete: Child) {
        assert!(delete.wait().expect("rdma").success());
        run("ip", &["link", "delete", "going0"]);
    }
}
