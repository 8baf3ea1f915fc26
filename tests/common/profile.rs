//! Devices that soft-RoCE pretends to be. The provider of `provider/` takes the profile from a variable; the kernel
//! below is still rxe, so the refusals of a profile's kernel driver are repeated for the library's own command.
//!
//! `unsafe` is here to set a variable of this process.

use dmabuf_rdma::mr::Access;
use dmabuf_rdma::verbs::{Device, ProtectionDomain};

use super::faults::{Driver, set_driver};

const VARIABLE: &str = "DMABUF_RDMA_PROFILE";

/// Contexts opened while this lives are of the profile's device.
pub struct Profile(());

impl Profile {
    #[track_caller]
    pub fn new(name: &str) -> Self {
        let reads = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::RELAXED_ORDERING;
        let flags =
            |access: Access| Driver { access: access.bits(), errno: libc::EOPNOTSUPP, dmabuf_errno: 0 };
        set_driver(match name {
            "efa-first" => Some(flags(reads)),
            "efa" | "mana" => Some(flags(reads | Access::REMOTE_WRITE)),
            "errno-524" => Some(Driver { dmabuf_errno: 524, ..flags(Access::all()) }),
            _ => None,
        });
        // SAFETY: the tests run one at a time, and no other thread reads the environment now.
        unsafe { std::env::set_var(VARIABLE, name) };
        Self(())
    }

    #[track_caller]
    pub fn domain(&self) -> ProtectionDomain {
        let context = Device::by_name("rxe0").and_then(|device| device.open()).expect("rxe0");
        ProtectionDomain::new(&context).expect("protection domain")
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        set_driver(None);
        // SAFETY: as above.
        unsafe { std::env::remove_var(VARIABLE) };
    }
}
